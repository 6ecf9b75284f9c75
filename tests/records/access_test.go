package records

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"handler/function/records/jetstream"
	"handler/function/records/recordstest"
	"handler/function/tests/stack"
)

// TestCredentialReplaced: the operator moves the server from a user and a password to an operator's
// accounts, and back, and replaces the file of the credential each time. The store comes back by
// itself.
func TestCredentialReplaced(t *testing.T) {
	dir := t.TempDir()
	port, err := stack.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	url, file := fmt.Sprintf("nats://127.0.0.1:%d", port), filepath.Join(dir, "credential")
	accounts, creds := operatorMode(t)
	var s *jetstream.Store
	for i, login := range []struct{ conf, credential string }{
		{"authorization {user: builder, password: first}", "builder:first\n"},
		{accounts, creds},
		{"authorization {user: builder, password: second}", "builder:second\n"},
	} {
		if err := os.WriteFile(file, []byte(login.credential), 0o600); err != nil {
			t.Fatal(err)
		}
		own := filepath.Join(dir, fmt.Sprint(i))
		conf := fmt.Sprintf("listen: 127.0.0.1:%d\njetstream {store_dir: %q}\n%s", port, filepath.Join(own, "store"), login.conf)
		server, err := stack.ConfiguredNATS(binary(t, false), own, conf, url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(server.Kill)
		if err := server.Ready(recordstest.Context(t)); err != nil {
			t.Fatal(err)
		}
		if s == nil {
			s = open(t, []*stack.NATS{server}, func(o *jetstream.Options) {
				o.NATS = jetstream.Access{Credential: file}.Options()
			})
		}
		// The store makes its streams at the server, so it has logged in.
		recordstest.Eventually(t, func() error {
			streams, err := filepath.Glob(filepath.Join(own, "store/jetstream/*/streams/"+jetstream.RecordStream))
			if err == nil && len(streams) == 0 {
				err = fmt.Errorf("server %d has no stream of records", i)
			}
			return err
		})
		reachable(t, s)
		server.Kill()
	}
}

// operatorMode is the configuration of a server with an operator, and the .creds file of a user of
// an account with JetStream, as nsc makes them.
func operatorMode(t *testing.T) (conf, creds string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	pair := func(create func() (nkeys.KeyPair, error)) (nkeys.KeyPair, string) {
		t.Helper()
		k, err := create()
		must(err)
		public, err := k.PublicKey()
		must(err)
		return k, public
	}
	encode := func(c jwt.Claims, by nkeys.KeyPair) string {
		t.Helper()
		token, err := c.Encode(by)
		must(err)
		return token
	}
	operator, operatorKey := pair(nkeys.CreateOperator)
	_, systemKey := pair(nkeys.CreateAccount)
	account, accountKey := pair(nkeys.CreateAccount)
	user, userKey := pair(nkeys.CreateUser)

	claims := jwt.NewAccountClaims(accountKey)
	claims.Limits.JetStreamLimits = jwt.JetStreamLimits{
		MemoryStorage: jwt.NoLimit, DiskStorage: jwt.NoLimit, Streams: jwt.NoLimit, Consumer: jwt.NoLimit,
	}
	conf = fmt.Sprintf("operator: %s\nsystem_account: %s\nresolver: MEMORY\nresolver_preload: {%s: %s, %s: %s}",
		encode(jwt.NewOperatorClaims(operatorKey), operator), systemKey,
		systemKey, encode(jwt.NewAccountClaims(systemKey), operator),
		accountKey, encode(claims, operator))
	seed, err := user.Seed()
	must(err)
	text, err := jwt.FormatUserConfig(encode(jwt.NewUserClaims(userKey), account), seed)
	must(err)
	return conf, string(text)
}
