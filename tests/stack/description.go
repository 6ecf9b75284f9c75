package stack

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

// Description is what stack.yml says of the builder.
type Description struct {
	Lang        string            `json:"lang"`
	Handler     string            `json:"handler"`
	BuildArgs   map[string]string `json:"build_args"`
	Secrets     []string          `json:"secrets"`
	Labels      map[string]string `json:"labels"`
	Annotations map[string]string `json:"annotations"`
	Environment map[string]string `json:"environment"`
	Requests    map[string]string `json:"requests"`
	Limits      map[string]string `json:"limits"`
	ReadOnly    bool              `json:"readonly_root_filesystem"`
}

// Description reads stack.yml, as faas-cli does where no variable is set.
func (s *Stack) Description() (*Description, error) {
	path := filepath.Join(s.Repo, "stack.yml")
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var services struct {
		Functions map[string]*Description `json:"functions"`
	}
	if err := yaml.Unmarshal(text, &services); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	d := services.Functions["builder"]
	if d == nil {
		return nil, fmt.Errorf("reading %s: it has no function %q", path, "builder")
	}
	for name, value := range d.Environment {
		if _, fallback, ok := strings.Cut(value, ":-"); ok && strings.HasPrefix(value, "${") {
			d.Environment[name] = strings.TrimSuffix(fallback, "}")
		}
	}
	return d, nil
}

// Own is the builder as a function to be built: its folder, put together with the
// template, and the build arguments.
func (s *Stack) Own(ctx context.Context) (dir string, args map[string]string, err error) {
	d, err := s.Description()
	if err != nil {
		return "", nil, err
	}
	if dir, err = s.Assemble("builder", filepath.Join(s.Repo, d.Handler)); err != nil {
		return "", nil, err
	}
	args = GoSettings(ctx)
	maps.Copy(args, d.BuildArgs)
	return dir, args, nil
}
