package manifests

import (
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"handler/function/records"
	store "handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/readme"
	"handler/function/tests/stack"
)

// TestNATSShared runs buildkit/README.md's server with an account for OpenFaaS too. A client
// without a user is OpenFaaS, has its own streams, and neither hears nor changes the builder's.
func TestNATSShared(t *testing.T) {
	t.Parallel()
	f := startNATS(t, "nats", func(files map[string]string) {
		files["nats.conf"] = pageBlock(t, "", "no_auth_user: openfaas")
	})
	a, b := f.open(t, "a root secret"), f.open(t, "a root secret")
	ref := keep(t, a, b, "before")

	// As OpenFaaS's clients connect: no TLS, no user.
	conn, complaints, err := dial(t, strings.Replace(f.servers[0].URL, "tls://", "nats://", 1))
	if err != nil {
		t.Fatal(err)
	}
	ctx := recordstest.Context(t)
	heard, err := conn.SubscribeSync("builder.>")
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{store.RecordStream, store.LogStream} {
		if _, err := js.Stream(ctx, name); !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Errorf("OpenFaaS finds %s: %v", name, err)
		}
		if err := js.DeleteStream(ctx, name); !errors.Is(err, jetstream.ErrStreamNotFound) {
			t.Errorf("OpenFaaS deletes %s: %v", name, err)
		}
	}
	queue, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "OF_faas-request", Subjects: []string{"faas-request"}, Storage: jetstream.MemoryStorage})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(ctx, "faas-request", []byte("call")); err != nil {
		t.Error(err)
	}
	if msg, err := queue.GetMsg(ctx, 1); err != nil || string(msg.Data) != "call" {
		t.Errorf("the queue has %v, %v", msg, err)
	}
	// What it says on the builder's subjects stays in its own account.
	own, err := conn.SubscribeSync("builder.rec.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(conn.Publish("builder.rec.forged", nil), conn.FlushWithContext(ctx)); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*nats.Subscription{own, heard} {
		if msg, err := s.NextMsgWithContext(ctx); err != nil || msg.Subject != "builder.rec.forged" {
			t.Errorf("OpenFaaS does not hear itself: %v, %v", msg, err)
		}
	}
	keep(t, a, b, "after")
	recordstest.Known(t, b, ref, recordstest.Ended)
	if page, err := b.List(ctx, records.Query{Tenant: "acme", Limit: 10}); err != nil || len(page.Builds) != 2 || !page.Complete {
		t.Errorf("the builder lists %+v, %v", page, err)
	}
	if err := conn.FlushWithContext(ctx); err != nil {
		t.Error(err)
	}
	if n, _, err := heard.Pending(); err != nil || n != 0 {
		t.Errorf("OpenFaaS hears %d of the builder's messages, %v", n, err)
	}
	select {
	case err := <-complaints:
		t.Errorf("OpenFaaS is told %v", err)
	default:
	}
	// The builder itself is safe from listeners on the way, although TLS is not asked of all.
	if !strings.HasPrefix(f.url(), "tls://") {
		t.Errorf("the builder dials %s", f.url())
	}
}

// pageBlock is the one block of buildkit/README.md in a language that has text in it.
func pageBlock(t *testing.T, language, text string) string {
	t.Helper()
	pages, err := readme.Pages(repo)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, page := range pages {
		for _, block := range page.Blocks {
			if page.Path == "buildkit/README.md" && block.Language == language && strings.Contains(block.Text, text) {
				found = append(found, block.Text)
			}
		}
	}
	if len(found) != 1 {
		t.Fatalf("buildkit/README.md has %d blocks with %q", len(found), text)
	}
	return found[0]
}

// TestNATSSharedOverlay renders buildkit/README.md's overlay for the shared server.
func TestNATSSharedOverlay(t *testing.T) {
	dir := checkout(t)
	own := filepath.Join(filepath.Dir(dir), "own")
	conf := pageBlock(t, "", "no_auth_user: openfaas")
	if err := stack.WriteContext(own, map[string]string{
		"kustomization.yaml": pageBlock(t, "yaml", "name: builder-nats\n    behavior: merge"),
		"nats.conf":          conf,
	}); err != nil {
		t.Fatal(err)
	}
	v := mustLoad(t, own)
	files, err := v.natsFiles()
	if err != nil {
		t.Fatal(err)
	}
	if files["nats.conf"] != conf || files["account.conf"] == "" || files["credential"] == "" {
		t.Errorf("the pod has %v", slices.Sorted(maps.Keys(files)))
	}
	rules := v.policies["builder-nats"].Spec.Ingress
	if len(rules) != 2 || only(rules[1].From).PodSelector == nil || only(rules[1].From).NamespaceSelector != nil || number(only(rules[1].Ports).Port) != 4222 {
		t.Errorf("the policy lets in %+v", rules)
	}
}
