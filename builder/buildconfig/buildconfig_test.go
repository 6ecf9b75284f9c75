package buildconfig_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"

	"handler/function/api"
	"handler/function/buildconfig"
)

func TestParse(t *testing.T) {
	c, err := buildconfig.Parse([]byte(`{
		"image": "alexellis2/hello:0.1",
		"buildArgs": {"ADDITIONAL_PACKAGE": "", "GO111MODULE": "on"},
		"platforms": ["linux/amd64", "linux/arm64", "linux/arm64/v8", ""],
		"skipPush": true,
		"tags": ["ghcr.io/acme/hello"],
		"target": "ship",
		"dockerfile": "sub/Dockerfile",
		"labels": {"a": "b"},
		"annotations": {"c": "d"},
		"noCache": true,
		"pull": true
	}`))
	if err != nil {
		t.Fatal(err)
	}
	var refs []string
	for _, r := range c.References {
		refs = append(refs, r.String())
	}
	if want := []string{"docker.io/alexellis2/hello:0.1", "ghcr.io/acme/hello:latest"}; !slices.Equal(refs, want) {
		t.Errorf("references %q, want %q", refs, want)
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(c.Platforms, want) {
		t.Errorf("platforms %q, want %q", c.Platforms, want)
	}
	if want := map[string]string{"ADDITIONAL_PACKAGE": "", "GO111MODULE": "on"}; !maps.Equal(c.BuildArgs, want) {
		t.Errorf("build args %q, want %q", c.BuildArgs, want)
	}
	if c.Image != "alexellis2/hello:0.1" || !c.SkipPush || c.Target != "ship" || c.Dockerfile != "sub/Dockerfile" ||
		c.Labels["a"] != "b" || c.Annotations["c"] != "d" || !c.NoCache || !c.Pull || len(c.Warnings) != 0 {
		t.Errorf("got %+v", c)
	}
}

func TestParseWarns(t *testing.T) {
	c, err := buildconfig.Parse([]byte(`{"image":"x","frontend":"dockerfile.v0","cacheFrom":[],"platforms":[""]}`))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Warnings) != 2 || !strings.Contains(c.Warnings[0], "cacheFrom") || !strings.Contains(c.Warnings[1], "frontend") {
		t.Errorf("warnings %q", c.Warnings)
	}
	if len(c.Platforms) != 0 {
		t.Errorf("platforms %q", c.Platforms)
	}
}

// TestParseNull checks that a null counts as absent, wherever it is in a config.
func TestParseNull(t *testing.T) {
	for _, tt := range []struct{ config, same string }{
		{`{"image":null,"skipPush":true}`, `{"skipPush":true}`},
		{`{"image":"x","buildArgs":null,"platforms":null,"skipPush":null,"tags":null,"target":null,"dockerfile":null,` +
			`"labels":null,"annotations":null,"noCache":null,"pull":null,"context":null,"frontend":null}`, `{"image":"x"}`},
		{`{"image":"x","buildArgs":{"A":null,"B":"","C":"c"}}`, `{"image":"x","buildArgs":{"B":"","C":"c"}}`},
		{`{"image":"x","buildArgs":{"A":"a","A":null}}`, `{"image":"x","buildArgs":{}}`},
		{`{"image":"x","buildArgs":{"BUILDKIT_SYNTAX":null}}`, `{"image":"x","buildArgs":{}}`},
		{`{"image":"x","labels":{"a":null,"b":"","c":"c"}}`, `{"image":"x","labels":{"b":"","c":"c"}}`},
		{`{"image":"x","annotations":{"a":null,"b":"","c":"c"}}`, `{"image":"x","annotations":{"b":"","c":"c"}}`},
		{`{"image":"x","tags":[null,"a:1", null ,"a:2"]}`, `{"image":"x","tags":["a:1","a:2"]}`},
		{`{"image":"x","tags":[` + list(128, `"a:%d"`) + `,null]}`, `{"image":"x","tags":[` + list(128, `"a:%d"`) + `]}`},
		{`{"image":"x","platforms":[null,"linux/amd64"]}`, `{"image":"x","platforms":["linux/amd64"]}`},
		{`{"image":"x","context":{"git":"https://host/a.git","digest":null}}`, `{"image":"x","context":{"git":"https://host/a.git"}}`},
	} {
		got, err := buildconfig.Parse([]byte(tt.config))
		if err != nil {
			t.Errorf("%s: %v", tt.config, err)
			continue
		}
		want, err := buildconfig.Parse([]byte(tt.same))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got.BuildConfig, want.BuildConfig) ||
			len(got.References) != len(want.References) || len(got.Warnings) > 0 {
			t.Errorf("%s: got %+v, want %+v", tt.config, got, want)
		}
	}
}

// TestParseByteOrderMark reads configs with what editors and shells write before them.
func TestParseByteOrderMark(t *testing.T) {
	c, err := buildconfig.Parse([]byte("\ufeff" + `{"image":"x"}`))
	if err != nil || c.Image != "x" || len(c.Warnings) > 0 {
		t.Errorf("got %+v, %v", c, err)
	}
	for name, encode := range map[string]func(text string) []byte{
		"little": func(text string) []byte { return utf16Of(binary.LittleEndian, text) },
		"big":    func(text string) []byte { return utf16Of(binary.BigEndian, text) },
	} {
		for _, mark := range []string{"", "\ufeff"} {
			for _, text := range []string{`{"image":"x"}`, "\n{}", "[]", " ", ""} {
				if mark+text == "" {
					continue
				}
				_, err := buildconfig.Parse(encode(mark + text))
				if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadConfig || !strings.Contains(e.Msg, "UTF-16") {
					t.Errorf("%s-endian %q: %v", name, mark+text, err)
				}
			}
		}
	}
}

func utf16Of(order binary.AppendByteOrder, text string) (b []byte) {
	for _, unit := range utf16.Encode([]rune(text)) {
		b = order.AppendUint16(b, unit)
	}
	return b
}

// TestParseNames checks that every key of a BuildConfig is read, and that the error of a wrong
// type names the key.
func TestParseNames(t *testing.T) {
	objects := map[string]reflect.Type{"": reflect.TypeFor[api.BuildConfig](), "context": reflect.TypeFor[api.ContextSource]()}
	for path, object := range objects {
		for i := range object.NumField() {
			field := object.Field(i)
			key, _, _ := strings.Cut(field.Tag.Get("json"), ",")
			wrong := map[string]string{} // what is wrong, to where
			switch field.Type.Kind() {
			case reflect.Map:
				wrong[`1`], wrong[`"x"`], wrong[`["x"]`] = "", "", ""
				for _, value := range []string{`1.5`, `true`, `["x"]`, `{"VERSION":"x"}`} {
					wrong[`{"A":"x","NONE":null,"VERSION":`+value+`,"Z":"z"}`] = ".VERSION"
				}
				wrong[`{"A.B":"x","a b":{}}`] = ".a b"
				wrong[`{"A":1,"A":"x"}`] = ""
			case reflect.Slice:
				wrong[`false`], wrong[`"x"`], wrong[`""`], wrong[`{"0":"x"}`] = "", "", "", ""
				for _, value := range []string{`0`, `false`, `[]`, `[null]`, `{}`} {
					wrong[`["a:b",null,`+value+`,"a:c"]`] = "[2]"
				}
			case reflect.Bool:
				wrong[`"true"`], wrong[`1`], wrong[`[]`] = "", "", ""
			case reflect.Pointer:
				wrong[`"x"`], wrong[`[]`] = "", ""
			default:
				wrong[`1`], wrong[`true`], wrong[`{}`], wrong[`["x"]`] = "", "", "", ""
			}
			for value, where := range wrong {
				config, at := fmt.Sprintf(`{%q:%s}`, key, value), key+where
				if path != "" {
					config, at = fmt.Sprintf(`{%q:%s}`, path, config), path+"."+at
				}
				_, err := buildconfig.Parse([]byte(config))
				if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadConfig || !strings.Contains(e.Msg, fmt.Sprintf(": %q", at)) {
					t.Errorf("%s: %v, want %q named", config, err, at)
				}
			}
		}
	}
}

// TestParseCase checks that a key in another case is an unknown key, although encoding/json
// would take it.
func TestParseCase(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0", 64)
	c, err := buildconfig.Parse([]byte(`{"image":"x","Image":"y","SkipPush":true,"context":{"digest":"` + digest + `","Git":"https://host/repo.git"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Image != "x" || c.SkipPush || c.Git != nil || c.Context.Git != "" || c.Context.Digest != digest {
		t.Errorf("got %+v", c)
	}
	if len(c.Warnings) != 3 || !strings.Contains(c.Warnings[0], `"Image"`) || !strings.Contains(c.Warnings[1], `"SkipPush"`) || !strings.Contains(c.Warnings[2], `"context.Git"`) {
		t.Errorf("warnings %q", c.Warnings)
	}
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct{ name, config, names string }{
		{"empty", ``, "too early"},
		{"not JSON", `image: x`, "reading"},
		{"a list", `[]`, "not a JSON object"},
		{"cut", `{"image":"x"`, "too early"},
		{"two objects", `{"image":"x"}{"image":"y"}`, "more follows"},
		{"a key twice", `{"image":"x","image":"y"}`, `"image"`},
		{"a key of the context twice", `{"image":"x","context":{"git":"https://host/a.git","git":"https://host/b.git"}}`, `"git"`},
		{"a context of a wrong type", `{"image":"x","context":"https://host/a.git"}`, `"context"`},
		{"no image", `{}`, `"image"`},
		{"empty image", `{"image":""}`, `"image"`},
		{"tags alone", `{"skipPush":true,"tags":["x"]}`, `"tags"`},
		{"image of a wrong type", `{"image":1}`, `"image"`},
		{"upper case repository", `{"image":"Docker.io/Acme/App"}`, "Acme"},
		{"with a scheme", `{"image":"https://ghcr.io/acme/app"}`, `"image"`},
		{"a digest", `{"image":"acme/app@sha256:` + strings.Repeat("0", 64) + `"}`, "digest"},
		{"a newline", `{"image":"acme/app\nx"}`, `"image"`},
		{"a comma", `{"image":"acme/app,ghcr.io/other/app"}`, `"image"`},
		{"a long host", `{"image":"` + strings.Repeat("a.", 127) + `aa/app"}`, "over 255 bytes"},
		{"a long host in a tag", `{"image":"x","tags":["` + strings.Repeat("a.", 1<<17) + `b:5000/app"]}`, "over 640 bytes"},
		{"too many tags", `{"image":"x","tags":[` + list(129, `"a:%d"`) + `]}`, `"tags" has 129 entries, over the limit of 128`},
		{"too many platforms", `{"image":"x","platforms":[` + list(65, `"linux/a%d"`) + `]}`, `"platforms" has 65 entries, over the limit of 64`},
		{"too many empty platforms", `{"image":"x","platforms":[""` + strings.Repeat(`,""`, 64) + `]}`, `"platforms"`},
		{"too many keys", `{"image":"x",` + list(256, `"k%d":0`) + `}`, "256 keys"},
		{"too many keys of the context", `{"image":"x","context":{` + list(257, `"k%d":0`) + `}}`, "256 keys"},
		{"a port with a zero before it", `{"image":"registry:05000/app"}`, "05000"},
		{"a port of zero", `{"image":"registry:0/app"}`, "without zeros"},
		{"a port that is too large", `{"image":"registry:65536/app"}`, "65536"},
		{"a port of many digits", `{"image":"registry:18446744073709556616/app"}`, "1 to 65535"},
		{"such a port in a tag", `{"image":"x","tags":["ghcr.io:0443/app:v1"]}`, `"tags"`},
		{"such a port of an address", `{"image":"[::1]:05000/app"}`, "05000"},
		{"an address in other numbers", `{"image":"127.1:5000/app"}`, "127.1"},
		{"an address as one number", `{"image":"2130706433:5000/app"}`, "2130706433"},
		{"a bad tag", `{"image":"x","tags":["y:"]}`, `"tags"`},
		{"build args of a wrong type", `{"image":"x","buildArgs":{"A":1}}`, `"buildArgs`},
		{"a reserved build arg", `{"image":"x","buildArgs":{"BUILDKIT_SYNTAX":"y"}}`, "BUILDKIT_SYNTAX"},
		{"a reserved build arg in lower case", `{"image":"x","buildArgs":{"buildkit_syntax":"y"}}`, "buildkit_syntax"},
		{"a build arg with =", `{"image":"x","buildArgs":{"A=B":"y"}}`, "A=B"},
		{"platforms of a wrong type", `{"image":"x","platforms":"linux/amd64"}`, `"platforms"`},
		{"an odd platform", `{"image":"x","platforms":["linux/amd64/v1/x"]}`, "linux/amd64/v1/x"},
		{"skipPush of a wrong type", `{"image":"x","skipPush":"yes"}`, `"skipPush"`},
		{"an absolute Dockerfile", `{"image":"x","dockerfile":"/etc/passwd"}`, "/etc/passwd"},
		{"a Dockerfile outside", `{"image":"x","dockerfile":"a/../../b"}`, "a/../../b"},
		{"the context as a Dockerfile", `{"image":"x","dockerfile":"."}`, `"dockerfile"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := buildconfig.Parse([]byte(tt.config))
			if err == nil {
				t.Fatalf("parsed as %+v", c)
			}
			if c != nil {
				t.Error("a config beside an error")
			}
			if e, ok := errors.AsType[*api.Error](err); !ok || e.Code != api.BadConfig || !strings.Contains(e.Msg, tt.names) {
				t.Errorf("error %v, want bad_config with %q", err, tt.names)
			}
		})
	}
}

// list returns n items with commas between them. Each is format with its number.
func list(n int, format string) string {
	items := make([]string, n)
	for i := range items {
		items[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(items, ",")
}

func TestLimits(t *testing.T) {
	c, err := buildconfig.Parse([]byte(`{"image":"x","platforms":[` + list(64, `"linux/a%d"`) + `],"tags":[` + list(128, `"a:%d"`) + `],` + list(253, `"k%d":0`) + `}`))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Platforms) != 64 || len(c.References) != 129 || len(c.Warnings) != 253 {
		t.Errorf("%d platforms, %d references, %d warnings", len(c.Platforms), len(c.References), len(c.Warnings))
	}
}

// TestCost bounds what configs of 1 MiB allocate, how long they take, and how long their
// errors are.
func TestCost(t *testing.T) {
	const size = 1 << 20
	many := func(format string) string { return list(size/(len(format)+4), format) }
	long := func(unit string) string { return strings.Repeat(unit, size/len(unit)) }
	for name, config := range map[string]string{
		"keys":                     `{"image":"x",` + many(`"k%d":0`) + `}`,
		"keys of the context":      `{"image":"x","context":{` + many(`"k%d":0`) + `}}`,
		"platforms":                `{"image":"x","platforms":[` + many(`"linux/a%d"`) + `]}`,
		"tags":                     `{"image":"x","tags":[` + many(`"a:%d"`) + `]}`,
		"build args":               `{"image":"x","buildArgs":{` + many(`"a%d":""`) + `}}`,
		"labels":                   `{"image":"x","labels":{` + many(`"a%d":""`) + `}}`,
		"lists":                    `{"image":"x","y":[[]` + long(",[]") + `]}`,
		"a long unknown key":       `{"image":"x","` + long("a") + `":0}`,
		"a long key twice":         `{"image":"x","` + long("a")[:size/2] + `":0,"` + long("a")[:size/2] + `":0}`,
		"a long image":             `{"image":"` + long("a") + `"}`,
		"a long tag":               `{"image":"x","tags":["` + long("a_") + `a"]}`,
		"a long platform":          `{"image":"x","platforms":["` + long("a") + `"]}`,
		"a platform of features":   `{"image":"x","platforms":["linux(` + long("+a") + `)/amd64"]}`,
		"a platform of white room": `{"image":"x","platforms":["` + long(" ") + `"]}`,
		"a long build arg":         `{"image":"x","buildArgs":{"` + long("=") + `":""}}`,
		"a build arg of no text":   `{"image":"x","buildArgs":{"` + long("a") + `":0}}`,
		"a long Dockerfile":        `{"image":"x","dockerfile":"` + long("../a/") + `"}`,
		"a long digest":            `{"image":"x","context":{"digest":"` + long("a") + `"}}`,
		"a long repository":        `{"image":"x","context":{"git":"https://a/` + long("a/") + `"}}`,
		"a long directory":         `{"image":"x","context":{"git":"https://a/b#c:` + long("a/") + `"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			start := cpuTime(t)
			c, err := buildconfig.Parse([]byte(config))
			took := cpuTime(t) - start
			runtime.ReadMemStats(&after)
			if got := after.TotalAlloc - before.TotalAlloc; got > 32<<20 {
				t.Errorf("%d KiB allocated", got>>10)
			}
			if took > 30*time.Second {
				t.Errorf("took %s", took)
			}
			said := fmt.Sprint(err)
			if c != nil {
				said = strings.Join(c.Warnings, "\n")
			}
			if len(said) > 4<<10 {
				t.Errorf("says %d bytes: %.300s", len(said), said)
			}
		})
	}
}

// cpuTime returns the processor time that this process has used. Unlike the clock, it is the
// same on a busy machine.
func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		t.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

func TestAllow(t *testing.T) {
	for _, tt := range []struct {
		image    string
		tags     string
		prefixes []string
		ok       bool
	}{
		{"acme/app", "", nil, true},
		{"acme/app", "", []string{"docker.io/acme"}, true},
		{"acme/app", "", []string{"docker.io/acme/app"}, true},
		{"acme/app:v1", "", []string{"docker.io/acme/ap"}, false},
		{"acme-evil/app", "", []string{"docker.io/acme"}, false},
		{"ghcr.io/acme/app", "", []string{"docker.io/acme"}, false},
		{"ghcr.io/acme/app", "", []string{"docker.io/acme", "ghcr.io"}, true},
		{"ghcr.io.evil.example/acme/app", "", []string{"ghcr.io"}, false},
		{"ghcr.io:22/acme/app", "", []string{"ghcr.io"}, false},
		{"acme/app", "evil/app", []string{"docker.io/acme"}, false},
		{"GHCR.io/acme/app", "", []string{"ghcr.io/acme"}, true},
		{"ghcr.io/acme/app", "", []string{"GHCR.IO"}, true},
		{"[0:0::1]:5000/acme/app", "", []string{"[::1]:5000/acme"}, true},
		{"ghcr.io:443/acme/app", "", []string{"ghcr.io"}, true}, // the port that ghcr.io means
		{"ghcr.io:80/acme/app", "", []string{"ghcr.io"}, false},
	} {
		config := `{"image":"` + tt.image + `"}`
		if tt.tags != "" {
			config = `{"image":"` + tt.image + `","tags":["` + tt.tags + `"]}`
		}
		c, err := buildconfig.Parse([]byte(config))
		if err != nil {
			t.Fatal(err)
		}
		err = c.Allow(tt.prefixes)
		if (err == nil) != tt.ok {
			t.Errorf("%s under %q: %v", tt.image, tt.prefixes, err)
		}
		if e, ok := errors.AsType[*api.Error](err); err != nil && (!ok || e.Code != api.ImageForbidden) {
			t.Errorf("%s under %q: %v, want image_forbidden", tt.image, tt.prefixes, err)
		}
	}
}

// TestAllowWithin: without a prefix Allow allows everything, and AllowWithin nothing.
func TestAllowWithin(t *testing.T) {
	c, err := buildconfig.Parse([]byte(`{"image":"ghcr.io/acme/app"}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Allow(nil) != nil || c.AllowWithin(nil) == nil || c.AllowWithin([]string{"ghcr.io/acme"}) != nil || c.AllowWithin([]string{"ghcr.io/globex"}) == nil {
		t.Error("the prefixes do not decide")
	}
	if c, err = buildconfig.Parse([]byte(`{"skipPush":true}`)); err != nil || c.AllowWithin(nil) != nil {
		t.Error("what pushes nothing needs a prefix")
	}
}

func TestAllowPlatforms(t *testing.T) {
	for _, tt := range []struct {
		asked     string
		allowed   []string
		preferred string
		want      []string // nil for an error
	}{
		{`"linux/s390x"`, nil, "", []string{"linux/s390x"}},
		{`"linux/arm64"`, []string{"linux/amd64", "linux/arm64"}, "", []string{"linux/arm64"}},
		{`"linux/arm64","linux/s390x"`, []string{"linux/amd64", "linux/arm64"}, "", nil},
		{`"linux/arm"`, []string{"linux/arm/v6"}, "", nil},
		{"", []string{"linux/amd64", "linux/arm64"}, "linux/aarch64", []string{"linux/arm64"}},
		{"", []string{"linux/amd64", "linux/arm64"}, "", []string{"linux/amd64"}},
		{`""`, []string{"linux/amd64", "linux/arm64"}, "linux/s390x", []string{"linux/amd64"}},
		{"", nil, "linux/s390x", []string{}}, // the Solver knows what it is
	} {
		c, err := buildconfig.Parse([]byte(`{"image":"a","platforms":[` + tt.asked + `]}`))
		if err != nil {
			t.Fatal(err)
		}
		err = c.AllowPlatforms(tt.allowed, tt.preferred)
		if (err == nil) != (tt.want != nil) || err == nil && !slices.Equal(c.Platforms, tt.want) {
			t.Errorf("%s of %q, else %q: %q, %v", tt.asked, tt.allowed, tt.preferred, c.Platforms, err)
		}
		if e, ok := errors.AsType[*api.Error](err); err != nil && (!ok || e.Code != api.PlatformForbidden) {
			t.Errorf("%s: %v", tt.asked, err)
		}
	}
}

// TestImage reads the image of configs that are right and of those that are wrong elsewhere.
func TestImage(t *testing.T) {
	for config, want := range map[string]string{
		`{"image":"acme/app:v1"}`:                                "docker.io/acme/app",
		"\ufeff" + ` {"x":[{}],"image":"GHCR.io/acme/app@ "}`:    "",
		"\ufeff" + ` {"x":[{"image":"a"}],"image":"b.io/c/d"}`:   "b.io/c/d",
		`{"platforms":5,"image":"b.io/c","tags":"x"}`:            "b.io/c",
		`{"image":"b.io/c","image":"d.io/e"}`:                    "b.io/c",
		`{"image":"b.io/c"`:                                      "b.io/c", // the rest is not read
		`{"image":"b.io/c`:                                       "",
		`{"image":null}`:                                         "",
		`{"image":""}`:                                           "",
		`{"image":["b.io/c"]}`:                                   "",
		`{"image":"UPPER"}`:                                      "",
		`{"Image":"b.io/c"}`:                                     "",
		`{"skipPush":true}`:                                      "",
		`["image","b.io/c"]`:                                     "",
		"{\x00\"\x00":                                            "",
		"{\"x\":\"\xff\",\"image\":\"b.io/c\"}":                  "", // no UTF-8
		`{"image":"\u0062\u002e\u0069\u006f\u002f\u0063"}`:       "b.io/c",
		`{"image":"b.io/` + strings.Repeat(`\u0063`, 250) + `"}`: "b.io/" + strings.Repeat("c", 250),
		``: "",
	} {
		image, ok := buildconfig.Image([]byte(config))
		if ok != (want != "") || ok && image.Name() != want {
			t.Errorf("%q: %v, %v, want %q", config, image, ok, want)
		}
	}
}

func TestDeny(t *testing.T) {
	own := []string{"registry.example.com/builder/cache", "docker.io/acme/contexts", "Registry:5000/cache", "[fd00::1]:5000/cache", "127.0.0.1:443/cache"}
	for _, tt := range []struct {
		image, tag string
		ok         bool
	}{
		{"registry.example.com/builder/cache", "", false},
		{"registry.example.com/builder/cache:other", "", false},
		{"registry.example.com/builder/cache/below", "", false},
		{"registry.example.com/builder/app", "registry.example.com/builder/cache:tag", false},
		{"Registry.Example.com:443/builder/cache", "", false},
		{"registry.example.com:80/builder/cache", "", false},
		{"acme/contexts", "", false},
		{"registry-1.docker.io/acme/contexts", "", false},
		{"index.docker.io/acme/contexts", "", false},
		{"Registry-1.Docker.io:443/acme/contexts", "", false},
		{"Index.docker.io/acme/contexts", "", false},
		{"registry:5000/cache", "", false},
		{"REGISTRY:5000/cache/below", "", false},
		{"[fd00:0::1]:5000/cache", "", false},
		{"[FD00::0001]:5000/cache", "", false},
		{"127.0.0.1:80/cache", "", false},
		{"[::ffff:7f00:1]:443/cache", "", false},
		{"registry/cache", "", true},
		{"registry.example.com/builder/cached", "", true},
		{"registry.example.com/builder", "", true},
		{"registry.example.com:5000/builder/cache", "", true},
		{"ghcr.io/acme/contexts", "", true},
	} {
		config := `{"image":"` + tt.image + `"}`
		if tt.tag != "" {
			config = `{"image":"` + tt.image + `","tags":["` + tt.tag + `"]}`
		}
		c, err := buildconfig.Parse([]byte(config))
		if err != nil {
			t.Fatal(err)
		}
		err = c.Deny(own)
		if e, ok := errors.AsType[*api.Error](err); (err == nil) != tt.ok || err != nil && (!ok || e.Code != api.ImageForbidden) {
			t.Errorf("%s, %s: %v", tt.image, tt.tag, err)
		}
		if err := c.Deny(nil); err != nil {
			t.Errorf("%s without any: %v", tt.image, err)
		}
	}
}

// TestDenyPorts writes the port of one of the builder's own repositories in every way that a
// number can be written. Each is refused, either as no port or as the builder's repository.
func TestDenyPorts(t *testing.T) {
	for _, port := range []string{"5000", "05000", "005000", "0000000000000000000005000", "5000.", "+5000", "0x1388", "0b1001110001000", "0o11610", "5_000", "5e3", "５０００", "70536", "4294972296", "18446744073709556616"} {
		for _, host := range []string{"registry", "Registry", "REGISTRY", "registry."} {
			image := host + ":" + port + "/cache"
			c, err := buildconfig.Parse([]byte(`{"image":"` + image + `"}`))
			if err == nil {
				err = c.Deny([]string{"registry:5000/cache"})
			}
			if err == nil {
				t.Errorf("%s passed", image)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(`{"image":"acme/app:v1","buildArgs":{"ADDITIONAL_PACKAGE":""},"platforms":[""]}`))
	f.Add([]byte(`{"image":"localhost:5000/app","tags":["x"],"dockerfile":"a/../b"}`))
	f.Add([]byte(`{"skipPush":true,"Image":"x","image":"y"}`))
	f.Add([]byte(`{`))
	f.Add([]byte(`{"image":"x","buildArgs":{"A":null,"B":1,"B":""},"tags":[null,1]}`))
	f.Add([]byte(`{"tags":""}`))
	f.Add([]byte("\ufeff" + `{"skipPush":null,"labels":{"a":1},"context":{"git":null}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := buildconfig.Parse(data)
		if err != nil {
			if c != nil {
				t.Error("a config beside an error")
			}
			return
		}
		for _, ref := range c.References {
			if strings.Contains(strings.SplitN(ref.Name(), "/", 2)[0], ":0") {
				t.Errorf("the port of %q passed", ref)
			}
			again, err := buildconfig.Parse([]byte(`{"image":"` + ref.String() + `"}`))
			if err != nil || again.References[0].String() != ref.String() {
				t.Errorf("%q does not normalise to itself: %v", ref, err)
			}
		}
		for name := range c.BuildArgs {
			if strings.HasPrefix(name, "BUILDKIT_") {
				t.Errorf("reserved build arg %q passed", name)
			}
		}
		if strings.HasPrefix(c.Dockerfile, "/") {
			t.Errorf("Dockerfile %q passed", c.Dockerfile)
		}
	})
}
