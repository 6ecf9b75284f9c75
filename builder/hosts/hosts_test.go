package hosts

import (
	"net/netip"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	for s, want := range map[string]Host{
		"registry":                {"registry", 0},
		"Registry.Example.COM.":   {"registry.example.com", 0},
		"registry.example.com:1":  {"registry.example.com", 1},
		"registry.example.com.:1": {"registry.example.com", 1},
		"registry:65535":          {"registry", 65535},
		"my_registry:5000":        {"my_registry", 5000},
		"1.example":               {"1.example", 0},
		"10.0.0.1:443":            {"10.0.0.1", 443},
		"[::1]":                   {"::1", 0},
		"[0:0::0:1]:5000":         {"::1", 5000},
		"[FD00::A]:5000":          {"fd00::a", 5000},
		"[::ffff:127.0.0.1]:5000": {"127.0.0.1", 5000},
		"[::ffff:7f00:1]":         {"127.0.0.1", 0},
	} {
		h, err := Parse(s)
		if err != nil || h != want {
			t.Errorf("%q: %+v, %v", s, h, err)
			continue
		}
		if again, err := Parse(h.String()); err != nil || again != h {
			t.Errorf("%q: written as %q it is %+v, %v", s, h, again, err)
		}
	}
	for _, s := range []string{
		"", ".", ":5000", "a..b", ".a", "a..", "-a", "a-", "a b", "a/b", "a@b", "a=b", "a,b", "ä.example", "a\x00", "http://a",
		"a:", "a:0", "a:00", "a:05000", "a:000443", "a:65536", "a:99999999999999999999", "a:-1", "a:+5000", "a:5000 ", "a: 5000", "a:5_000",
		"a:0x50", "a:1e3", "a:٥٠٠٠", "a:5000:5000", "a:5000.", "a.:05000",
		"127.1", "127.0.0.01", "127.0.0.1.2", "2130706433", "0x7f.1", "0x7f000001", "example.1", "example.0x", "256.0.0.1",
		"::1", "[]", "[::1", "::1]", "[::1]5000", "[::1]:", "[::1]:05000", "[fe80::1%eth0]", "[fe80::1%25eth0]:80", "[127.0.0.1]", "[a]", "[::1].",
	} {
		if h, err := Parse(s); err == nil || h != (Host{}) {
			t.Errorf("%q: %+v, %v", s, h, err)
		}
	}
}

func TestIsLoopback(t *testing.T) {
	for s, want := range map[string]bool{
		"localhost": true, "LocalHost.:5000": true, "127.0.0.1:5000": true, "127.9.9.9": true, "[::1]:5000": true, "[::ffff:127.0.0.1]": true,
		"localhost.example": false, "127.example": false, "10.0.0.1": false, "[fd00::1]": false, "0.0.0.0": false, "example": false,
	} {
		h, err := Parse(s)
		if err != nil || h.IsLoopback() != want {
			t.Errorf("%q: %v, %v, want %v", s, h.IsLoopback(), err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"Registry.Example.com.:443", "registry:05000", "[::FFFF:10.0.0.1]:80", "127.1:1", "a:65536"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := Parse(s)
		if err != nil {
			if h != (Host{}) {
				t.Errorf("%q: %+v beside an error", s, h)
			}
			return
		}
		if again, err := Parse(h.String()); err != nil || again != h {
			t.Errorf("%q: written as %q it is %+v, %v", s, h, again, err)
		}
		for _, other := range []string{strings.ToUpper(s), strings.ToLower(s)} {
			if o, err := Parse(other); err != nil || o != h {
				t.Errorf("%q is %+v, and %q is %+v, %v", s, h, other, o, err)
			}
		}
		if _, port, ok := strings.Cut(s, ":"); ok && !strings.HasPrefix(s, "[") && strings.HasPrefix(port, "0") {
			t.Errorf("%q was taken", s)
		}
	})
}

func TestPublic(t *testing.T) {
	for addr, want := range map[string]bool{
		"1.1.1.1": true, "8.8.8.8": true, "172.32.0.1": true, "192.169.0.1": true, "100.128.0.1": true,
		"2606:4700:4700::1111": true, "64:ff9b::808:808": true, "2002:808:808::1": true,
		"127.0.0.1": false, "127.8.8.8": false, "0.0.0.0": false, "0.1.2.3": false,
		"10.1.2.3": false, "172.16.0.1": false, "172.31.255.255": false, "192.168.1.1": false,
		"169.254.169.254": false, "100.64.0.1": false, "100.127.255.255": false,
		"224.0.0.1": false, "239.1.1.1": false, "240.0.0.1": false, "255.255.255.255": false,
		"192.0.0.1": false, "198.18.0.1": false, "198.19.255.255": false,
		"::": false, "::1": false, "fe80::1": false, "fe80::1%eth0": false, "fc00::1": false, "fd00:ec2::254": false,
		"fec0::1": false, "ff02::1": false,
		"::ffff:127.0.0.1": false, "::ffff:10.0.0.1": false, "::ffff:8.8.8.8": true, "::127.0.0.1": false,
		"64:ff9b::7f00:1": false, "64:ff9b::a9fe:a9fe": false, "64:ff9b:1::1": false,
		"2002:7f00:1::1": false, "2002:a00:1::1": false,
		"168.63.129.16": false, "168.63.129.17": true, "64:ff9b::a83f:8110": false, "2002:a83f:8110::1": false,
		"192.0.2.1": false, "198.51.100.7": false, "203.0.113.255": false, "2001:db8::1": false, "3fff::1": false,
		"64:ff9b::c0a8:101": false, "64:ff9b::6440:1": false, "64:ff9b::e000:1": false, "2002:c0a8:101::": false,
		"2001::1": false, "2001:200::1": true, "100::1": false, "5f00::1": false, "::ffff:0:7f00:1": false,
	} {
		if got := Public(netip.MustParseAddr(addr)); got != want {
			t.Errorf("Public(%s) = %v", addr, got)
		}
	}
	if Public(netip.Addr{}) {
		t.Error("no address is public")
	}
}

// TestNotPublic tries the first and the last address of each range.
func TestNotPublic(t *testing.T) {
	for _, p := range NotPublic() {
		if p != p.Masked() {
			t.Errorf("%s has bits after its prefix", p)
		}
		first, last := p.Addr(), end(p)
		if Public(first) || Public(last) {
			t.Errorf("%s: Public(%s) = %v, Public(%s) = %v", p, first, Public(first), last, Public(last))
		}
	}
}

func end(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	ip, _ := netip.AddrFromSlice(b)
	return ip
}
