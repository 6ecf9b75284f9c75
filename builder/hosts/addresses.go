package hosts

import (
	"net/netip"
	"slices"
)

// inIPv4 are the ranges of IPv4 that are not public: those of IANA's registry of special
// addresses, and one public address at which a cloud has its metadata.
var inIPv4 = prefixes(
	"0.0.0.0/8",
	"10.0.0.0/8",
	"100.64.0.0/10", // carrier-grade NAT
	"127.0.0.0/8",
	"168.63.129.16/32", // Azure's metadata and DNS
	"169.254.0.0/16",   // link local, and most clouds' metadata
	"172.16.0.0/12",
	"192.0.0.0/24", // protocol assignments, Oracle's metadata among them
	"192.0.2.0/24", // documentation
	"192.168.0.0/16",
	"198.18.0.0/15",   // benchmarks
	"198.51.100.0/24", // documentation
	"203.0.113.0/24",  // documentation
	"224.0.0.0/4",     // multicast
	"240.0.0.0/4",
)

// inIPv6 are the ranges of IPv6 that are not public, but for those whose addresses have an
// IPv4 address in them.
var inIPv6 = prefixes(
	"::/96",           // unspecified, loopback, and a deprecated form of IPv4 addresses
	"::ffff:0:0:0/96", // translated IPv4 addresses
	"64:ff9b:1::/48",  // local NAT64
	"100::/64",        // discarded
	"2001::/23",       // protocol assignments, Teredo among them
	"2001:db8::/32",   // documentation
	"3fff::/20",       // documentation
	"5f00::/16",       // segment routing
	"fc00::/7",
	"fe80::/10",
	"fec0::/10", // site local, deprecated
	"ff00::/8",  // multicast
)

// carrying are the ranges of IPv6 whose addresses have an IPv4 address after the prefix. They
// are public if the IPv4 address is.
var carrying = prefixes(
	"64:ff9b::/96", // NAT64
	"2002::/16",    // 6to4
)

func prefixes(list ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range list {
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

var notPublic = func() []netip.Prefix {
	list := slices.Concat(inIPv4, inIPv6)
	for _, outer := range carrying {
		for _, inner := range inIPv4 {
			b, v4 := outer.Addr().As16(), inner.Addr().As4()
			copy(b[outer.Bits()/8:], v4[:])
			list = append(list, netip.PrefixFrom(netip.AddrFrom16(b), outer.Bits()+inner.Bits()))
		}
	}
	return list
}()

// NotPublic returns all ranges in which no address is public. Those of IPv4 are there as IPv4,
// and not as IPv4 addresses that are mapped to IPv6: on the wire these are IPv4.
func NotPublic() []netip.Prefix { return slices.Clone(notPublic) }

// Public reports whether ip is public: whether anybody on the internet could have it.
func Public(ip netip.Addr) bool {
	ip = ip.Unmap().WithZone("")
	return ip.IsValid() && !slices.ContainsFunc(notPublic, func(p netip.Prefix) bool { return p.Contains(ip) })
}
