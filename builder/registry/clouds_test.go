package registry

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"handler/function/api"
)

const (
	ecrHost = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
	ecrAPI  = "AmazonEC2ContainerRegistry_V20150921."
)

// environ makes vars, names and values in turn, the only variables that an SDK finds.
func environ(t *testing.T, vars ...string) {
	t.Helper()
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		for _, prefix := range []string{"AWS_", "AZURE_", "GOOGLE_", "GCE_", "IDENTITY_", "MSI_"} {
			if strings.HasPrefix(name, prefix) {
				t.Setenv(name, "") // so that it comes back
				os.Unsetenv(name)
			}
		}
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	for i := 0; i < len(vars); i += 2 {
		t.Setenv(vars[i], vars[i+1])
	}
}

// awsEnviron sets access keys, and url as the address of all AWS services.
func awsEnviron(t *testing.T, url string) {
	t.Helper()
	environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "hush-key", "AWS_ENDPOINT_URL", url)
}

func ecrAnswers(t *testing.T) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Amz-Target") != ecrAPI+"GetAuthorizationToken" {
			t.Errorf("asked for %q", r.Header.Get("X-Amz-Target"))
		}
		fmt.Fprintf(w, `{"authorizationData":[{"authorizationToken":%q,"expiresAt":%d}]}`,
			base64.StdEncoding.EncodeToString([]byte("AWS:ecr-password")), time.Now().Add(12*time.Hour).Unix())
	}
}

func ecrDenies(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(http.StatusBadRequest)
	fmt.Fprint(w, `{"__type":"AccessDeniedException","message":"the reason"}`)
}

// TestCloudAmazon logs in to a registry that takes Basic authentication alone, as ECR does.
func TestCloudAmazon(t *testing.T) {
	for _, config := range []string{
		`{"credHelpers":{"` + ecrHost + `":"ecr-login"}}`,
		// What "faas-cli registry-login --ecr" writes.
		`{"credsStore":"ecr-login","credHelpers":{"` + ecrHost + `":"ecr-login"}}`,
		`{"auths":{"` + ecrHost + `":{}},"credsStore":"ecr-login"}`,
	} {
		s := newTokenServer(t, false, ecrAnswers(t))
		awsEnviron(t, s.URL)
		helperDir(t, map[string]string{"ecr-login": "exit 1"}) // ours counts
		c := New(Config{File: configFile(t, config), AllowBasic: true})
		registry := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
			if user, password, ok := r.BasicAuth(); !ok || user != "AWS" || password != "ecr-password" {
				w.Header().Set("WWW-Authenticate", `Basic realm="ecr"`)
				w.WriteHeader(http.StatusUnauthorized)
			}
		})
		for range 2 {
			name, password, err := c.Grant(nil).Basic(t.Context(), ecrHost)
			if err != nil {
				t.Fatal(err)
			}
			req, _ := http.NewRequestWithContext(t.Context(), "GET", registry.URL+"/v2/", nil)
			req.SetBasicAuth(name, password)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("as %q: %s", name, resp.Status)
			}
		}
		if n := s.requests.Load(); n != 1 {
			t.Errorf("asked %d times", n)
		}
		if login, err := c.Login(t.Context(), ecrHost, "app"); err != nil || login.Password != "ecr-password" {
			t.Errorf("%+v, %v", login, err)
		}
	}
}

// TestCloudGoogle exchanges the instance's access token for one of the registry's.
func TestCloudGoogle(t *testing.T) {
	for _, helper := range []string{"gcr", "gcloud"} {
		meta := newTokenServer(t, false, text(`{"access_token":"ya29","expires_in":3600,"token_type":"Bearer"}`))
		environ(t, "GCE_METADATA_HOST", meta.host())
		s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
			if user, password, ok := r.BasicAuth(); !ok || user != "oauth2accesstoken" || password != "ya29" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprint(w, `{"token":"registry-token","expires_in":300}`)
		})
		tok, err := fetchFrom(t, s, `{"credHelpers":{"registry.example.com":"`+helper+`"}}`)
		if err != nil || tok.Value != "registry-token" {
			t.Errorf("%s: %+v, %v", helper, tok, err)
		}
	}
}

// TestCloudAzure exchanges the managed identity's token for the registry's refresh token, with
// the registry's CA, and that for a token.
func TestCloudAzure(t *testing.T) {
	identity := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Identity-Header") != "header" || r.URL.Query().Get("resource") != "https://containerregistry.azure.net" {
			t.Errorf("%v %v", r.URL, r.Header)
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token":"entra","token_type":"Bearer","resource":"r","expires_in":"3600","expires_on":"%d"}`, time.Now().Add(time.Hour).Unix())
	})
	environ(t, "IDENTITY_ENDPOINT", identity.URL+"/token", "IDENTITY_HEADER", "header")
	s := newTokenServer(t, true, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/oauth2/exchange" && r.FormValue("access_token") == "entra":
			fmt.Fprint(w, `{"refresh_token":"refresh"}`)
		case r.URL.Path == "/oauth2/token" && r.Method == "POST" && r.FormValue("grant_type") == "refresh_token" && r.FormValue("refresh_token") == "refresh":
			fmt.Fprint(w, `{"access_token":"registry-token"}`)
		default:
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	ca := writeFile(t, filepath.Join(t.TempDir(), "ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	_, port, _ := strings.Cut(s.host(), ":")
	credentials := func(trusted ...string) *Credentials {
		return New(Config{
			File:    configFile(t, `{"credHelpers":{"`+s.host()+`":"acr-env","localhost:`+port+`":"acr-env"}}`),
			CAFiles: map[string]string{s.host(): ca}, TokenHosts: tokenHosts(t, trusted...),
		})
	}
	tok, err := credentials(s.host()).Grant(nil).Token(t.Context(), TokenRequest{
		Host: s.host(), Realm: s.URL + "/oauth2/token", Service: s.host(), Scopes: []string{"repository:app:pull"},
	})
	if err != nil || tok.Value != "registry-token" {
		t.Errorf("%+v, %v", tok, err)
	}
	// At a private address that is not listed, it gets no token of Entra's.
	before := s.requests.Load()
	for _, host := range []string{s.host(), "localhost:" + port} {
		login, err := credentials().Login(t.Context(), host, "app")
		if err == nil || !strings.Contains(err.Error(), "not a public address") {
			t.Errorf("%s: %+v, %v", host, login, err)
		}
	}
	if n := s.requests.Load(); n != before {
		t.Errorf("%d requests", n-before)
	}
}

// TestCloudFails checks that a cloud's failure ends no build but one that needs credentials
// for that cloud's registry.
func TestCloudFails(t *testing.T) {
	s := newTokenServer(t, false, ecrDenies)
	awsEnviron(t, s.URL)
	public := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" || strings.Contains(r.URL.RawQuery, "private") {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		fmt.Fprint(w, `{"token":"anonymous"}`)
	})
	var log bytes.Buffer
	c := New(Config{
		File:       configFile(t, `{"credsStore":"ecr-login","auths":{"r.example.com":`+basicAuth("u", "p")+`}}`),
		TokenHosts: tokenHosts(t, "public.ecr.aws="+public.host()), AllowBasic: true, Log: zerolog.New(&log),
	})
	if got := user(t, c, "r.example.com"); got != "u" {
		t.Errorf("user %q", got)
	}
	if n := s.requests.Load(); n != 0 {
		t.Errorf("%d requests for another registry", n)
	}
	g := c.Grant(nil)
	token := func(repository string) (Token, error) {
		return g.Token(t.Context(), TokenRequest{Host: "public.ecr.aws", Realm: public.URL, Scopes: []string{"repository:" + repository + ":pull"}})
	}
	if tok, err := token("node"); err != nil || tok.Value != "anonymous" {
		t.Errorf("%+v, %v", tok, err)
	}
	_, err := token("private")
	wantCloudError(t, err, api.RegistryDenied, "public.ecr.aws", `"ecr-login"`)
	_, _, err = c.Grant(nil).Basic(t.Context(), ecrHost)
	wantCloudError(t, err, api.RegistryDenied, ecrHost, `"ecr-login"`)
	if _, err := c.Login(t.Context(), ecrHost, "app"); err == nil {
		t.Error("logged in")
	}
	if got := g.Anonymous(); len(got) > 0 {
		t.Errorf("without credentials: %q", got)
	}
	if !strings.Contains(log.String(), "public.ecr.aws") || !strings.Contains(log.String(), "the reason") {
		t.Errorf("logged %s", &log)
	}
	if strings.Contains(log.String(), "hush") {
		t.Errorf("a secret in the log: %s", &log)
	}
	// A helper named for a registry is asked, whatever the registry's name.
	c = New(Config{File: configFile(t, `{"credHelpers":{"r.example.com":"ecr-login"}}`)})
	_, _, err = c.Grant(nil).Basic(t.Context(), "r.example.com")
	wantCloudError(t, err, api.RegistryFailed, "r.example.com", `"ecr-login"`)
}

func wantCloudError(t *testing.T, err error, code api.Code, words ...string) {
	t.Helper()
	e, ok := errors.AsType[*api.Error](err)
	if !ok || e.Code != code || e.Err == nil {
		t.Fatalf("%v, want %s", err, code)
	}
	for _, w := range words {
		if !strings.Contains(e.Msg, w) {
			t.Errorf("%q is not in: %s", w, e.Msg)
		}
	}
	if strings.Contains(e.Msg, "the reason") {
		t.Errorf("the operator's cause is in: %s", e.Msg)
	}
}

// TestCloudNotAsked checks that a cloud whose helper is not configured for a registry is not
// asked, though its metadata can be reached.
func TestCloudNotAsked(t *testing.T) {
	s := newTokenServer(t, false, status(http.StatusTeapot))
	environ(t, "AWS_EC2_METADATA_SERVICE_ENDPOINT", s.URL, "AWS_ENDPOINT_URL", s.URL,
		"GCE_METADATA_HOST", s.host(), "IDENTITY_ENDPOINT", s.URL, "IDENTITY_HEADER", "h")
	for config, hosts := range map[string][]string{
		`{}`:                         {ecrHost, "gcr.io", "x.azurecr.io"},
		`{"credsStore":"ecr-login"}`: {"gcr.io", "x.azurecr.io", "docker.io", ecrHost + ".example.com"},
		`{"credsStore":"gcr"}`:       {ecrHost, "x.azurecr.io", "gcr.io.example.com"},
		`{"credsStore":"acr-env"}`:   {ecrHost, "gcr.io", "x.azurecr.io.example.com"},
		`{"credHelpers":{"gcr.io":"gcr","x.azurecr.io":"acr-env"}}`: {ecrHost, "eu.gcr.io", "y.azurecr.io"},
	} {
		c := New(Config{File: configFile(t, config), CreateRepositories: true, AllowBasic: true})
		for _, host := range hosts {
			if name := user(t, c, host); name != "" {
				t.Errorf("%s for %s: user %q", config, host, name)
			}
			if !strings.Contains(config, "ecr-login") {
				if err := c.Prepare(t.Context(), refs(t, host+"/app")); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if n := s.requests.Load(); n != 0 {
		t.Errorf("%d requests", n)
	}
}

// TestCloudRenewed checks that a build that outlives its credentials gets new ones.
func TestCloudRenewed(t *testing.T) {
	asked := 0
	meta := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		asked++
		fmt.Fprintf(w, `{"access_token":"ya29-%d","expires_in":1,"token_type":"Bearer"}`, asked)
	})
	environ(t, "GCE_METADATA_HOST", meta.host())
	g := New(Config{File: configFile(t, `{"credsStore":"gcr"}`), AllowBasic: true}).Grant(nil)
	password := func() string {
		_, password, err := g.Basic(t.Context(), "gcr.io")
		if err != nil {
			t.Fatal(err)
		}
		return password
	}
	if got := password(); got != "ya29-1" {
		t.Errorf("first %q", got)
	}
	time.Sleep(600 * time.Millisecond)
	if got := password(); got != "ya29-2" {
		t.Errorf("then %q", got)
	}
}

func TestPrepare(t *testing.T) {
	const config = `{"credsStore":"ecr-login","credHelpers":{"210987654321.dkr.ecr.eu-west-1.amazonaws.com":"other"}}`
	var asked []string
	denied := false
	s := newTokenServer(t, false, func(w http.ResponseWriter, r *http.Request) {
		call := strings.TrimPrefix(r.Header.Get("X-Amz-Target"), ecrAPI)
		var body bytes.Buffer
		body.ReadFrom(r.Body)
		asked = append(asked, call+" "+body.String())
		switch {
		case call == "CreateRepository" && !denied:
			fmt.Fprint(w, `{"repository":{}}`)
		case call == "CreateRepository":
			ecrDenies(w, r)
		default:
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"__type":"RepositoryNotFoundException","message":"m"}`)
		}
	})
	awsEnviron(t, s.URL)
	pushes := refs(t, ecrHost+"/team/app:1", ecrHost+"/team/app:2", "docker.io/acme/app", "210987654321.dkr.ecr.eu-west-1.amazonaws.com/app")

	if err := New(Config{File: configFile(t, config)}).Prepare(t.Context(), pushes); err != nil || len(asked) > 0 {
		t.Errorf("not wanted: %q, %v", asked, err)
	}
	c := New(Config{File: configFile(t, config), CreateRepositories: true})
	if err := c.Prepare(t.Context(), pushes); err != nil {
		t.Fatal(err)
	}
	if len(asked) != 2 || !strings.HasPrefix(asked[1], "CreateRepository") || !strings.Contains(asked[1], `"team/app"`) {
		t.Errorf("asked %q", asked)
	}
	denied = true
	err := New(Config{File: configFile(t, config), CreateRepositories: true}).Prepare(t.Context(), pushes)
	wantCloudError(t, err, api.RegistryDenied, ecrHost, `"team/app"`)
}
