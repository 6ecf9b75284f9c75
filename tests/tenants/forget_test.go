package tenants_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// kept says how many builds of each tenant a stream has something of. It is by the tenant's hash:
// subjects are builder.rec.KEY.TENANT.CALL.ATTEMPT.KIND and builder.log.KEY.TENANT.CALL.ATTEMPT.
func kept(t *testing.T, stream jetstream.Stream, filter string) map[string]map[string]bool {
	t.Helper()
	info, err := stream.Info(within(t), jetstream.WithSubjectFilter(filter))
	if err != nil {
		t.Fatal(err)
	}
	builds := map[string]map[string]bool{}
	for subject := range info.State.Subjects {
		f := strings.Split(subject, ".")
		if builds[f[3]] == nil {
			builds[f[3]] = map[string]bool{}
		}
		builds[f[3]][f[4]] = true
	}
	return builds
}

// TestForgetRecords removes a tenant's records and logs from NATS with make tenant-forget: all of
// builds that have ended, none of one that runs, and none of another tenant's.
func TestForgetRecords(t *testing.T) {
	server := stack.TestNATS(t, stack.NATSConfig{})
	h := newHouse(t, func(_ *house, c *stack.FunctionConfig) { c.Env = map[string]string{"nats_url": server.URL} })
	acme, globex := h.of(h.acme), h.of(h.globex)
	conn, err := nats.Connect(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	stream := func(name string) (s jetstream.Stream) {
		t.Helper()
		stack.Eventually(t, patience, func() (err error) {
			s, err = js.Stream(within(t), name)
			return err
		})
		return s
	}
	records, logs := stream("BUILDER_RECORDS"), stream("BUILDER_LOGS")

	named := func(id string) client.Change { return client.Header("X-Call-Id", id) }
	for _, id := range []string{"one", "two", "three"} {
		if a := acme.MustPost(t, within(t), body(t, app(h.acme), "FROM busybox", "RUN echo "+id), named(id)); a.Status != "success" {
			t.Fatal(a)
		}
	}
	if a := globex.MustPost(t, within(t), body(t, app(h.globex), "FROM busybox", "RUN echo other"), named("one")); a.Status != "success" {
		t.Fatal(a)
	}
	m := mark()
	running := background(t, acme, body(t, app(h.acme), "FROM busybox", held(m)), named("running"))

	// The hash of acme is the one with more builds. Their logs end with a mark, which is the
	// last of all that is stored of them.
	var of, other string
	stack.Eventually(t, patience, func() error {
		r, l := kept(t, records, "builder.rec.*.*.*.*.*"), kept(t, logs, "builder.log.>")
		of, other = "", ""
		for tenant, builds := range r {
			if len(builds) == 4 {
				of = tenant
			} else {
				other = tenant
			}
		}
		if len(r) != 2 || len(l) != 2 || of == "" || len(l[of]) < 4 || len(l[other]) != 1 {
			return fmt.Errorf("NATS has records of %v and logs of %v", r, l)
		}
		return nil
	})
	for _, id := range []string{"one", "two", "three"} {
		stack.Eventually(t, patience, func() error {
			if log := acme.MustReadLog(t, within(t), id, "follow=1"); log.Build.Status != "success" {
				return fmt.Errorf("the log of %s ends with %+v", id, log.Build)
			}
			return nil
		})
	}
	// The record of one build is dropped, as a full stream drops the oldest. Its log is left.
	ended, err := records.Info(within(t), jetstream.WithSubjectFilter("builder.rec.*."+of+".*.*.e"))
	if err != nil {
		t.Fatal(err)
	}
	for subject := range ended.State.Subjects {
		if err := records.Purge(within(t), jetstream.WithPurgeSubject(strings.TrimSuffix(subject, "e")+"*")); err != nil {
			t.Fatal(err)
		}
		break
	}

	// On a fresh machine make would compile the tool for minutes, in the time of within.
	if out, err := exec.CommandContext(t.Context(), "go", "-C", filepath.Join(h.s.Repo, "builder"), "build", "-o", os.DevNull, "./cmd/tenant-forget").CombinedOutput(); err != nil {
		t.Fatalf("compiling tenant-forget: %v: %s", err, out)
	}
	forget := func(secret string) (string, error) {
		t.Helper()
		out, err := exec.CommandContext(within(t), "make", "-s", "-C", h.s.Repo, "tenant-forget", "ID="+h.acme.ID, "TENANTS=",
			"NATS_URL="+server.URL, "PAYLOAD_SECRET="+secret).CombinedOutput()
		return string(out), err
	}
	wrong := filepath.Join(t.TempDir(), "payload-secret")
	if err := os.WriteFile(wrong, []byte("another payload secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := forget(wrong); err != nil || !strings.Contains(out, "records: 0 removed\n") {
		t.Errorf("with another payload secret: %v: %s", err, out)
	}
	if r := kept(t, records, "builder.rec.*.*.*.*.*"); len(r[of]) != 3 {
		t.Errorf("another payload secret leaves %v", r)
	}
	secret := filepath.Join(h.f.SecretsDir, "payload-secret")
	if out, err := forget(secret); err == nil || !strings.Contains(out, "records: 2 removed\n") || !strings.Contains(out, "1 left, of builds that run") {
		t.Errorf("while a build runs: %v: %s", err, out)
	}
	if r, l := kept(t, records, "builder.rec.*.*.*.*.*"), kept(t, logs, "builder.log.>"); len(r[of]) != 1 || len(l[of]) > 1 || len(r[other]) != 1 || len(l[other]) != 1 {
		t.Errorf("while a build runs, NATS has records of %v and logs of %v", r, l)
	}
	release(t, m)
	running()
	// The verdict, and what is stored last of a log, are in NATS a moment after the caller has the
	// answer.
	var printed strings.Builder
	stack.Eventually(t, patience, func() error {
		out, err := forget(secret)
		printed.WriteString(out)
		if r, l := kept(t, records, "builder.rec.*.*.*.*.*"), kept(t, logs, "builder.log.>"); err != nil || len(r) != 1 || len(l) != 1 || len(r[other]) != 1 || len(l[other]) != 1 {
			return fmt.Errorf("NATS has records of %v and logs of %v: %v: %s", r, l, err, out)
		}
		return nil
	})
	if !strings.Contains(printed.String(), "records: 1 removed\n") {
		t.Errorf("at the end it prints %s", &printed)
	}
	for _, id := range []string{"one", "two", "three", "running"} {
		acme.MustVerdict(t, within(t), id).WantFailed(t, "not_found")
	}
	if a := globex.MustReadLog(t, within(t), "one", ""); !has(a.Texts(), "other") || a.Build.Status != "success" {
		t.Errorf("of the other tenant there is %v", a)
	}
}
