package readme

import (
	"fmt"
	"go/ast"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"handler/function"
	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/tests/client"
)

// parsed is the source of a part of the repository.
func parsed(t *testing.T, dir string) []*ast.File {
	t.Helper()
	files, err := source(filepath.Join(root, dir))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatalf("%s has no source", dir)
	}
	return files
}

// same reports what one of the lists has and the other lacks. Each name is there once.
func same(t *testing.T, what, page string, code, named []string) {
	t.Helper()
	if len(code) == 0 {
		t.Errorf("no %s found in the code", what)
	}
	for _, name := range code {
		if !slices.Contains(named, name) {
			t.Errorf("%s: %s %q is missing", page, what, name)
		}
	}
	seen := make(map[string]bool)
	for _, name := range named {
		if !slices.Contains(code, name) {
			t.Errorf("%s: %s %q does not exist", page, what, name)
		}
		if seen[name] {
			t.Errorf("%s: %s %q is there twice", page, what, name)
		}
		seen[name] = true
	}
}

const (
	apiPage    = "builder/API.md"
	configPage = "builder/CONFIGURATION.md"
	deployPage = "builder/DEPLOY.md"
)

// samples are tried as values of each variable that has no default. Every such variable
// takes at least one of them.
var samples = []string{"7", "7m", "7KiB", "true", "false", "zstd", "debug", "example.com/a", "example.com=a", "example.com/a=b", "tcp://example.com:1"}

// leaves are the fields of a struct and of the structs in it, by their path. A struct
// with a field that is not exported is a leaf.
func leaves(v reflect.Value, path string, into map[string]reflect.Value) {
	if v.Kind() != reflect.Struct || slices.ContainsFunc(reflect.VisibleFields(v.Type()), func(f reflect.StructField) bool { return !f.IsExported() }) {
		into[path] = v
		return
	}
	for i := range v.NumField() {
		leaves(v.Field(i), path+"."+v.Type().Field(i).Name, into)
	}
}

// TestVariables holds the variables and the names of secrets, with their defaults.
func TestVariables(t *testing.T) {
	var asked []string
	load := func(getenv func(string) string) (map[string]reflect.Value, error) {
		c, err := function.LoadConfig(getenv)
		if err != nil {
			return nil, err
		}
		c.FallbackSecret = nil // random
		fields := make(map[string]reflect.Value)
		leaves(reflect.ValueOf(*c), "Config", fields)
		return fields, nil
	}
	defaults, err := load(func(name string) string { asked = append(asked, name); return "" })
	if err != nil {
		t.Fatal(err)
	}
	differ := func(from map[string]reflect.Value) (paths []string) {
		for path, v := range from {
			if !reflect.DeepEqual(v.Interface(), defaults[path].Interface()) {
				paths = append(paths, path)
			}
		}
		return paths
	}

	var named []string
	add := func(name, value string) {
		t.Helper()
		names, values := Words(name), Words(value)
		if len(names) != 1 || len(values) > 1 {
			t.Fatalf("%s: a row names %q with the default %q", configPage, name, value)
		}
		named = append(named, names[0])
		only := func(value string) (map[string]reflect.Value, error) {
			return load(func(name string) string {
				if name == names[0] {
					return value
				}
				return ""
			})
		}
		switch {
		case len(values) == 1:
			documented, err := only(values[0])
			if err != nil {
				t.Errorf("%s: %s: %v", configPage, names[0], err)
			} else if paths := differ(documented); len(paths) > 0 {
				t.Errorf("%s: %s is not %s where it is not set, by %q", configPage, names[0], values[0], paths)
			}
		case value == "":
			// The field that the variable sets must be empty where it is not set.
			var set []string
			for _, sample := range samples {
				if other, err := only(sample); err == nil {
					set = append(set, differ(other)...)
				}
			}
			if len(set) == 0 && slices.Contains(asked, names[0]) {
				t.Errorf("no sample is a value of %s", names[0])
			}
			for _, path := range set {
				if v := defaults[path]; !v.IsZero() && (v.Kind() != reflect.Map || v.Len() > 0) {
					t.Errorf("%s: %s has no default, and %s is %v where it is not set", configPage, names[0], path, v)
				}
			}
		}
	}
	for _, table := range tables(t, configPage, "variable", "default", "") {
		for _, row := range table.Rows {
			add(row[0], row[1])
		}
	}
	for _, row := range tables(t, configPage, "secret", "its name's variable", "")[0].Rows {
		add(row[1], row[0])
	}
	same(t, "variable", configPage, asked, named)
}

// TestCodes holds the table of statuses: each code with its status, and whether a queue
// tries it again.
func TestCodes(t *testing.T) {
	var named []string
	for _, row := range tables(t, apiPage, "status", "`code`", "when", "retry")[0].Rows {
		words := Words(row[1])
		if len(words) == 0 && row[0] == "200" {
			continue
		}
		if len(words) != 1 {
			t.Fatalf("%s: a row has the codes %q", apiPage, row[1])
		}
		named = append(named, words[0])
		status := api.Code(words[0]).HTTPStatus()
		if row[0] != fmt.Sprint(status) {
			t.Errorf("%s: %s is %s there, and is %d", apiPage, words[0], row[0], status)
		}
		if got := client.HTTPStatus[words[0]]; got != status {
			t.Errorf("the tests' client takes %s for %d, want %d", words[0], got, status)
		}
		retry := "no"
		if status == 429 || status >= 500 {
			retry = "yes"
		}
		if row[3] != retry {
			t.Errorf("%s: %s, %d, is tried again: %s, want %s", apiPage, words[0], status, row[3], retry)
		}
	}
	same(t, "code", apiPage, codes(parsed(t, "builder/api")), named)
}

// A route in code, and a path after the variable that the pages have for the function.
var (
	methodPath = regexp.MustCompile(`^(GET|HEAD|POST|PUT|DELETE|PATCH) (/\S*)$`)
	afterURL   = regexp.MustCompile(`\$BUILDER(/[a-z]*)`)
)

// routeOf is a route as the code has it: "GET /builds/<call-id>/log" is "GET /builds/*/log".
func routeOf(method, path string) string {
	parts := strings.SplitN(path, "/", 4) // the first is empty
	if len(parts) > 2 {
		parts[2] = "*"
	}
	return method + " " + strings.Join(parts, "/")
}

// TestRoutes holds the table of routes, and every other mention of one.
func TestRoutes(t *testing.T) {
	code := routes(parsed(t, "builder/server"))
	var named []string
	for _, row := range tables(t, apiPage, "route", "signed", "answer")[0].Rows {
		for _, word := range Words(row[0]) {
			m := methodPath.FindStringSubmatch(word)
			if m == nil {
				t.Fatalf("%s: %q is no route", apiPage, word)
			}
			named = append(named, routeOf(m[1], m[2]))
		}
	}
	same(t, "route", apiPage, code, named)
	for path, page := range all(t) {
		for _, word := range page.Spans {
			if m := methodPath.FindStringSubmatch(word); m != nil && !slices.Contains(code, routeOf(m[1], m[2])) {
				t.Errorf("%s: %q is no route", path, word)
			}
		}
		for _, b := range page.Blocks {
			for _, m := range afterURL.FindAllStringSubmatch(b.Text, -1) {
				if !slices.ContainsFunc(code, func(route string) bool { return strings.HasSuffix(route, " "+m[1]) }) {
					t.Errorf("%s: a command asks for %s, which is no route", path, m[1])
				}
			}
		}
	}
}

// TestConfigKeys holds the keys of com.openfaas.docker.config, with their types.
func TestConfigKeys(t *testing.T) {
	types := map[reflect.Kind]string{reflect.String: "string", reflect.Bool: "bool", reflect.Slice: "list", reflect.Map: "object", reflect.Pointer: "object"}
	config := reflect.TypeFor[api.BuildConfig]()
	keys := jsonKeys(config)
	var named []string
	for _, row := range tables(t, apiPage, "key", "type", "meaning")[0].Rows {
		words := Words(row[0])
		if len(words) != 1 {
			t.Fatalf("%s: a row has the keys %q", apiPage, row[0])
		}
		named = append(named, words[0])
		if i := slices.Index(keys, words[0]); i >= 0 && types[config.Field(i).Type.Kind()] != row[1] {
			t.Errorf("%s: %s is a %s there, and a %s in the code", apiPage, words[0], row[1], config.Field(i).Type)
		}
		// What reads a config warns of keys that it does not know.
		read, err := buildconfig.Parse([]byte(fmt.Sprintf(`{"image": "a", %q: null}`, words[0])))
		if err == nil && len(read.Warnings) > 0 {
			t.Errorf("%s: %s: %q", apiPage, words[0], read.Warnings)
		}
	}
	// Old clients send frontend, and the builder ignores it.
	keys = slices.DeleteFunc(keys, func(key string) bool { return key == "frontend" })
	same(t, "key", apiPage, keys, named)

	// The keys of an object are in the text of its row.
	for _, key := range jsonKeys(reflect.TypeFor[api.ContextSource]()) {
		if !slices.ContainsFunc(all(t)[apiPage].Spans, func(s string) bool { return strings.Contains(s, `{"`+key+`": `) }) {
			t.Errorf("%s: context.%s is missing", apiPage, key)
		}
	}
}

// TestRecord holds the fields of an answer.
func TestRecord(t *testing.T) {
	var named []string
	for _, row := range tables(t, apiPage, "field", "in which record", "")[0].Rows {
		named = append(named, Words(row[0])...)
	}
	same(t, "field", apiPage, jsonKeys(reflect.TypeFor[api.Record]()), named)
}

// TestMetrics holds the series, with their labels.
func TestMetrics(t *testing.T) {
	code := metrics(parsed(t, "builder/metrics"))
	var names, named []string
	for name := range code {
		names = append(names, name)
	}
	for _, row := range tables(t, deployPage, "series", "labels", "")[0].Rows {
		words := Words(row[0])
		if len(words) != 1 {
			t.Fatalf("%s: a row has the series %q", deployPage, row[0])
		}
		named = append(named, words[0])
		if labels := Words(row[1]); !slices.Equal(labels, code[words[0]]) {
			t.Errorf("%s: %s has the labels %q there, and %q in the code", deployPage, words[0], labels, code[words[0]])
		}
	}
	same(t, "series", deployPage, names, named)
}

// TestLog holds the lines of the log that a page lists, with their fields.
func TestLog(t *testing.T) {
	code := logLines(parsed(t, "builder/server"))
	for _, row := range tables(t, deployPage, "message", "fields", "when")[0].Rows {
		message := strings.Join(Words(row[0]), "")
		line, ok := code[message]
		if !ok {
			t.Errorf("%s: nothing logs %q", deployPage, message)
			continue
		}
		named := Words(row[1])
		for _, field := range line.own {
			if !slices.Contains(named, field) && !slices.Contains(everyLine, field) {
				t.Errorf("%s: %q lacks %s", deployPage, message, field)
			}
		}
		for _, field := range named {
			if !slices.Contains(line.own, field) && !slices.Contains(line.shared, field) {
				t.Errorf("%s: %q has no %s", deployPage, message, field)
			}
		}
	}
}

// everyLine are the fields that the page names once for all lines.
var everyLine = []string{"time", "level", "message", "call_id"}

// TestBenchmark holds the keys that the benchmarks print.
func TestBenchmark(t *testing.T) {
	var keys, named []string
	tag := regexp.MustCompile("`json:\"([a-z0-9_]+)\"`")
	for _, dir := range []string{"tests/cmd/bench/main.go", "tests/cmd/bench-pool/main.go"} {
		visit(parsed(t, dir), func(f *ast.Field) {
			if f.Tag != nil {
				if m := tag.FindStringSubmatch(f.Tag.Value); m != nil {
					keys = append(keys, m[1])
				}
			}
		})
	}
	for _, table := range tables(t, "tests/README.md", "key", "") {
		for _, row := range table.Rows {
			named = append(named, Words(row[0])...)
		}
		for _, row := range table.Rows {
			for _, word := range Words(row[1]) {
				if slices.Contains(keys, word) {
					named = append(named, word)
				}
			}
		}
	}
	slices.Sort(named)
	same(t, "key", "tests/README.md", keys, slices.Compact(named))
}

// foreign are the names with "_" in the pages that are not the builder's, by their owner.
var foreign = map[string][]string{
	"of-watchdog and the template": {"read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval", "max_header_bytes", "max_inflight", "ready_path", "upstream_url"},
	"OpenFaaS's gateway":           {"upstream_timeout", "read_timeout", "write_timeout"},
	"faasd's provider":             {"service_timeout"},
	"OpenFaaS's queue worker":      {"ack_wait"},
	"faas-netes":                   {"faas_function"},
	"faas-cli's stack.yml":         {"build_secrets"},
	"Prometheus":                   {"job_name", "scrape_configs", "static_configs"},
}

// piece is a part of code between spaces and signs. snake is a piece that is a name with
// "_" in it. A piece with a dot or a "…" is not such a name.
var (
	piece = regexp.MustCompile(`[A-Za-z0-9_./$…-]+`)
	snake = regexp.MustCompile(`^[a-z][a-z0-9]*(?:_[a-z0-9]+)+$`)
)

// TestTenantKeys holds the tables of the file of tenants: its keys, those of a tenant, and which
// of them defaults may have.
func TestTenantKeys(t *testing.T) {
	code := parsed(t, "builder/tenants")
	var file, tenant, defaults []string
	for _, row := range tables(t, configPage, "key of the file", "needed", "")[0].Rows {
		file = append(file, Words(row[0])...)
	}
	for _, row := range tables(t, configPage, "key of a tenant", "in `defaults`", "without it", "")[0].Rows {
		words := Words(row[0])
		tenant = append(tenant, words...)
		if row[1] == "yes" {
			defaults = append(defaults, words...)
		}
	}
	file = append(file, "keys") // of operator
	same(t, "key of the file", configPage, tenantKeys(code, "file"), file)
	same(t, "key of defaults", configPage, tenantKeys(code, "limits"), defaults)
	same(t, "key of a tenant", configPage, slices.Concat(tenantKeys(code, "tenant"), tenantKeys(code, "limits")), tenant)
}

// TestWords finds names in code that nothing in the code has.
func TestWords(t *testing.T) {
	known := make(map[string]bool)
	know := func(words ...string) {
		for _, w := range words {
			known[w] = true
		}
	}
	function.LoadConfig(func(name string) string { know(name); return "" })
	know(codes(parsed(t, "builder/api"))...)
	know(string(api.InProgress))
	for name := range metrics(parsed(t, "builder/metrics")) {
		know(name)
	}
	for _, line := range logLines(parsed(t, "builder/server")) {
		know(line.own...)
	}
	// What the function and the benchmarks print as JSON.
	tag := regexp.MustCompile(`json:"([a-z0-9_]+)`)
	for _, dir := range []string{"builder", "tests/cmd/bench", "tests/cmd/bench-pool"} {
		files := parsed(t, dir)
		visit(files, func(f *ast.Field) {
			if f.Tag != nil {
				for _, m := range tag.FindAllStringSubmatch(f.Tag.Value, -1) {
					know(m[1])
				}
			}
		})
	}
	know(tenantKeys(parsed(t, "builder/tenants"), "tenant")...)
	visit(parsed(t, "builder/server"), func(e *ast.KeyValueExpr) { // of GET /
		if key, ok := text(e.Key); ok {
			know(key)
		}
	})

	used := make(map[string]bool)
	for path, page := range all(t) {
		code := slices.Clone(page.Spans)
		for _, b := range page.Blocks {
			if b.Language == "yaml" || b.Language == "json" {
				code = append(code, b.Text)
			}
		}
		for _, c := range code {
			for _, word := range piece.FindAllString(c, -1) {
				if !snake.MatchString(word) {
					continue
				}
				used[word] = true
				isForeign := false
				for _, words := range foreign {
					isForeign = isForeign || slices.Contains(words, word)
				}
				if !isForeign && !known[word] {
					t.Errorf("%s: nothing has the name %s", path, word)
				}
			}
		}
	}
	for whose, words := range foreign {
		for _, w := range words {
			if !used[w] {
				t.Errorf("no page has %s, of %s", w, whose)
			}
		}
	}
}
