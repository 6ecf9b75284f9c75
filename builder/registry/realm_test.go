package registry

import (
	"encoding/pem"
	"path/filepath"
	"strings"
	"testing"

	"handler/function/api"
)

func TestRealm(t *testing.T) {
	for _, tt := range []struct {
		realm string
		hosts []string
		ok    bool
	}{
		{"https://auth.example.com/token", nil, true},
		{"https://8.8.8.8/token", nil, true},
		{"http://auth.example.com/token", nil, false},
		{"http://auth.example.com/token", []string{"registry.example.com=auth.example.com"}, true},
		{"http://AUTH.example.com./token", []string{"Registry.example.com.=auth.Example.com"}, true},
		{"http://auth.example.com/token", []string{"registry.example.com:443=auth.example.com"}, true},
		{"http://auth.example.com:80/token", []string{"registry.example.com=auth.example.com"}, true},
		{"http://auth.example.com/token", []string{"registry.example.com=auth.example.com:80"}, true},
		{"http://auth.example.com:81/token", []string{"registry.example.com=auth.example.com:81"}, true},
		{"http://registry.example.com/token", []string{"registry.example.com"}, true},
		{"https://127.0.0.1:5001/token", []string{"registry.example.com=127.0.0.1:5001"}, true},
		{"https://[::1]/token", []string{"registry.example.com=[0:0::1]"}, true},
		{"https://[::ffff:127.0.0.1]/token", []string{"registry.example.com=127.0.0.1"}, true},

		// Of another registry, or at another port.
		{"http://auth.example.com/token", []string{"auth.example.com"}, false},
		{"http://auth.example.com/token", []string{"registry.example.com"}, false},
		{"http://auth.example.com/token", []string{"other.example.com=auth.example.com"}, false},
		{"http://auth.example.com/token", []string{"registry.example.com:80=auth.example.com", "registry.example.com:5000=auth.example.com"}, false},
		{"http://auth.example.com/token", []string{"example.com=auth.example.com", "x.registry.example.com=auth.example.com"}, false},
		{"http://auth.example.com:81/token", []string{"registry.example.com=auth.example.com"}, false},
		{"http://auth.example.com:443/token", []string{"registry.example.com=auth.example.com"}, false},
		{"http://auth.example.com:82/token", []string{"registry.example.com=auth.example.com:81"}, false},
		{"http://auth.example.com/token", []string{"registry.example.com=auth.example.com:443"}, false},
		{"https://10.0.0.1:80/token", []string{"registry.example.com=10.0.0.1"}, false},
		{"https://10.0.0.1:5000/token", []string{"registry.example.com=10.0.0.1"}, false},
		{"https://x.auth.internal/token", []string{"registry.example.com=auth.internal"}, true}, // public, as far as is known
		{"http://x.auth.internal/token", []string{"registry.example.com=auth.internal"}, false},

		{"https://127.0.0.1/token", nil, false},
		{"https://[::1]/token", nil, false},
		{"https://169.254.169.254/latest", nil, false},
		{"https://168.63.129.16/machine", nil, false},
		{"https://[64:ff9b::a9fe:a9fe]/latest", nil, false},
		{"https://user:topsecret@auth.example.com/token", []string{"registry.example.com=auth.example.com"}, false},
		{"https://8.8.8.8:0443/token", nil, false},
		{"https://8.8.8.8:/token", nil, false},
		{"https://8.8.8.8:70000/token", nil, false},
		{"https://127.1/token", nil, false},
		{"https://2130706433/token", nil, false},
		{"https://0x7f000001/token", nil, false},
		{"file:///etc/passwd", nil, false},
		{"ftp://auth.example.com/", []string{"registry.example.com=auth.example.com"}, false},
		{"/token", nil, false},
		{"", nil, false},
		{"https://", nil, false},
		{"https://a b/", nil, false},
	} {
		_, _, err := New(Config{TokenHosts: tokenHosts(t, tt.hosts...)}).checkRealm("registry.example.com", tt.realm)
		if (err == nil) != tt.ok {
			t.Errorf("%q with %q: %v", tt.realm, tt.hosts, err)
		}
		if err != nil && strings.Contains(err.Error(), "topsecret") {
			t.Errorf("the error holds a password: %v", err)
		}
		if err != nil && api.AsError(err).Code != api.RegistryDenied {
			t.Errorf("%q: code %s", tt.realm, api.AsError(err).Code)
		}
	}
}

// TestRealmHub checks that token_hosts takes any of Docker Hub's names.
func TestRealmHub(t *testing.T) {
	for _, name := range []string{"docker.io", "index.docker.io", "registry-1.docker.io", "Docker.IO:443"} {
		c := New(Config{TokenHosts: tokenHosts(t, name+"=10.0.0.1")})
		if _, trusted, err := c.checkRealm("registry-1.docker.io", "http://10.0.0.1/token"); err != nil || !trusted {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseTokenHost(t *testing.T) {
	for _, s := range []string{
		"", "=", "a=", "=a", "a=b=c", "a:05000", "a=b:05000", "a:0=b", "a=b:", "a=http://b", "http://a", "a/b=c", "a=127.1", "a=b:65536", "a =b",
	} {
		if h, err := ParseTokenHost(s); err == nil || h != (TokenHost{}) {
			t.Errorf("%q: %+v, %v", s, h, err)
		}
	}
}

func tokenHosts(t *testing.T, entries ...string) []TokenHost {
	t.Helper()
	var list []TokenHost
	for _, e := range entries {
		h, err := ParseTokenHost(e)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, h)
	}
	return list
}

// TestTokenPrivateAddress checks that a name with a private address is refused when it is
// dialled, after the look-up that counts.
func TestTokenPrivateAddress(t *testing.T) {
	s := newTokenServer(t, true, text(`{"token":"tok"}`))
	_, port, _ := strings.Cut(s.host(), ":")
	c := New(Config{})
	_, err := c.Grant(nil).Token(t.Context(), TokenRequest{Host: "registry.example.com", Realm: "https://localhost:" + port + "/token"})
	if e := api.AsError(err); err == nil || e.Code != api.RegistryDenied || !strings.Contains(e.Msg, "not a public address") {
		t.Errorf("error %v", err)
	}
	if n := s.requests.Load(); n != 0 {
		t.Errorf("%d requests came", n)
	}
}

func TestTokenCA(t *testing.T) {
	s := newTokenServer(t, true, text(`{"token":"tok"}`))
	ca := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"),
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	trusted := tokenHosts(t, "own.example.com="+s.host(), "docker.io="+s.host(), "other.example.com="+s.host(), "broken.example.com="+s.host())
	c := New(Config{TokenHosts: trusted, CAFiles: map[string]string{"own.example.com": ca, "docker.io": ca, "broken.example.com": writeFile(t, ca+"x", "no PEM")}})
	for host, ok := range map[string]bool{
		"own.example.com": true, "registry-1.docker.io": true, "other.example.com": false, "broken.example.com": false,
	} {
		tok, err := c.Grant(nil).Token(t.Context(), TokenRequest{Host: host, Realm: s.URL})
		if (err == nil) != ok {
			t.Errorf("%s: %+v, %v", host, tok, err)
		}
	}
}
