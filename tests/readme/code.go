package readme

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// source parses the Go files below dir, without tests.
func source(dir string) ([]*ast.File, error) {
	var files []*ast.File
	set := token.NewFileSet()
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err == nil {
			files = append(files, file)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the source in %q: %w", dir, err)
	}
	return files, nil
}

// visit calls see with each node of type N in files.
func visit[N ast.Node](files []*ast.File, see func(N)) {
	for _, file := range files {
		ast.Inspect(file, func(n ast.Node) bool {
			if n, ok := n.(N); ok {
				see(n)
			}
			return true
		})
	}
}

// text is the value of a string literal.
func text(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// method splits a call of a method into its receiver and its name.
func method(call *ast.CallExpr) (on ast.Expr, name string) {
	if sel, ok := call.Fun.(*ast.SelectorExpr); ok {
		return sel.X, sel.Sel.Name
	}
	return nil, ""
}

// codes are the constants of type Code.
func codes(files []*ast.File) []string {
	var list []string
	visit(files, func(spec *ast.ValueSpec) {
		if t, ok := spec.Type.(*ast.Ident); !ok || t.Name != "Code" {
			return
		}
		for _, v := range spec.Values {
			if s, ok := text(v); ok {
				list = append(list, s)
			}
		}
	})
	return list
}

// routes are the entries of a table such as {"/path": {http.MethodGet: …}}, as "GET /path".
// A star in a path stands for one segment.
func routes(files []*ast.File) []string {
	var list []string
	visit(files, func(entry *ast.KeyValueExpr) {
		path, ok := text(entry.Key)
		handlers, isTable := entry.Value.(*ast.CompositeLit)
		if !ok || !isTable || !strings.HasPrefix(path, "/") {
			return
		}
		for _, e := range handlers.Elts {
			if e, ok := e.(*ast.KeyValueExpr); ok {
				if sel, ok := e.Key.(*ast.SelectorExpr); ok {
					list = append(list, strings.ToUpper(strings.TrimPrefix(sel.Sel.Name, "Method"))+" "+path)
				}
			}
		}
	})
	return list
}

// metrics are the builder's series, each with its labels.
func metrics(files []*ast.File) map[string][]string {
	found := make(map[string][]string)
	visit(files, func(lit *ast.BasicLit) {
		if name, ok := text(lit); ok && strings.HasPrefix(name, "builder_") {
			found[name] = nil
		}
	})
	// prometheus.NewCounterVec(prometheus.CounterOpts{Name: "…"}, []string{"…"})
	visit(files, func(call *ast.CallExpr) {
		if len(call.Args) != 2 {
			return
		}
		opts, ok := call.Args[0].(*ast.CompositeLit)
		labels, isList := call.Args[1].(*ast.CompositeLit)
		if !ok || !isList {
			return
		}
		for _, e := range opts.Elts {
			if e, ok := e.(*ast.KeyValueExpr); ok && e.Key.(*ast.Ident).Name == "Name" {
				name, _ := text(e.Value)
				for _, label := range labels.Elts {
					s, _ := text(label)
					found[name] = append(found[name], s)
				}
			}
		}
	})
	return found
}

// logger names the methods of zerolog's events that add a field, and the field where it
// is not the first argument.
var logger = map[string]string{
	"Str": "", "Strs": "", "Stringer": "", "Int": "", "Int64": "", "Uint64": "", "Float64": "", "Bool": "", "Dur": "", "Time": "",
	"AnErr": "", "Err": "error",
}

// fields are the fields that a chain of calls adds to an event. start is the expression
// that the chain begins with.
func fields(e ast.Expr) (names []string, start ast.Expr) {
	for {
		call, ok := e.(*ast.CallExpr)
		if !ok {
			return names, e
		}
		on, name := method(call)
		if on == nil {
			return names, e
		}
		if fixed, ok := logger[name]; ok && len(call.Args) > 0 {
			if s, ok := text(call.Args[0]); ok {
				names = append(names, s)
			} else if fixed != "" {
				names = append(names, fixed)
			}
		}
		e = on
	}
}

// line is a line of the log, by its message.
type line struct {
	own    []string // fields that the statement gives it
	shared []string // fields of the loggers in its package, which the line may have
}

// logLines are the log's lines by their message. An event in a variable has the fields
// that its function adds to the variable.
func logLines(files []*ast.File) map[string]line {
	var shared []string
	visit(files, func(call *ast.CallExpr) {
		// log.With().Str("call_id", id).Logger()
		if on, name := method(call); name == "Logger" && len(call.Args) == 0 {
			names, _ := fields(on)
			shared = append(shared, names...)
		}
	})
	found := make(map[string]line)
	visit(files, func(f *ast.FuncDecl) {
		variables := make(map[string][]string)
		ast.Inspect(f, func(n ast.Node) bool {
			if call, ok := n.(*ast.CallExpr); ok {
				if names, start := fields(call); len(names) > 0 {
					if v, ok := start.(*ast.Ident); ok {
						variables[v.Name] = append(variables[v.Name], names...)
					}
				}
			}
			return true
		})
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			on, name := method(call)
			if name != "Msg" {
				return true
			}
			message, ok := text(call.Args[0])
			if !ok {
				return true
			}
			names, _ := fields(on)
			if v, ok := on.(*ast.Ident); ok {
				names = variables[v.Name]
			}
			l := found[message]
			l.own = append(l.own, names...)
			slices.Sort(l.own)
			l.own = slices.Compact(l.own)
			l.shared = shared
			found[message] = l
			return true
		})
	})
	return found
}

// jsonKeys are the keys of a struct, in order.
func jsonKeys(t reflect.Type) []string {
	var keys []string
	for i := range t.NumField() {
		key, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		keys = append(keys, key)
	}
	return keys
}

// tenantKeys are the keys that a func of package tenants reads: those of a literal such as
// map[string]func(value){"key": …}.
func tenantKeys(files []*ast.File, name string) []string {
	var list []string
	visit(files, func(f *ast.FuncDecl) {
		if f.Name.Name != name {
			return
		}
		ast.Inspect(f, func(n ast.Node) bool {
			lit, ok := n.(*ast.CompositeLit)
			if !ok {
				return true
			}
			if m, ok := lit.Type.(*ast.MapType); !ok {
				return true
			} else if _, ok := m.Value.(*ast.FuncType); !ok {
				return true
			}
			for _, e := range lit.Elts {
				if e, ok := e.(*ast.KeyValueExpr); ok {
					if key, ok := text(e.Key); ok {
						list = append(list, key)
					}
				}
			}
			return false
		})
	})
	return list
}
