package buildkit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"handler/function/hosts"
)

const (
	// lookupAge is for how long the daemons that a name has are taken as known:
	// about as long as Kubernetes' DNS has an answer cached. A build waits for a
	// look-up only where the last one is older than lookupWait.
	lookupAge     = 5 * time.Second
	lookupWait    = time.Minute
	lookupTimeout = 2 * time.Second
)

// service is the port's name in the records of a headless Service.
const service = "buildkit"

// A resolver is *net.Resolver.
type resolver interface {
	LookupSRV(ctx context.Context, service, proto, name string) (string, []*net.SRV, error)
	LookupHost(ctx context.Context, host string) ([]string, error)
}

// target is one entry of Config.Addrs.
type target struct {
	addr       string
	host, port string // empty where there is nothing to look up
}

func parseTarget(addr string) (target, error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok && path != "" {
		return target{addr: addr}, nil
	}
	u, err := url.Parse(addr)
	if err != nil {
		return target{}, err
	}
	if u.Scheme != "tcp" || u.Hostname() == "" || u.Port() == "" || u.Host != strings.TrimPrefix(addr, "tcp://") {
		return target{}, errors.New("not of the form tcp://host:port or unix:///path")
	}
	if _, err := hosts.ParsePort(u.Port()); err != nil {
		return target{}, err
	}
	t := target{addr: addr, host: u.Hostname(), port: u.Port()}
	if _, err := netip.ParseAddr(t.host); err == nil || t.host == "localhost" {
		t.host = ""
	}
	return t, nil
}

// lookup returns the addresses of the daemons behind t.
//
// The pods of a StatefulSet have SRV records with names that outlive them, and a
// cache that stays with the name; those come first. Without them each address of
// the name is a daemon, and a name with one address is one that may move. had says
// that there were such records before: then no answer is not that there are none,
// and every daemon would change its name.
func (t target) lookup(ctx context.Context, r resolver, had bool) (list []string, srv bool, err error) {
	if t.host == "" {
		return []string{t.addr}, false, nil
	}
	// At once: there are name servers that leave a question about SRV unanswered.
	var ips []string
	var asked sync.WaitGroup
	asked.Go(func() { ips, err = r.LookupHost(ctx, t.host) })
	_, records, srvErr := r.LookupSRV(ctx, service, "tcp", t.host)
	asked.Wait()
	for _, r := range records {
		list = append(list, "tcp://"+net.JoinHostPort(strings.TrimSuffix(r.Target, "."), fmt.Sprint(r.Port)))
	}
	srv = len(list) > 0
	switch {
	case srv:
	case err != nil, had && temporary(srvErr) != nil:
		return nil, false, fmt.Errorf("looking %q up: %w", t.host, errors.Join(err, temporary(srvErr)))
	case len(ips) == 1:
		return []string{t.addr}, false, nil
	default:
		for _, ip := range ips {
			list = append(list, "tcp://"+net.JoinHostPort(ip, t.port))
		}
	}
	slices.Sort(list)
	return slices.Compact(list), srv, nil
}

// temporary is err unless it says that there is no such record.
func temporary(err error) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return nil
	}
	return err
}
