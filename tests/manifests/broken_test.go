package manifests

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// TestBroken breaks manifests in one place at a time. A promise about what is broken
// fails: none panics, and there is none that nothing breaks.
func TestBroken(t *testing.T) {
	dir := checkout(t)
	breaks := map[string]int{} // how many ways, by the promise that fails
	try := func(name, how string, objects []runtime.Object) {
		defer func() {
			if r := recover(); r != nil {
				t.Errorf("%s: %s: %v", name, how, r)
			}
		}()
		v, err := newVariant(objects)
		if err != nil {
			return
		}
		for _, p := range promisesOf(name) {
			if p.check(name, v) != nil {
				breaks[p.name]++
			}
		}
	}
	for _, name := range []string{"single-rootless", "pool", "nats-three"} {
		manifests, err := render(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		try(name, "nothing is there", nil)
		objects, err := decode(manifests...)
		if err != nil {
			t.Fatal(err)
		}
		for i, text := range manifests {
			var object map[string]any
			if err := yaml.Unmarshal(text, &object); err != nil {
				t.Fatal(err)
			}
			others := slices.Delete(slices.Clone(objects), i, i+1)
			try(name, fmt.Sprint(object["kind"], " is missing"), others)
			breakEach(object, fmt.Sprint(object["kind"]), func(how string) {
				text, err := yaml.Marshal(object)
				if err != nil {
					t.Fatal(err)
				}
				// What cannot be decoded the API server refuses too.
				if broken, err := decode(text); err == nil {
					try(name, how, append(broken, others...))
				}
			})
		}
	}
	if _, err := decode(nil); err == nil {
		t.Error("an empty document is taken for a manifest")
	}
	for _, p := range slices.Concat(promises, natsPromises) {
		if breaks[p.name] == 0 {
			t.Errorf("nothing breaks the promise %q", p.name)
		}
	}
	t.Logf("ways to break each promise: %v", breaks)
}

// breakEach removes each key of an object in turn, and gives it values of other types.
// It calls try each time, and restores the key.
func breakEach(object map[string]any, path string, try func(how string)) {
	for _, key := range slices.Sorted(maps.Keys(object)) {
		was, where := object[key], path+"."+key
		delete(object, key)
		try(where + " is missing")
		for _, other := range []any{"x", []any{}, []any{map[string]any{}}, map[string]any{}} {
			object[key] = other
			try(fmt.Sprintf("%s is %v", where, other))
		}
		object[key] = was
		switch inner := was.(type) {
		case map[string]any:
			breakEach(inner, where, try)
		case []any:
			for i, element := range inner {
				if element, ok := element.(map[string]any); ok {
					breakEach(element, fmt.Sprintf("%s[%d]", where, i), try)
				}
			}
		}
	}
}
