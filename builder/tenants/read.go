package tenants

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"handler/function/hosts"
	"handler/function/repository"
	"handler/function/signature"
)

// shared is the value of daemons for the pool that has no name.
const shared = "shared"

// File is a file of tenants.
type File struct {
	Name string // for problems
	Data []byte
}

// Installation is what the files have to agree with.
type Installation struct {
	PayloadSecret []byte
	AllowedImages []string // prefixes that hold all images of tenants; empty holds every one
	Daemons       []string // addresses of the shared pool
}

// Read reads the files of one installation. Tenants, pools and operators of all files together
// make the Set. The defaults of a file are for its own tenants.
//
// Its error joins one error for each problem, and says how many more there are. Each has the
// file, the line and the keys, and none has the value of a secret:
//
//	tenants: line 12: tenants.acme.keys[1].secret: it has 8 bytes: a key has 16 or more
func Read(files []File, in Installation) (*Set, error) {
	r := &reader{
		allowed:  in.AllowedImages,
		set:      &Set{File: true, Pools: make(map[string][]string)},
		places:   make(map[thing]string),
		problems: &problems{},
	}
	if keys, _ := signature.ParseKeys(in.PayloadSecret); len(keys) > 0 {
		r.root = keys[0]
	}
	for _, addr := range in.Daemons {
		r.places[thing{"daemon", sameDaemon(addr)}] = "buildkit_addr"
	}
	for _, f := range files {
		r.file(f)
	}
	r.checkPools()
	r.checkImages()
	if len(r.set.Tenants) == 0 && len(r.problems.list) == 0 {
		return nil, fmt.Errorf("%s: there is no tenant in it", files[0].Name)
	}
	if err := r.problems.err(); err != nil {
		return nil, err
	}
	slices.SortFunc(r.set.Tenants, func(a, b *Tenant) int { return cmp.Compare(a.Name, b.Name) })
	r.set.index()
	return r.set, nil
}

// reader reads files into a Set.
type reader struct {
	root     []byte // the payload secret's first line; nil if there is none
	allowed  []string
	set      *Set
	places   map[thing]string // where each thing is that may be there only once
	pools    []value          // that tenants name
	images   []image
	problems *problems
}

// thing is what all files together may have only once. Example: an id.
type thing struct{ kind, text string }

// image is an entry of images.
type image struct {
	value
	prefix string
	tenant *Tenant
}

// once adds a problem if text is there already.
func (r *reader) once(v value, kind, text string) bool {
	t := thing{kind, text}
	if place, ok := r.places[t]; ok {
		v.wrong("the same %s is in %s", kind, place)
		return false
	}
	r.places[t] = v.place()
	return true
}

// file reads one file. It reads version and defaults first, wherever they are in the file.
func (r *reader) file(f File) {
	top, ok := parse(f.Name, f.Data, r.problems)
	if !ok {
		return
	}
	var values struct{ version, defaults, pools, tenants, operator value }
	into := func(to *value) func(value) { return func(v value) { *to = v } }
	has := top.object(map[string]func(value){
		"version":  into(&values.version),
		"defaults": into(&values.defaults),
		"pools":    into(&values.pools),
		"tenants":  into(&values.tenants),
		"operator": into(&values.operator),
	})
	top.need(has, "version")
	if has["version"] {
		if n, ok := values.version.scalar("1", "!!int"); ok && n != "1" {
			// Nothing is known of the keys of another version.
			values.version.wrong("want 1, the only version there is")
			return
		}
	}
	base := Tenant{Weight: 1}
	if has["defaults"] {
		values.defaults.object(r.limits(&base))
	}
	if has["pools"] {
		r.readPools(values.pools)
	}
	if has["tenants"] {
		r.readTenants(values.tenants, base)
	}
	if has["operator"] {
		v := values.operator
		v.secret = true
		v.need(v.object(map[string]func(value){"keys": func(v value) {
			r.set.Operators = append(r.set.Operators, r.keys(v)...)
		}}), "keys")
	}
}

func (r *reader) readTenants(v value, base Tenant) {
	v.entries(func(key, one value) {
		name := key.node.Value
		if !nameForm.MatchString(name) {
			key.wrong("a tenant's name has 1 to 63 lower-case letters, digits, -, _ and ., and begins and ends with a letter or a digit")
			return
		}
		key, one = key.at(name), one.at(name)
		if !r.once(key, "name", name) {
			return
		}
		t := base
		t.Name = name
		r.tenant(one, &t)
		r.set.Tenants = append(r.set.Tenants, &t)
	})
}

// tenantID is the id of a tenant. It is in salts, tags and records.
func (r *reader) tenantID(v value) string {
	id := v.id()
	switch {
	case id == DefaultID:
		v.wrong("%q is the id of the only tenant where there is no file", id)
	case id != "":
		r.once(v, "id", id)
	}
	return id
}

func (r *reader) hosts(v value) []string {
	list := []string{}
	v.each(func(one value, text string) {
		h, err := host(text)
		if err != nil {
			one.wrong("%v", err)
			return
		}
		if r.once(one, "host", h) {
			list = append(list, h)
		}
	})
	return list
}

func (r *reader) readImages(v value, t *Tenant) []string {
	list := []string{}
	v.each(func(one value, text string) {
		prefix, err := repository.ParsePrefix(text)
		if err != nil {
			one.wrong("%v", err)
			return
		}
		// docker reads docker.io/acme as docker.io/library/acme. The host has other names.
		if repository.Host(text) == repository.Hub && !repository.Within(prefix, text) {
			_, account, _ := strings.Cut(text, "/")
			one.wrong("%q is the image %q; the account is %q", text, prefix, account)
			return
		}
		if len(r.allowed) > 0 && !slices.ContainsFunc(r.allowed, func(a string) bool { return repository.Within(prefix, a) }) {
			one.wrong("%q is outside allowed_images", prefix)
			return
		}
		r.images = append(r.images, image{one, prefix, t})
		list = append(list, prefix)
	})
	return some(v, "images", list)
}

// checkImages wants no two tenants to have an image in common. Two hosts count as the same if
// they may be one. Two prefixes overlap only if one is above the other: acme and acme/app, but
// not acme/a and acme/b.
func (r *reader) checkImages() {
	var above repository.Index[image]
	// Shorter ones first: an equal one of another tenant is found before it is added.
	slices.SortStableFunc(r.images, func(a, b image) int {
		return cmp.Compare(strings.Count(a.prefix, "/"), strings.Count(b.prefix, "/"))
	})
	for _, i := range r.images {
		if other, ok := above.MayBeWithin(i.prefix); ok && other.tenant != i.tenant {
			i.wrong("%q overlaps %q of tenant %s in %s", i.prefix, other.prefix, other.tenant.Name, other.place())
			continue
		}
		above.Add(i.prefix, i)
	}
}

// pool is the pool that daemons names.
func (r *reader) pool(v value) string {
	name := v.id()
	if name == "" || name == shared {
		return ""
	}
	r.pools = append(r.pools, v)
	return name
}

// checkPools wants every pool that a tenant names to be there. It may be in a later file.
func (r *reader) checkPools() {
	for _, v := range r.pools {
		if _, ok := r.set.Pools[v.node.Value]; !ok {
			v.wrong("there is no such pool under pools")
		}
	}
}

func (r *reader) readPools(v value) {
	v.entries(func(key, one value) {
		name := key.node.Value
		if !idForm.MatchString(name) || name == shared {
			key.wrong("the name of a pool has 1 to 40 lower-case letters, digits and -, does not begin with -, and is not %q", shared)
			return
		}
		key, one = key.at(name), one.at(name)
		if !r.once(key, "pool", name) {
			return
		}
		list := []string{}
		one.each(func(d value, addr string) {
			if err := daemon(addr); err != nil {
				d.wrong("%v", err)
			} else if r.once(d, "daemon", sameDaemon(addr)) {
				list = append(list, addr)
			}
		})
		r.set.Pools[name] = some(one, "daemons", list)
	})
}

// sameDaemon is equal for two addresses of one daemon, however its host is written.
func sameDaemon(addr string) string {
	host, ok := strings.CutPrefix(addr, "tcp://")
	h, err := hosts.Parse(host)
	if !ok || err != nil {
		return addr
	}
	return "tcp://" + h.String()
}

// daemon wants an address as buildkit_addr has it.
func daemon(text string) error {
	if path, ok := strings.CutPrefix(text, "unix://"); ok && strings.HasPrefix(path, "/") {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "tcp" || u.Hostname() == "" || u.Port() == "" || text != "tcp://"+u.Host {
		return fmt.Errorf("%q is not an address such as tcp://buildkitd:1234 or unix:///path", text)
	}
	_, err = hosts.ParsePort(u.Port())
	return err
}
