package pool

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
	// lookupAge is how long the result of a look-up is taken as current, about as long as
	// Kubernetes' DNS caches an answer. A build waits for a new look-up only if the last
	// one is older than lookupWait. lookupTimeout bounds the look-up of all names.
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
	host, port string // host is empty where there is nothing to look up
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

// lookup returns the addresses of the daemons behind t. srv says that they come from SRV
// records.
//
// SRV records come first: the pods of a StatefulSet have them, with names that outlive the
// pod, and the pod's cache stays with its name. Without SRV records each address of the name
// is a daemon. A name with a single address stays a name, because the address may change.
//
// hadSRV says that there were SRV records before. lookup then fails if the name server does not
// answer the question for them: the addresses in their place would give every daemon a new
// name. For example "tcp://pool:1234" was pool-0 and pool-1 by SRV records. When only the
// question for addresses is answered, the daemons stay pool-0 and pool-1.
func (t target) lookup(ctx context.Context, r resolver, hadSRV bool) (list []string, srv bool, err error) {
	if t.host == "" {
		return []string{t.addr}, false, nil
	}
	// Both questions at once: some name servers never answer the one for SRV records.
	var ips []string
	var asked sync.WaitGroup
	asked.Go(func() { ips, err = r.LookupHost(ctx, t.host) })
	_, records, srvErr := r.LookupSRV(ctx, service, "tcp", t.host)
	asked.Wait()
	for _, record := range records {
		list = append(list, "tcp://"+net.JoinHostPort(strings.TrimSuffix(record.Target, "."), fmt.Sprint(record.Port)))
	}
	srv = len(list) > 0
	switch {
	case srv:
	case err != nil, hadSRV && unlessNotFound(srvErr) != nil:
		return nil, false, fmt.Errorf("looking %q up: %w", t.host, errors.Join(err, unlessNotFound(srvErr)))
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

// unlessNotFound is err, or nil if err says that there is no such record.
func unlessNotFound(err error) error {
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return nil
	}
	return err
}
