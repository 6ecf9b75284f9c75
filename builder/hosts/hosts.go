// Package hosts knows how the host of a registry or a repository is written, and which
// addresses are public. It asks no resolver.
package hosts

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// Host is a host with or without a port, in one form: two of them are the same host if they
// are equal with ==.
type Host struct {
	Name string // in lower case, without a last dot; an IP address in its shortest form
	Port int    // 1 to 65535, or 0 if none is written
}

var (
	nameForm = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*$`)
	// numberForm matches a last label that makes the C library read the name as an IPv4
	// address. "2130706433" and "0x7f.1" are 127.0.0.1 to it.
	numberForm = regexp.MustCompile(`^([0-9]+|0x[0-9a-f]*)$`)
)

// Parse takes "host", "host:port" and, for IPv6, "[address]" and "[address]:port".
func Parse(s string) (Host, error) {
	var h Host
	name := s
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, ']') {
		var err error
		if h.Port, err = ParsePort(s[i+1:]); err != nil {
			return Host{}, err
		}
		name = s[:i]
	}
	var ok bool
	if h.Name, ok = normal(name); !ok {
		return Host{}, fmt.Errorf("%q is not a host", name)
	}
	return h, nil
}

// normal returns the one form of a name or an address.
func normal(name string) (string, bool) {
	if inner, ok := strings.CutPrefix(name, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		ip, err := netip.ParseAddr(inner)
		return ip.Unmap().String(), ok && err == nil && ip.Is6() && ip.Zone() == ""
	}
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if !nameForm.MatchString(name) {
		return "", false
	}
	if numberForm.MatchString(name[strings.LastIndexByte(name, '.')+1:]) {
		ip, err := netip.ParseAddr(name)
		return ip.String(), err == nil
	}
	return name, true
}

var errPort = errors.New("a port is a number from 1 to 65535, without zeros before it")

// ParsePort takes a decimal number from 1 to 65535, without zeros before it.
func ParsePort(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > 65535 || strconv.Itoa(n) != s {
		return 0, fmt.Errorf("port %q: %w", s, errPort)
	}
	return n, nil
}

// String returns the host in a form that Parse takes.
func (h Host) String() string {
	switch {
	case h.Port != 0:
		return net.JoinHostPort(h.Name, strconv.Itoa(h.Port))
	case strings.Contains(h.Name, ":"):
		return "[" + h.Name + "]"
	}
	return h.Name
}

// WithPort returns h, with port if it has none.
func (h Host) WithPort(port int) Host {
	if h.Port == 0 {
		h.Port = port
	}
	return h
}

// Without returns h without its port, if the port is one of ports.
func (h Host) Without(ports ...int) Host {
	for _, p := range ports {
		if h.Port == p {
			h.Port = 0
		}
	}
	return h
}

// IsLoopback says whether h is this machine by its name or its address: localhost, 127.0.0.1 or
// ::1, or another address of 127.0.0.0/8.
func (h Host) IsLoopback() bool {
	ip, err := netip.ParseAddr(h.Name)
	return h.Name == "localhost" || err == nil && ip.IsLoopback()
}

// DefaultPort returns the default port of http or https, and 0 for any other scheme.
func DefaultPort(scheme string) int {
	switch scheme {
	case "https":
		return 443
	case "http":
		return 80
	}
	return 0
}
