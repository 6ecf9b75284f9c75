package sources

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	gateway "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	sourcepolicy "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	digest "github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"handler/function/api"
	"handler/function/buildconfig"
	"handler/function/solve"
)

var told = digest.FromString("told")

// registries are what the function knows of registries, and what they answer.
type registries struct {
	named  map[string]bool
	public bool  // there are no credentials for any of them
	broken error // of the credentials

	mu      sync.Mutex
	asked   []string // references, with "!" before those that the operator named
	refuses error
	wait    chan struct{} // closed when an answer may come; nil is at once
}

func (r *registries) Names(host string) (bool, error) { return r.named[host], r.broken }

func (r *registries) Serves(string) (bool, error) { return !r.public, r.broken }

func (r *registries) Ask(ctx context.Context, ref reference.Named, named bool, platform *ocispecs.Platform) (digest.Digest, error) {
	mark := ""
	if named {
		mark = "!"
	}
	r.mu.Lock()
	asked := mark + ref.String()
	if platform != nil {
		asked += " " + platforms.FormatAll(*platform)
	}
	r.asked = append(r.asked, asked)
	r.mu.Unlock()
	if r.wait != nil {
		select {
		case <-r.wait:
		case <-ctx.Done():
			return "", &api.Error{Code: api.RegistryFailed, Msg: "canceled"}
		}
	}
	if d, ok := ref.(reference.Digested); ok && r.refuses == nil {
		return d.Digest(), nil
	}
	return told, r.refuses
}

func (r *registries) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.asked)
}

// daemon asks a policy as buildkitd does (evaluateSource in solver/llbsolver/policy.go): again after
// a conversion, again with what it has resolved, and ten times at most.
type daemon struct {
	http, git string // the checksum of every address, the commit of every ref
	resolved  []*pb.SourceOp
}

// read returns the source that the daemon would read, and what it was denied with.
func (d *daemon) read(t *testing.T, p *Policy, op *pb.SourceOp) (*pb.SourceOp, string, error) {
	t.Helper()
	meta := &gateway.ResolveSourceMetaResponse{Source: op}
	for range 10 {
		decision, resolve, err := p.check(t.Context(), &policysession.CheckPolicyRequest{Source: meta})
		switch {
		case err != nil:
			return nil, "", err
		case resolve != nil:
			if fingerprint(resolve.Source) != fingerprint(op) {
				t.Fatalf("%v is to be resolved for %v", resolve.Source, op)
			}
			d.resolved = append(d.resolved, op)
			meta = &gateway.ResolveSourceMetaResponse{Source: op}
			if strings.HasPrefix(op.Identifier, "git://") {
				meta.Git = &gateway.ResolveSourceGitResponse{Checksum: d.git}
			} else {
				meta.HTTP = &gateway.ResolveSourceHTTPResponse{Checksum: d.http}
			}
		case decision.Action == sourcepolicy.PolicyAction_CONVERT:
			op = decision.Update
			meta = &gateway.ResolveSourceMetaResponse{Source: op}
		case decision.Action == sourcepolicy.PolicyAction_ALLOW:
			return op, "", nil
		default:
			err := policysession.WrapDenyMessages(errors.New("not allowed by policy"), decision.DenyMessages)
			if d := p.Denied(err); d == nil || d.Err.Msg != decision.DenyMessages[0].Message {
				t.Errorf("the denial of %v is not found again: %v", op, d)
			}
			return nil, decision.DenyMessages[0].Message, nil
		}
	}
	t.Fatalf("%v: too many policy requests", op)
	return nil, "", nil
}

func image(ref string) *pb.SourceOp { return &pb.SourceOp{Identifier: "docker-image://" + ref} }

// others says that a repository is another tenant's.
func others(prefix string) func(string) bool {
	return func(name string) bool { return strings.HasPrefix(name, prefix) }
}

func TestImages(t *testing.T) {
	const private = "docker-image://r.example/base@sha256:ab"
	d := "@" + told.String()
	for _, tt := range []struct {
		name    string
		sources solve.Sources
		image   string
		allowed bool
	}{
		{"anything", solve.Sources{}, "docker.io/library/busybox:latest", true},
		{"anything by digest", solve.Sources{}, "docker.io/library/busybox" + d, true},
		{"anything by tag and digest", solve.Sources{}, "docker.io/library/busybox:1" + d, true},
		{"without a domain", solve.Sources{From: []string{"docker.io/library/*"}}, "busybox", true},
		{"without a domain, with a path", solve.Sources{From: []string{"docker.io/library/*"}}, "acme/busybox:1", false},
		{"Docker Hub's other name", solve.Sources{From: []string{"docker.io/library/*"}}, "index.docker.io/library/busybox:1", true},
		{"own images", solve.Sources{Images: []string{"r.example/acme"}, From: []string{}}, "r.example/acme/app:1", true},
		{"own images by digest", solve.Sources{Images: []string{"r.example/acme"}, From: []string{}}, "r.example/acme/app" + d, true},
		{"own images at another form of the host", solve.Sources{Images: []string{"r.example/acme"}, From: []string{}}, "r.example:443/acme/app:1", true},
		{"alike, and not own", solve.Sources{Images: []string{"r.example/acme"}, From: []string{}}, "r.example/acme2/app:1", false},
		{"the builder's", solve.Sources{Own: []string{"r.example/cache"}}, "r.example/cache:key", false},
		{"the builder's by digest", solve.Sources{Own: []string{"r.example/cache"}}, "r.example/cache" + d, false},
		{"the builder's at another form of the host", solve.Sources{Own: []string{"r.example/cache"}}, "r.example:80/cache:key", false},
		{"the builder's at a port with a zero before it", solve.Sources{Own: []string{"r.example:5000/cache"}}, "r.example:05000/cache:key", false},
		{"the builder's, whatever from says", solve.Sources{Own: []string{"r.example/cache"}, From: []string{"*"}}, "r.example/cache:key", false},
		{"the builder's among own images", solve.Sources{Own: []string{"r.example/cache"}, Images: []string{"r.example"}}, "r.example/cache:key", false},
		{"another's", solve.Sources{Others: others("r.example/other")}, "r.example/other/app:1", false},
		{"another's by digest", solve.Sources{Others: others("r.example/other")}, "r.example/other/app" + d, false},
		{"another's that from names", solve.Sources{Others: others("r.example/other"), From: []string{"r.example/other/*"}}, "r.example/other/app:1", true},
		{"nobody's", solve.Sources{Others: others("r.example/other")}, "r.example/x:1", true},
		{"from names it", solve.Sources{From: []string{"r.example/base/*", "x"}}, "r.example/base/go:1", true},
		{"from does not name it", solve.Sources{From: []string{"r.example/base/*"}}, "r.example/x:1", false},
		{"from names nothing", solve.Sources{From: []string{}}, "docker.io/library/busybox:1", false},
		{"a tag like a name", solve.Sources{From: []string{"docker.io/library/*"}}, "r.example/x:docker.io", false},
		{"no image", solve.Sources{}, "docker.io/UPPER/x", false},
		{"a digest that is none", solve.Sources{}, strings.TrimPrefix(private, "docker-image://"), false},
		{"nothing", solve.Sources{}, "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(registries)
			op, why, err := new(daemon).read(t, New(Config{Sources: tt.sources, Asker: r, Known: r, Unasked: []string{"*"}}), image(tt.image))
			if err != nil || (op != nil) != tt.allowed {
				t.Errorf("%v, %q, %v", op, why, err)
			}
			if len(r.asked) > 0 {
				t.Errorf("asked for %q", r.asked)
			}
		})
	}
}

// TestPublic has no credentials for any registry. A mark is before those that the operator has
// named. Docker Hub alone is not asked.
func TestPublic(t *testing.T) {
	for _, tt := range []struct {
		name    string
		sources solve.Sources
		image   string
		asked   string
	}{
		{"Docker Hub", solve.Sources{}, "busybox", ""},
		{"Docker Hub by another name", solve.Sources{}, "index.docker.io/library/busybox:1", ""},
		{"Docker Hub, with credentials of a tenant", solve.Sources{Asked: []string{"https://index.docker.io/v1/"}}, "busybox:1", "!docker.io/library/busybox:1"},
		{"nobody has named it", solve.Sources{}, "r.example/x:1", "r.example/x:1"},
		{"from allows all", solve.Sources{From: []string{"*"}}, "r.example/x:1", "r.example/x:1"},
		{"from names another", solve.Sources{From: []string{"*", "q.example/*"}}, "r.example/x:1", "r.example/x:1"},
		{"from names it", solve.Sources{From: []string{"r.example/*"}}, "r.example:443/x:1", "!r.example:443/x:1"},
		{"the tenant's own", solve.Sources{Images: []string{"r.example/own"}}, "r.example/own/x:1", "!r.example/own/x:1"},
		{"another port of it", solve.Sources{Images: []string{"r.example/own"}}, "r.example:1/own/x:1", "r.example:1/own/x:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &registries{public: true}
			op, why, err := new(daemon).read(t, New(Config{Sources: tt.sources, Asker: r, Known: r}), image(tt.image))
			if asked := strings.Join(r.asked, " "); err != nil || op == nil || asked != tt.asked {
				t.Errorf("asked for %q, want %q; %v, %q, %v", asked, tt.asked, op, why, err)
			}
		})
	}
}

// TestSameWords wants a denial to tell nothing about what there is.
func TestSameWords(t *testing.T) {
	r := new(registries)
	words := make(map[string]bool)
	for _, s := range []solve.Sources{
		{Own: []string{"r.example/x"}},
		{Others: others("r.example/x")},
		{From: []string{"docker.io/*"}},
		{From: []string{}},
	} {
		p := New(Config{Sources: s, Asker: r, Known: r})
		_, why, err := new(daemon).read(t, p, image("r.example/x:1"))
		if err != nil || p.denials[0].Err.Code != api.FromForbidden {
			t.Errorf("%v, %v", p.denials, err)
		}
		words[why] = true
	}
	if want := `image "r.example/x:1" may not be pulled by this build`; len(words) != 1 || !words[want] {
		t.Errorf("said %v", words)
	}
}

func TestAsked(t *testing.T) {
	const host = "r.example"
	yes := map[string]bool{host: true}
	for _, tt := range []struct {
		name       string
		cfg        Config
		registries *registries
		asked      string // with "!" where the operator named the host; empty for not
	}{
		{"nobody names it", Config{}, &registries{}, "?"},
		{"a tenant has credentials", Config{Sources: solve.Sources{Asked: []string{host}}}, &registries{}, "!"},
		{"a tenant has credentials for a path", Config{Sources: solve.Sources{Asked: []string{host + "/acme"}}}, &registries{}, "!"},
		{"a tenant has credentials for a pattern", Config{Sources: solve.Sources{Asked: []string{"*.example"}}}, &registries{}, "?"},
		{"a tenant has credentials elsewhere", Config{Sources: solve.Sources{Asked: []string{"x.example"}}}, &registries{}, "?"},
		{"the builder names it", Config{}, &registries{named: yes}, "!"},
		{"the daemon alone reaches it", Config{Unasked: []string{host + "/base/*"}}, &registries{named: yes}, ""},
		{"the daemon alone reaches others", Config{Unasked: []string{host + "/x/*"}}, &registries{}, "?"},
		{"the cache is there", Config{Unasked: []string{host + "/base/*"}, Cache: "R.example:443/cache"}, &registries{}, "?"},
		{"own images", Config{Sources: solve.Sources{Images: []string{host}}}, &registries{}, "!"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := tt.registries
			tt.cfg.Asker, tt.cfg.Known = r, r
			p := New(tt.cfg)
			op, why, err := new(daemon).read(t, p, image(host+"/base/go:1"))
			if err != nil || op == nil {
				t.Fatalf("%q, %v", why, err)
			}
			want, asked := "docker-image://r.example/base/go:1", []string(nil)
			if tt.asked != "" {
				want += "@" + told.String()
				asked = []string{strings.TrimPrefix(tt.asked, "?") + "r.example/base/go:1"}
			}
			if op.Identifier != want || fmt.Sprint(r.asked) != fmt.Sprint(asked) {
				t.Errorf("reads %s after asking for %q, want %s after %q", op.Identifier, r.asked, want, asked)
			}
		})
	}
}

func TestAskedOnce(t *testing.T) {
	r := &registries{named: map[string]bool{"r.example": true}}
	p := New(Config{Asker: r, Known: r})
	for range 2 {
		for _, ref := range []string{"r.example/x:1", "r.example/x@" + told.String(), "r.example/x:2@" + told.String()} {
			op := image(ref)
			op.Attrs = map[string]string{"image.resolvemode": "pull"}
			if got, why, err := new(daemon).read(t, p, op); err != nil || got == nil || got.Attrs["image.resolvemode"] != "pull" {
				t.Errorf("%s: %v, %q, %v", ref, got, why, err)
			}
		}
	}
	if want := "[!r.example/x:1]"; fmt.Sprint(r.asked) != want {
		t.Errorf("asked for %q, want %s", r.asked, want)
	}
	other := "r.example/x@" + digest.FromString("other").String()
	new(daemon).read(t, p, image(other))
	new(daemon).read(t, p, image("r.example/y@"+told.String()))
	if len(r.asked) != 3 {
		t.Errorf("asked for %q: an answer is for one digest in one repository", r.asked)
	}
}

// TestAskedForPlatforms wants a question for each platform: the manifests below an index differ.
func TestAskedForPlatforms(t *testing.T) {
	r := &registries{named: map[string]bool{"r.example": true}}
	p := New(Config{Asker: r, Known: r})
	for _, arch := range []string{"amd64", "arm64", "x86_64", "amd64"} {
		req := &policysession.CheckPolicyRequest{
			Source:   &gateway.ResolveSourceMetaResponse{Source: image("r.example/x:1")},
			Platform: &pb.Platform{OS: "linux", Architecture: arch},
		}
		if d, _, err := p.check(t.Context(), req); err != nil || d.GetUpdate().GetIdentifier() != "docker-image://r.example/x:1@"+told.String() {
			t.Errorf("%v, %v", d, err)
		}
	}
	if want := "[!r.example/x:1 linux/amd64 !r.example/x:1 linux/arm64]"; fmt.Sprint(r.asked) != want {
		t.Errorf("asked for %q, want %s", r.asked, want)
	}
}

// TestLongPlatform asks nobody for a platform that the Dockerfile has made long.
func TestLongPlatform(t *testing.T) {
	r := &registries{named: map[string]bool{"r.example": true}}
	p := New(Config{Asker: r, Known: r})
	for n, want := range map[int]sourcepolicy.PolicyAction{maxPlatform: sourcepolicy.PolicyAction_CONVERT, maxPlatform + 1: sourcepolicy.PolicyAction_DENY} {
		req := &policysession.CheckPolicyRequest{
			Source:   &gateway.ResolveSourceMetaResponse{Source: image("r.example/x:1")},
			Platform: &pb.Platform{OS: "linux", Architecture: strings.Repeat("x", n-len("linux/"))},
		}
		if d, _, err := p.check(t.Context(), req); err != nil || d.GetAction() != want {
			t.Errorf("%d bytes: %v, %v", n, d, err)
		}
	}
}

func TestAskedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &registries{named: map[string]bool{"r.example": true}, wait: make(chan struct{})}
		p := New(Config{Asker: r, Known: r})
		var all sync.WaitGroup
		for i := range 40 {
			all.Go(func() {
				ref := image(fmt.Sprintf("r.example/x%d:1", i%20))
				if op, why, err := new(daemon).read(t, p, ref); err != nil || op == nil {
					t.Errorf("%s: %q, %v", ref, why, err)
				}
			})
		}
		synctest.Wait()
		if n := r.count(); n != maxAsking {
			t.Errorf("%d questions at once", n)
		}
		close(r.wait)
		all.Wait()
		if len(r.asked) != 20 {
			t.Errorf("%d questions for 20 references", len(r.asked))
		}
	})
}

// TestRefused wants the registry's own answer.
func TestRefused(t *testing.T) {
	r := &registries{named: map[string]bool{"r.example": true}}
	for _, want := range []*api.Error{{Code: api.RegistryDenied, Msg: "no"}, {Code: api.RegistryFailed, Msg: "down"}} {
		r.refuses = want
		p := New(Config{Asker: r, Known: r})
		for range 2 {
			if _, why, err := new(daemon).read(t, p, image("r.example/x:1")); err != nil || why != want.Msg || p.denials[0].Err != want {
				t.Errorf("%q, %v", why, err)
			}
		}
	}
	if len(r.asked) != 2 {
		t.Errorf("asked for %q", r.asked)
	}
	p := New(Config{Asker: r, Known: r})
	r.broken = &api.Error{Code: api.RegistryFailed, Msg: "unreadable"}
	if _, why, err := new(daemon).read(t, p, image("r.example/y:1")); err != nil || why != "unreadable" {
		t.Errorf("%q, %v", why, err)
	}
}

// TestGone wants nothing learnt of a caller that has gone.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &registries{named: map[string]bool{"r.example": true}, wait: make(chan struct{})}
		p := New(Config{Asker: r, Known: r})
		ctx, cancel := context.WithCancel(t.Context())
		var gone sync.WaitGroup
		gone.Go(func() {
			req := &policysession.CheckPolicyRequest{Source: &gateway.ResolveSourceMetaResponse{Source: image("r.example/x:1")}}
			if _, _, err := p.check(ctx, req); !errors.Is(err, context.Canceled) {
				t.Errorf("a caller that has gone: %v", err)
			}
		})
		synctest.Wait()
		if n := r.count(); n != 1 {
			t.Errorf("%d questions", n)
		}
		cancel()
		gone.Wait()
		close(r.wait)
		if op, why, err := new(daemon).read(t, p, image("r.example/x:1")); err != nil || op == nil {
			t.Errorf("%q, %v", why, err)
		}
	})
}

// TestForms wants what is unknown denied.
func TestForms(t *testing.T) {
	for identifier, allowed := range map[string]bool{
		"local://context":                          true,
		"local://dockerfile":                       true,
		"local://other":                            false,
		"local://context/../other":                 false,
		"oci-layout://x/y@" + told.String():        false,
		"oci-layout+blob://x/y@" + told.String():   false,
		"docker-image+blob://x/y@" + told.String(): false,
		"ftp://host.example/f":                     false,
		"context":                                  false,
		"":                                         false,
		"Docker-Image://busybox":                   false,
		"http://user@host.example/f":               true,
		"https://host.example/f":                   false,
		"http://other.example/f":                   false,
		"http://host.example:80/f":                 true,
		"http://host.example:81/f":                 false,
		"http://host.example./f":                   false,
		"http://host.example%2f@other.example/":    false,
		"https://secure.example:443/f":             true,
		"git://secure.example/org/repo.git":        true,
		"git://secure.example/org/repo.git#main":   true,
		"git://host.example/org/repo.git#main":     false, // it is https without git.fullurl
		"git://git@secure.example:org/repo.git":    false,
		"git://ssh://git@secure.example/org/repo":  false,
		"git://other.example/org/repo.git":         false,
	} {
		r := new(registries)
		p := New(Config{Sources: solve.Sources{Hosts: []string{"http://host.example", "secure.example"}}, Asker: r, Known: r})
		op, why, err := (&daemon{http: "sha256:1", git: "c"}).read(t, p, &pb.SourceOp{Identifier: identifier})
		if err != nil || (op != nil) != allowed {
			t.Errorf("%q: %v, %q, %v", identifier, op, why, err)
		}
		if !allowed && p.denials[0].Err.Code != api.FromForbidden {
			t.Errorf("%q: %v", identifier, p.denials[0].Err)
		}
	}
}

const commit = "0123456789012345678901234567890123456789"

func gitOp(url, fragment string, attrs ...string) *pb.SourceOp {
	_, below, _ := strings.Cut(url, "://")
	op := &pb.SourceOp{Identifier: "git://" + below + fragment, Attrs: map[string]string{pb.AttrFullRemoteURL: url}}
	for i := 0; i < len(attrs); i += 2 {
		op.Attrs[attrs[i]] = attrs[i+1]
	}
	return op
}

func TestGit(t *testing.T) {
	const url = "https://git.example/org/repo.git"
	for _, tt := range []struct {
		name     string
		op       *pb.SourceOp
		resolved string // identifiers; empty for none
		allowed  bool
	}{
		{"a branch", gitOp(url, "#main"), "", true},
		{"the default branch", gitOp(url, ""), "", true},
		{"a tag with its commit", gitOp(url, "#v1", pb.AttrGitChecksum, commit), "", true},
		{"a commit", gitOp(url, "#"+commit), "git://git.example/org/repo.git", true},
		{"a directory of a commit", gitOp(url, "#"+commit+":dir"), "git://git.example/org/repo.git", true},
		{"a branch by its commit", gitOp(url, "#main", pb.AttrGitFetchByCommit, "true", pb.AttrGitChecksum, commit), "git://git.example/org/repo.git", true},
		{"a bundle", gitOp(url, "#main", pb.AttrGitBundle, "docker-image+blob://x/y@"+told.String()), "", false},
		{"times of commits", gitOp(url, "#main", pb.AttrGitMTime, "commit"), "", false},
		{"another's place in the cache", gitOp(url, "#main", pb.AttrGitMTime, "tenant t-other"), "", true},
		{"another's place, without submodules", gitOp(url, "#main", pb.AttrGitMTime, "tenant t-other", pb.AttrGitSkipSubmodules, "true"), "", true},
		{"plain http", gitOp("http://git.example/org/repo.git", "#main"), "", false},
		{"ssh", gitOp("ssh://git@git.example/org/repo.git", "#main"), "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(registries)
			p := New(Config{Tenant: "t-one", Sources: solve.Sources{Hosts: []string{"git.example"}}, Asker: r, Known: r})
			d := &daemon{git: commit}
			want := maps.Clone(tt.op.Attrs)
			maps.Copy(want, map[string]string{pb.AttrGitMTime: "tenant t-one", pb.AttrGitSkipSubmodules: "true"})
			op, why, err := d.read(t, p, tt.op)
			if err != nil || (op != nil) != tt.allowed {
				t.Fatalf("%v, %q, %v", op, why, err)
			}
			var resolved []string
			for _, probe := range d.resolved {
				resolved = append(resolved, probe.Identifier)
				if probe.Attrs[pb.AttrGitChecksum] != "" || probe.Attrs[pb.AttrGitFetchByCommit] != "" {
					t.Errorf("resolves with %v", probe.Attrs)
				}
			}
			if strings.Join(resolved, " ") != tt.resolved {
				t.Errorf("resolved %q, want %q", resolved, tt.resolved)
			}
			if tt.allowed && (op.Identifier != tt.op.Identifier || !maps.Equal(op.Attrs, want)) {
				t.Errorf("reads %v, want attributes %v", op, want)
			}
		})
	}
}

// TestGitContext wants the context's own repository to pass, and no other at its host.
func TestGitContext(t *testing.T) {
	r := new(registries)
	p := New(Config{Git: &buildconfig.Git{Scheme: "https", Host: "git.example", Path: "/org/repo.git"}, Asker: r, Known: r})
	for url, allowed := range map[string]bool{"https://git.example/org/repo.git": true, "https://git.example/org/other.git": false, "http://git.example/org/repo.git": false} {
		d := new(daemon)
		if op, why, err := d.read(t, p, gitOp(url, "#"+commit)); err != nil || (op != nil) != allowed || len(d.resolved) != map[bool]int{true: 1}[allowed] {
			t.Errorf("%s: %v, %q, %v", url, op, why, err)
		}
	}
}

func TestHTTP(t *testing.T) {
	const url = "https://host.example/f?secret"
	for _, tt := range []struct {
		name, checksum, want string
	}{
		{"without a checksum", "", "sha256:aa"},
		{"with its checksum", "sha256:aa", "sha256:aa"},
		{"with another checksum", "sha256:bb", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := new(registries)
			p := New(Config{Sources: solve.Sources{Hosts: []string{"host.example"}}, Asker: r, Known: r})
			d := &daemon{http: "sha256:aa"}
			attrs := map[string]string{"http.filename": "f", pb.AttrHTTPSignatureVerify: "sig"}
			if tt.checksum != "" {
				attrs[pb.AttrHTTPChecksum] = tt.checksum
			}
			op, why, err := d.read(t, p, &pb.SourceOp{Identifier: url, Attrs: attrs})
			if err != nil || (op != nil) != (tt.want != "") {
				t.Fatalf("%v, %q, %v", op, why, err)
			}
			if len(d.resolved) != 1 || d.resolved[0].Attrs[pb.AttrHTTPChecksum] != "" || d.resolved[0].Attrs[pb.AttrHTTPSignatureVerify] != "" {
				t.Errorf("resolved %v", d.resolved)
			}
			if op == nil {
				if p.denials[0].Err.Code != api.BuildFailed || strings.Contains(why, "secret") {
					t.Errorf("%v", p.denials[0].Err)
				}
				return
			}
			want := map[string]string{"http.filename": "f", pb.AttrHTTPSignatureVerify: "sig", pb.AttrHTTPChecksum: tt.want}
			if op.Identifier != url || !maps.Equal(op.Attrs, want) {
				t.Errorf("reads %v, want attributes %v", op, want)
			}
			if _, _, err := d.read(t, p, op); err != nil || len(d.resolved) != 1 {
				t.Errorf("resolved %d times", len(d.resolved))
			}
		})
	}
}

// TestForgedProof wants the attribute of a proof to prove nothing in other hands.
func TestForgedProof(t *testing.T) {
	const url = "https://host.example/f"
	r := new(registries)
	p := New(Config{Sources: solve.Sources{Hosts: []string{"host.example"}}, Asker: r, Known: r})
	victim := &pb.SourceOp{Identifier: url, Attrs: map[string]string{pb.AttrHTTPChecksum: "sha256:aa"}}
	if _, err := p.decide(t.Context(), &gateway.ResolveSourceMetaResponse{Source: victim}, nil); err != nil {
		t.Fatal(err)
	}
	// The forger reads another address, and says that it is the probe of the victim's.
	forged := &pb.SourceOp{Identifier: "https://host.example/mine", Attrs: map[string]string{proofAttr: fingerprint(victim)}}
	d := &daemon{http: "sha256:aa"}
	op, _, err := d.read(t, p, forged)
	if err != nil || op != nil && op.Identifier == url {
		t.Errorf("%v, %v", op, err)
	}
	if p.isAllowed(victim) {
		t.Error("the forger has proven what it did not read")
	}
}

func TestTooMany(t *testing.T) {
	r := &registries{named: map[string]bool{"r.example": true}}
	p := New(Config{Sources: solve.Sources{Hosts: []string{"host.example"}}, Asker: r, Known: r})
	for i := range 2 * maxSources {
		p.images[fmt.Sprint(i)] = &answer{}
		p.proofs[fmt.Sprint(i)] = &proof{}
	}
	for _, op := range []*pb.SourceOp{image("r.example/x:1"), {Identifier: "https://host.example/f"}} {
		if got, why, err := new(daemon).read(t, p, op); err != nil || got != nil || !strings.Contains(why, "at most") {
			t.Errorf("%v, %q, %v", got, why, err)
		}
	}
}

func TestUnresolved(t *testing.T) {
	r := new(registries)
	p := New(Config{Sources: solve.Sources{Hosts: []string{"host.example"}}, Asker: r, Known: r})
	begin := func(url string) *pb.SourceOp {
		d, err := p.decide(t.Context(), &gateway.ResolveSourceMetaResponse{Source: &pb.SourceOp{Identifier: url}}, nil)
		if err != nil || d.convert == nil {
			t.Fatalf("%v, %v", d, err)
		}
		if _, meta, err := p.check(t.Context(), &policysession.CheckPolicyRequest{Source: &gateway.ResolveSourceMetaResponse{Source: d.convert}}); err != nil || meta == nil {
			t.Fatalf("%v, %v", meta, err)
		}
		return d.convert
	}
	failed := errors.New("failed to load LLB: error evaluating the source policy: " + resolving + "invalid response status 401")
	first := begin("https://host.example/f?secret")
	if d := p.Unresolved(errors.New("invalid response status 401")); d != nil {
		t.Errorf("another error is about %v", d)
	}
	d := p.Unresolved(failed)
	if d == nil || d.Address != "https://host.example/f?secret" || d.Err.Code != api.BuildFailed || d.Err.Msg != "https://host.example: invalid response status 401" {
		t.Errorf("%+v", d)
	}
	begin("https://host.example/g")
	if d := p.Unresolved(failed); d != nil {
		t.Errorf("one of two is %v", d)
	}
	p.check(t.Context(), &policysession.CheckPolicyRequest{Source: &gateway.ResolveSourceMetaResponse{Source: first, HTTP: &gateway.ResolveSourceHTTPResponse{Checksum: "sha256:aa"}}})
	if d := p.Unresolved(failed); d == nil || d.Address != "https://host.example/g" {
		t.Errorf("%+v", d)
	}
	p = New(Config{Sources: solve.Sources{Hosts: []string{"http://host.example"}}, Asker: r, Known: r})
	git := gitOp("http://host.example/org/repo.git", "#"+commit)
	for range 2 {
		d, err := p.decide(t.Context(), &gateway.ResolveSourceMetaResponse{Source: git}, nil)
		if err != nil || d.convert == nil {
			t.Fatalf("%v, %v", d, err)
		}
		git = d.convert
	}
	p.check(t.Context(), &policysession.CheckPolicyRequest{Source: &gateway.ResolveSourceMetaResponse{Source: git}})
	if d := p.Unresolved(failed); d == nil || d.Address != "git://host.example/org/repo.git#"+commit || !strings.HasPrefix(d.Err.Msg, "http://host.example: ") {
		t.Errorf("%+v", d)
	}
	var none *Policy
	if none.Unresolved(failed) != nil || none.Denied(failed) != nil {
		t.Error("no policy has denied something")
	}
}
