package sources

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/distribution/reference"
)

func TestIn(t *testing.T) {
	image := func(ref string) *Denial {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			t.Fatal(err)
		}
		return &Denial{Image: reference.TagNameOnly(named)}
	}
	const digest = "@sha256:0123456789012345678901234567890123456789012345678901234567890123"
	for _, tt := range []struct {
		name       string
		denial     *Denial
		dockerfile string
		args       map[string]string
		line       int32 // zero is none
	}{
		{"a mount", image("docker.io/library/x:1"), "FROM a\nRUN --mount=type=bind,from=x:1,target=/m ls\n", nil, 2},
		{"the second mount", image("x"), "FROM a\nRUN --mount=type=cache,target=/c --mount=from=x,target=/m ls\n", nil, 2},
		{"a mount over lines", image("x"), "FROM a\nRUN --mount=type=bind,\\\nfrom=x,target=/m ls\n", nil, 2},
		{"a mount of another tag", image("x:2"), "FROM a\nRUN --mount=from=x:1,target=/m ls\n", nil, 0},
		{"a digest", image("x" + digest), "FROM a\nRUN --mount=from=x:1" + digest + ",target=/m ls\n", nil, 2},
		{"a digest of another name", image("x" + digest), "FROM a\nRUN --mount=from=y" + digest + ",target=/m ls\n", nil, 0},
		{"an address", &Denial{Address: "https://h/f"}, "FROM a\nADD https://h/e https://h/f /d\n", nil, 2},
		{"another address", &Denial{Address: "https://h/f"}, "FROM a\nADD https://h/g /d\n", nil, 0},
		{"a repository", &Denial{Address: "git://h/org/repo#main"}, "FROM a\nADD https://h/org/repo.git#main /d\n", nil, 2},
		{"another ref", &Denial{Address: "git://h/org/repo#main"}, "FROM a\nADD https://h/org/repo.git#v1 /d\n", nil, 0},
		{"COPY of a file of that name", &Denial{Address: "https://h/f"}, "FROM a\nCOPY https://h/f /d\n", nil, 0},
		{"a variable", &Denial{Address: "https://h/f-2"}, "FROM a\nARG V=1\nENV V=2\nADD https://h/f-${V} /d\n", nil, 4},
		{"a build argument", &Denial{Address: "https://h/f-3"}, "FROM a\nARG V=1\nADD https://h/f-$V /d\n", map[string]string{"V": "3"}, 3},
		{"a global argument", &Denial{Address: "https://h/f-1"}, "ARG V=1\nFROM a\nARG V\nADD https://h/f-$V /d\n", nil, 4},
		{"a global argument that is not taken", &Denial{Address: "https://h/f-1"}, "ARG V=1\nFROM a\nADD https://h/f-$V /d\n", nil, 0},
		{"an argument of another stage", &Denial{Address: "https://h/f-1"}, "FROM a\nARG V=1\nFROM b\nADD https://h/f-$V /d\n", nil, 0},
		{"a long value", &Denial{Address: "https://h/f-1"}, "FROM a\nARG V=1\nENV V=" + strings.Repeat("x", maxValue+1) + "\nADD https://h/f-$V /d\n", nil, 0},
		{"a replacement", &Denial{Address: "https://h/f-2"}, "FROM a\nARG V=1\nADD https://h/f-${V/1/2} /d\n", nil, 0},
		{"a long Dockerfile", &Denial{Address: "https://h/f"}, "FROM a\nADD https://h/f /d\n" + strings.Repeat("#\n", maxText/2), nil, 0},
		{"no Dockerfile", image("x"), "", nil, 0},
		{"a broken Dockerfile", image("x"), "RUN <<EOF\n", nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			at := tt.denial.In("Dockerfile", []byte(tt.dockerfile), tt.args)
			if at == nil {
				if tt.line != 0 {
					t.Errorf("not found, want line %d", tt.line)
				}
				return
			}
			if got := at.Ranges[0].Start.Line; got != tt.line || at.Info.Filename != "Dockerfile" {
				t.Errorf("%s:%d, want line %d", at.Info.Filename, got, tt.line)
			}
		})
	}
}

// TestInBombs has variables that grow with each line, and many of them.
func TestInBombs(t *testing.T) {
	var many strings.Builder
	for i := range 5_000 {
		fmt.Fprintf(&many, "ENV V%d=$V%d\n", i+1, i)
	}
	for name, lines := range map[string]string{
		"doubled":  "ENV A=xxxxxxxx\n" + strings.Repeat("ENV A=$A$A\n", 30),
		"replaced": "ENV A=" + strings.Repeat("x", maxValue) + "\n" + strings.Repeat("ENV B=${A//x/${A//x/$A}}\n", 10),
		"default":  "ARG A=xxxxxxxx\n" + strings.Repeat("ARG A=${A:-$A}${A:+$A}$A\n", 30),
		"argument": strings.Repeat("ARG G\nENV B="+strings.Repeat("$G", maxWord/2)+"\n", 30),
		"long":     "ENV A=" + strings.Repeat("x", maxValue) + "\nADD " + strings.Repeat("$A", 20_000) + " /\n",
		"many":     many.String(),
	} {
		t.Run(name, func(t *testing.T) {
			d := &Denial{Address: "https://h/f"}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			at := d.In("Dockerfile", []byte("FROM a\n"+lines+"ADD https://h/f /\n"), map[string]string{"G": strings.Repeat("x", 1<<20)})
			runtime.ReadMemStats(&after)
			if at == nil {
				t.Error("the line is not found")
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 1<<30 {
				t.Errorf("%d MiB were allocated", took>>20)
			}
		})
	}
}
