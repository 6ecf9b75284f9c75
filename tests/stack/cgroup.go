package stack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Where cgroups are, of version 2 and of version 1's memory controller.
const (
	cgroupRoot       = "/sys/fs/cgroup"
	memoryCgroupRoot = cgroupRoot + "/memory"
)

// memoryCgroup makes a cgroup whose processes are killed at limit bytes, and returns
// its directory.
func memoryCgroup(name string, limit int64) (dir string, err error) {
	bytes := strconv.FormatInt(limit, 10)
	dir, settings := filepath.Join(memoryCgroupRoot, name), map[string]string{"memory.limit_in_bytes": bytes, "memory.swappiness": "0"}
	if _, err := os.Stat(filepath.Join(memoryCgroupRoot, "memory.limit_in_bytes")); errors.Is(err, fs.ErrNotExist) {
		dir, settings = filepath.Join(cgroupRoot, name), map[string]string{"memory.max": bytes, "memory.swap.max": "0"}
		if err := os.WriteFile(filepath.Join(cgroupRoot, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
			return "", fmt.Errorf("having cgroups limit memory: %w", err)
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", fmt.Errorf("making a memory cgroup: %w", err)
	}
	for file, value := range settings {
		err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
		if errors.Is(err, fs.ErrNotExist) && file == "memory.swap.max" {
			continue // this kernel counts no swap
		}
		if err != nil {
			removeCgroups(name)
			return "", fmt.Errorf("limiting a cgroup's memory: %w", err)
		}
	}
	return dir, nil
}

// anonymous is the memory of a cgroup that is no file's, in bytes.
func anonymous(cgroup string) (int64, error) {
	stat, err := os.ReadFile(filepath.Join(cgroup, "memory.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(stat)) {
		// Version 1's name, and version 2's.
		if name, value, _ := strings.Cut(strings.TrimSpace(line), " "); name == "total_rss" || name == "anon" {
			return strconv.ParseInt(value, 10, 64)
		}
	}
	return 0, fmt.Errorf("reading the memory of cgroup %q: neither total_rss nor anon", cgroup)
}

// removeCgroups removes what a killed runc or function left of a tree of cgroups,
// in every hierarchy. Only empty cgroups can be removed, and only by rmdir.
func removeCgroups(name string) {
	v1, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	v2, _ := filepath.Glob("/sys/fs/cgroup/" + name)
	for _, top := range append(v1, v2...) {
		var dirs []string
		filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			syscall.Rmdir(dirs[i])
		}
	}
}
