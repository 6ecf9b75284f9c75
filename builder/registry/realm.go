package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	"handler/function/api"
	"handler/function/hosts"
	"handler/function/redact"
)

// checkRealm checks whether the token service at the URL realm may be asked for tokens of
// the registry host, and parses it. trusted is whether Config.TokenHosts has that service
// for that registry. Every error is an *api.Error of code registry_denied.
func (c *Credentials) checkRealm(host, realm string) (u *url.URL, trusted bool, err error) {
	refused := func(why string) error {
		return &api.Error{Code: api.RegistryDenied, Msg: fmt.Sprintf("registry %s: its token service %q is refused: %s", host, cutURL(realm), why)}
	}
	u, err = url.Parse(realm)
	if err != nil || u.Hostname() == "" {
		return nil, false, refused("not a URL")
	}
	if u.User != nil {
		return nil, false, refused("a user name in a URL")
	}
	service, err := hosts.Parse(u.Host)
	if err != nil {
		return nil, false, refused(err.Error())
	}
	trusted = c.trusted(host, u.Scheme, service)
	if u.Scheme != "https" && !(u.Scheme == "http" && trusted) {
		return nil, false, refused("not https, and " + notListed(host, u))
	}
	if ip, err := netip.ParseAddr(service.Name); err == nil && !trusted && !hosts.Public(ip) {
		return nil, false, refused("not a public address, and " + notListed(host, u))
	}
	u.Fragment = ""
	return u, trusted, nil
}

// trusted says whether Config.TokenHosts has service for the registry host. A host without a
// port equals one with the scheme's default port.
func (c *Credentials) trusted(host, scheme string, service hosts.Host) bool {
	registry, port := serverHost(host), hosts.DefaultPort(scheme)
	return c.tokenHosts[TokenHost{registry, service.WithPort(port)}] || c.tokenHosts[TokenHost{registry, service.Without(port)}]
}

// notListed names the entry that token_hosts lacks.
func notListed(host string, realm *url.URL) string {
	return fmt.Sprintf("token_hosts does not have %q", lower(host)+"="+lower(realm.Host))
}

// maxRealm is how many bytes of a realm an error quotes at most.
const maxRealm = 200

// cutURL returns a realm for an error: without what may be secret in it, and not too long.
func cutURL(s string) string {
	s = redact.URLs(s)
	return strings.ToValidUTF8(s[:min(len(s), maxRealm)], "")
}

// registryClient returns a client for requests to the registry itself. The rules for token
// services hold for it too.
func (c *Credentials) registryClient(host string) (*http.Client, error) {
	u, trusted, err := c.checkRealm(host, "https://"+host)
	if err != nil {
		return nil, err
	}
	return c.client(host, u, trusted)
}

// client returns a client for one fetch from the token service of the registry host. Each
// fetch has a transport of its own: which CAs and addresses are good differs from registry
// to registry.
func (c *Credentials) client(host string, realm *url.URL, trusted bool) (*http.Client, error) {
	roots, err := c.roots(host, realm)
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	t := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		ResponseHeaderTimeout:  tokenTimeout,
		MaxResponseHeaderBytes: 64 << 10,
		DisableKeepAlives:      true,
		Proxy:                  http.ProxyFromEnvironment,
	}
	if !trusted {
		// The address that is dialled is checked after each look-up of the name.
		// Behind a proxy it is the proxy's own, and the proxy decides which addresses
		// may be reached.
		proxy, err := http.ProxyFromEnvironment(&http.Request{URL: realm})
		if err != nil {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its token service cannot be reached", host), Err: err}
		}
		if proxy == nil {
			dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error {
				ap, err := netip.ParseAddrPort(address)
				if err != nil || !hosts.Public(ap.Addr()) {
					return errAddress
				}
				return nil
			}
		}
	}
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, nil
}

var errAddress = errors.New("not a public address")

// roots returns the system's CAs with those configured for the registry host or for its
// token service, or nil if none are configured: that stands for the system's.
func (c *Credentials) roots(host string, realm *url.URL) (*x509.CertPool, error) {
	var pool *x509.CertPool
	for _, h := range []string{serverHost(host), serverHost(realm.Host)} {
		name := c.caFiles[h]
		if name == "" {
			continue
		}
		pem, err := os.ReadFile(name)
		if err != nil {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its CA file cannot be read", host), Err: err}
		}
		if pool == nil {
			if pool, err = x509.SystemCertPool(); err != nil {
				pool = x509.NewCertPool()
			}
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, &api.Error{Code: api.RegistryFailed, Msg: fmt.Sprintf("registry %s: its CA file holds no certificate", host), Err: fmt.Errorf("reading %q: no PEM certificate", name)}
		}
	}
	return pool, nil
}
