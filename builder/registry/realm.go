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

// checkRealm says whether the token service of the registry host may be asked at
// all, and whether Config.TokenHosts has it for that registry.
func (c *Credentials) checkRealm(host, realm string) (u *url.URL, trusted bool, err error) {
	refuse := func(why string) error {
		return &api.Error{Code: api.RegistryDenied, Msg: fmt.Sprintf("registry %s: its token service %q is refused: %s", host, cutURL(realm), why)}
	}
	u, err = url.Parse(realm)
	if err != nil || u.Hostname() == "" {
		return nil, false, refuse("not a URL")
	}
	if u.User != nil {
		return nil, false, refuse("a user name in a URL")
	}
	service, err := hosts.Parse(u.Host)
	if err != nil {
		return nil, false, refuse(err.Error())
	}
	trusted = c.trusted(host, u.Scheme, service)
	switch {
	case u.Scheme == "https", u.Scheme == "http" && trusted:
	default:
		return nil, false, refuse("not https, and " + notListed(host, u))
	}
	if ip, err := netip.ParseAddr(service.Name); err == nil && !trusted && !hosts.Public(ip) {
		return nil, false, refuse("not a public address, and " + notListed(host, u))
	}
	u.Fragment = ""
	return u, trusted, nil
}

// trusted says whether the operator has listed service for the registry host. An
// entry without a port is for the scheme's own.
func (c *Credentials) trusted(host, scheme string, service hosts.Host) bool {
	registry, own := serverHost(host), hosts.DefaultPort(scheme)
	return c.tokenHosts[TokenHost{registry, service.WithPort(own)}] || c.tokenHosts[TokenHost{registry, service.Without(own)}]
}

// notListed says what token_hosts would have to have.
func notListed(host string, realm *url.URL) string {
	return fmt.Sprintf("token_hosts does not have %q", lower(host)+"="+lower(realm.Host))
}

// maxRealm is how much of a realm an error has, in bytes.
const maxRealm = 200

// cutURL is a realm without what may be secret in it.
func cutURL(s string) string {
	s = redact.URLs(s)
	return strings.ToValidUTF8(s[:min(len(s), maxRealm)], "")
}

// registryClient is for requests to the registry itself, under the same rules.
func (c *Credentials) registryClient(host string) (*http.Client, error) {
	u, trusted, err := c.checkRealm(host, "https://"+host)
	if err != nil {
		return nil, err
	}
	return c.client(host, u, trusted)
}

// client is for one fetch: TLS and address rules differ from registry to
// registry, so nothing of a transport is shared.
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
		// Behind a proxy the address dialled is the proxy's, and whom it may
		// reach is the proxy's own rule. Without one it is the token service's,
		// after every look-up of its name.
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

// roots are the system's CAs and those configured for the registry or for its
// token service. Nil are the system's alone.
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
