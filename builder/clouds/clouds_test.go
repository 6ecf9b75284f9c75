package clouds

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

const ecrHost = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"

// environ makes vars, names and values in turn, the only variables that an SDK finds. It
// returns the home directory, which must stay empty.
func environ(t *testing.T, vars ...string) {
	t.Helper()
	for _, v := range os.Environ() {
		name, _, _ := strings.Cut(v, "=")
		for _, prefix := range []string{"AWS_", "AZURE_", "GOOGLE_", "GCE_", "IDENTITY_", "MSI_", "HTTP_", "HTTPS_", "http_", "https_"} {
			if strings.HasPrefix(name, prefix) {
				t.Setenv(name, "") // so that it comes back
				os.Unsetenv(name)
			}
		}
	}
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("AWS_MAX_ATTEMPTS", "1")
	for i := 0; i < len(vars); i += 2 {
		t.Setenv(vars[i], vars[i+1])
	}
	t.Cleanup(func() {
		if entries, err := os.ReadDir(home); err != nil || len(entries) > 0 {
			t.Errorf("in the home directory: %v, %v", entries, err)
		}
	})
}

// service is a local server of one cloud that keeps a list of its requests.
type service struct {
	*httptest.Server
	mu    sync.Mutex
	asked []string
}

func (s *service) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.asked...)
}

// newService starts a service. A request's name in the list says which call it is.
func newService(t *testing.T, tls bool, h http.HandlerFunc) *service {
	t.Helper()
	s := &service{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := r.Method + " " + r.URL.Path
		if target := r.Header.Get("X-Amz-Target"); target != "" {
			_, name, _ = strings.Cut(target, ".")
		}
		s.mu.Lock()
		s.asked = append(s.asked, name)
		s.mu.Unlock()
		h(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func writeFile(t *testing.T, content string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// awsFails answers with an error, as an AWS service that speaks JSON does.
func awsFails(w http.ResponseWriter, status int, code string) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"__type":%q,"message":"the message"}`, code)
}

func ecrToken(password string, life time.Duration) string {
	token := base64.StdEncoding.EncodeToString([]byte("AWS:" + password))
	return fmt.Sprintf(`{"authorizationToken":%q,"expiresAt":%d,"proxyEndpoint":"https://%s"}`, token, time.Now().Add(life).Unix(), ecrHost)
}

func newECR(t *testing.T, accessKey string) *service {
	return newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if auth := r.Header.Get("Authorization"); !strings.Contains(auth, "Credential="+accessKey+"/") || !strings.Contains(auth, "/eu-west-1/ecr/") {
			t.Errorf("signed %s", auth)
		}
		if r.Header.Get("X-Amz-Target") != "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken" {
			t.Errorf("asked for %q", r.Header.Get("X-Amz-Target"))
		}
		fmt.Fprintf(w, `{"authorizationData":[%s]}`, ecrToken("p:w", 12*time.Hour))
	})
}

func wantAWS(t *testing.T, c *Clouds, host string) {
	t.Helper()
	got, err := c.Get(t.Context(), "ecr-login", host)
	if err != nil || got.Username != "AWS" || got.Password != "p:w" || got.RefreshToken != "" {
		t.Errorf("%s: %+v, %v", host, got, err)
	}
}

func TestAmazon(t *testing.T) {
	for name, vars := range map[string][]string{
		"variables": {"AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "secret"},
		"file":      {"AWS_SHARED_CREDENTIALS_FILE", writeFile(t, "[default]\naws_access_key_id=AKID\naws_secret_access_key=secret\n")},
	} {
		t.Run(name, func(t *testing.T) {
			s := newECR(t, "AKID")
			environ(t, append(vars, "AWS_ENDPOINT_URL_ECR", s.URL)...)
			wantAWS(t, New(Config{}), ecrHost)
		})
	}
}

// TestAmazonKept moves the clock past half of the tokens' life, and to its end.
func TestAmazonKept(t *testing.T) {
	down := false
	s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if down {
			awsFails(w, 500, "ServerException")
			return
		}
		fmt.Fprintf(w, `{"authorizationData":[%s]}`, ecrToken("p:w", 12*time.Hour))
	})
	environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "secret", "AWS_ENDPOINT_URL", s.URL)
	now := time.Now()
	c := New(Config{})
	c.now = func() time.Time { return now }
	requests := func(want int) {
		t.Helper()
		if got := len(s.requests()); got != want {
			t.Errorf("%d requests, want %d", got, want)
		}
	}
	wantAWS(t, c, ecrHost)
	wantAWS(t, c, "210987654321.dkr.ecr.eu-west-1.amazonaws.com")
	requests(1)
	wantAWS(t, c, "123456789012.dkr.ecr.eu-central-1.amazonaws.com")
	requests(2)
	now = now.Add(7 * time.Hour)
	down = true
	wantAWS(t, c, ecrHost)
	requests(3)
	wantAWS(t, c, ecrHost)
	requests(3)
	now = now.Add(2 * staleRenew)
	wantAWS(t, c, ecrHost)
	requests(4)
	now = now.Add(5 * time.Hour)
	if got, err := c.Get(t.Context(), "ecr-login", ecrHost); err == nil {
		t.Errorf("expired: %+v", got)
	}
}

func TestAmazonPublic(t *testing.T) {
	s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if auth := r.Header.Get("Authorization"); !strings.Contains(auth, "/us-east-1/ecr-public/") {
			t.Errorf("signed %s", auth)
		}
		fmt.Fprintf(w, `{"authorizationData":%s}`, ecrToken("p:w", time.Hour))
	})
	environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "secret", "AWS_ENDPOINT_URL_ECR_PUBLIC", s.URL)
	wantAWS(t, New(Config{}), "public.ecr.aws")
}

// TestAmazonWebIdentity uses a service account of Kubernetes that has a role.
func TestAmazonWebIdentity(t *testing.T) {
	s := newECR(t, "ASIATEMP")
	sts := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("Action") != "AssumeRoleWithWebIdentity" || r.FormValue("WebIdentityToken") != "a.jwt" ||
			r.FormValue("RoleArn") != "arn:aws:iam::123456789012:role/builder" {
			t.Errorf("form %v", r.Form)
		}
		w.Header().Set("Content-Type", "text/xml")
		fmt.Fprintf(w, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
			<Credentials><AccessKeyId>ASIATEMP</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>session</SessionToken><Expiration>%s</Expiration></Credentials>
			</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
	})
	environ(t, "AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/builder", "AWS_WEB_IDENTITY_TOKEN_FILE", writeFile(t, "a.jwt"),
		"AWS_REGION", "eu-west-1", "AWS_ENDPOINT_URL_STS", sts.URL, "AWS_ENDPOINT_URL_ECR", s.URL)
	wantAWS(t, New(Config{}), ecrHost)
}

// TestAmazonInstance uses a machine that has a role.
func TestAmazonInstance(t *testing.T) {
	s := newECR(t, "ASIAINST")
	meta := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/latest/api/token":
			w.Header().Set("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "300")
			fmt.Fprint(w, "tok")
		case "/latest/meta-data/iam/security-credentials/":
			fmt.Fprint(w, "builder")
		case "/latest/meta-data/iam/security-credentials/builder":
			fmt.Fprintf(w, `{"Code":"Success","AccessKeyId":"ASIAINST","SecretAccessKey":"s","Token":"t","Expiration":%q}`,
				time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		default:
			http.NotFound(w, r)
		}
	})
	environ(t, "AWS_EC2_METADATA_SERVICE_ENDPOINT", meta.URL, "AWS_ENDPOINT_URL_ECR", s.URL)
	wantAWS(t, New(Config{}), ecrHost)
}

func TestAmazonFails(t *testing.T) {
	for _, tt := range []struct {
		name    string
		answer  http.HandlerFunc
		refused bool
		want    string
	}{
		{"denied", func(w http.ResponseWriter, _ *http.Request) { awsFails(w, 400, "AccessDeniedException") }, true, "AccessDeniedException: the message"},
		{"throttled", func(w http.ResponseWriter, _ *http.Request) { awsFails(w, 400, "ThrottlingException") }, false, "ThrottlingException"},
		{"broken", func(w http.ResponseWriter, _ *http.Request) { awsFails(w, 500, "ServerException") }, false, "status 500"},
		{"none", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{}`) }, false, "no authorization token"},
		{"not base64", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, `{"authorizationData":[{"authorizationToken":"hush!hush"}]}`)
		}, false, "no authorization token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, false, tt.answer)
			environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "hush-key", "AWS_ENDPOINT_URL_ECR", s.URL)
			_, err := New(Config{}).Get(t.Context(), "ecr-login", ecrHost)
			wantError(t, err, tt.refused, "ecr-login", ecrHost, tt.want)
		})
	}
}

func wantError(t *testing.T, err error, refused bool, words ...string) {
	t.Helper()
	if err == nil || errors.Is(err, ErrRefused) != refused {
		t.Fatalf("%v, refused %v wanted", err, refused)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q is not in: %v", w, err)
		}
	}
	if strings.Contains(err.Error(), "hush") || strings.Contains(err.Error(), "\n") {
		t.Errorf("a secret or a line break is in: %v", err)
	}
}

func TestCreateRepository(t *testing.T) {
	const describe, create = "DescribeRepositories", "CreateRepository"
	type answers map[string]func(http.ResponseWriter)
	ok := func(w http.ResponseWriter) { fmt.Fprint(w, `{"repositories":[{}],"repository":{}}`) }
	fails := func(status int, code string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) { awsFails(w, status, code) }
	}
	missing, denied := fails(400, "RepositoryNotFoundException"), fails(400, "AccessDeniedException")
	for _, tt := range []struct {
		name    string
		host    string
		answers answers
		asked   string // by two calls
		want    string // of the error; empty is none
		refused bool
	}{
		{"there", ecrHost, answers{describe: ok}, describe, "", false},
		{"missing", ecrHost, answers{describe: missing, create: ok}, describe + " " + create, "", false},
		{"made by another", ecrHost, answers{describe: missing, create: fails(400, "RepositoryAlreadyExistsException")}, describe + " " + create, "", false},
		{"may not look", ecrHost, answers{describe: denied, create: fails(400, "RepositoryAlreadyExistsException")}, describe + " " + create, "", false},
		{"may not create", ecrHost, answers{describe: missing, create: denied}, strings.Repeat(" "+describe+" "+create, 2)[1:], "AccessDeniedException", true},
		{"create fails", ecrHost, answers{describe: missing, create: fails(500, "ServerException")}, strings.Repeat(" "+describe+" "+create, 2)[1:], "ServerException", false},
		{"cannot look", ecrHost, answers{describe: fails(500, "ServerException")}, describe + " " + describe, "", false},
		{"public", "public.ecr.aws", answers{}, "", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
				_, call, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
				var in struct {
					RegistryID, RepositoryName string
					RepositoryNames            []string
				}
				if err := json.NewDecoder(r.Body).Decode(&in); err != nil || in.RegistryID != "123456789012" ||
					in.RepositoryName+strings.Join(in.RepositoryNames, " ") != "team/app" {
					t.Errorf("%s of %+v, %v", call, in, err)
				}
				answer := tt.answers[call]
				if answer == nil {
					t.Errorf("asked for %s", call)
					answer = denied
				}
				answer(w)
			})
			environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "hush-key", "AWS_ENDPOINT_URL", s.URL)
			c := New(Config{})
			for range 2 {
				err := c.CreateRepository(t.Context(), tt.host, "team/app")
				if tt.want == "" && err != nil {
					t.Fatal(err)
				}
				if tt.want != "" {
					wantError(t, err, tt.refused, "team/app", ecrHost, tt.want)
				}
			}
			if got := strings.Join(s.requests(), " "); got != tt.asked {
				t.Errorf("asked for %q, want %q", got, tt.asked)
			}
		})
	}
}

// TestCreateRepositoryAgain checks that a repository is looked for again after a while, since
// it may have been deleted.
func TestCreateRepositoryAgain(t *testing.T) {
	s := newService(t, false, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"repositories":[{}]}`) })
	environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "secret", "AWS_ENDPOINT_URL", s.URL)
	now := time.Now()
	c := New(Config{})
	c.now = func() time.Time { return now }
	for range 3 {
		if err := c.CreateRepository(t.Context(), ecrHost, "app"); err != nil {
			t.Fatal(err)
		}
		now = now.Add(repositoryKnown * 6 / 10)
	}
	if got := s.requests(); len(got) != 2 {
		t.Errorf("asked %q", got)
	}
}

// serviceAccount makes the file of a Google service account whose token service is at uri.
func serviceAccount(t *testing.T, uri string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	file, err := json.Marshal(map[string]string{
		"type": "service_account", "client_email": "builder@project.example", "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(block)), "token_uri": uri,
	})
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, string(file))
}

func TestGoogleFile(t *testing.T) {
	s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		claims := strings.Split(r.FormValue("assertion"), ".")
		if len(claims) != 3 || r.FormValue("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
			t.Errorf("form %v", r.Form)
			return
		}
		payload, _ := base64.RawURLEncoding.DecodeString(claims[1])
		if !strings.Contains(string(payload), `"builder@project.example"`) || !strings.Contains(string(payload), googleScope) {
			t.Errorf("claims %s", payload)
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"ya29","token_type":"Bearer","expires_in":3600}`)
	})
	environ(t, "GOOGLE_APPLICATION_CREDENTIALS", serviceAccount(t, s.URL+"/token"))
	c := New(Config{})
	for _, host := range []string{"europe-docker.pkg.dev", "gcr.io", "us-docker.pkg.dev"} {
		got, err := c.Get(t.Context(), "gcr", host)
		if err != nil || got.Username != "oauth2accesstoken" || got.Password != "ya29" {
			t.Errorf("%s: %+v, %v", host, got, err)
		}
		if left := time.Until(got.Renew); left < 25*time.Minute || left > 30*time.Minute {
			t.Errorf("renewed in %v", left)
		}
	}
	if got := s.requests(); len(got) != 1 {
		t.Errorf("asked %q", got)
	}
}

func TestGoogleMetadata(t *testing.T) {
	s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/token" || r.Header.Get("Metadata-Flavor") != "Google" {
			t.Errorf("%v %v", r.URL, r.Header)
		}
		fmt.Fprint(w, `{"access_token":"ya29","expires_in":1800,"token_type":"Bearer"}`)
	})
	environ(t, "GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
	got, err := New(Config{}).Get(t.Context(), "gcloud", "gcr.io")
	if err != nil || got.Username != "oauth2accesstoken" || got.Password != "ya29" || got.Renew.Before(time.Now()) {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestGoogleFails(t *testing.T) {
	for _, tt := range []struct {
		name    string
		status  int
		body    string
		refused bool
		want    string
	}{
		{"refused", 400, `{"error":"invalid_grant","error_description":"no such account","hush":"hush"}`, true, "invalid_grant no such account"},
		{"broken", 503, `hush`, false, "status 503"},
		{"empty", 200, `{"hush":"hush"}`, false, "no access token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, false, func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(tt.status)
				fmt.Fprint(w, tt.body)
			})
			environ(t, "GOOGLE_APPLICATION_CREDENTIALS", serviceAccount(t, s.URL))
			_, err := New(Config{}).Get(t.Context(), "gcr", "gcr.io")
			wantError(t, err, tt.refused, "gcr", "gcr.io", tt.want)
		})
	}
	t.Run("no account", func(t *testing.T) {
		s := newService(t, false, http.NotFound)
		environ(t, "GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
		_, err := New(Config{}).Get(t.Context(), "gcr", "gcr.io")
		wantError(t, err, true, "gcr", "no service account")
	})
	t.Run("no file", func(t *testing.T) {
		environ(t, "GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(t.TempDir(), "missing"))
		_, err := New(Config{}).Get(t.Context(), "gcr", "gcr.io")
		wantError(t, err, false, "GOOGLE_APPLICATION_CREDENTIALS")
	})
}

func jwt(expires time.Time) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{}`)) + "." + enc(fmt.Appendf(nil, `{"exp":%d}`, expires.Unix())) + "." + enc([]byte("sig"))
}

// newAzure starts a server that is both the authority and the registry.
func newAzure(t *testing.T, check func(url.Values)) *service {
	var s *service
	s = newService(t, true, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/tenant-1/v2.0/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"token_endpoint":"%[1]s/tenant-1/oauth2/v2.0/token","authorization_endpoint":"%[1]s/a","issuer":"%[1]s/tenant-1/v2.0"}`, s.URL)
		case "/tenant-1/oauth2/v2.0/token":
			r.ParseForm()
			check(r.Form)
			fmt.Fprint(w, `{"access_token":"entra","token_type":"Bearer","expires_in":3600}`)
		case "/oauth2/exchange":
			if r.FormValue("grant_type") != "access_token" || r.FormValue("access_token") != "entra" || r.FormValue("tenant") != "tenant-1" ||
				"https://"+r.FormValue("service") != s.URL {
				t.Errorf("form %v", r.Form)
			}
			fmt.Fprintf(w, `{"refresh_token":%q}`, jwt(time.Now().Add(3*time.Hour)))
		default:
			t.Errorf("asked for %v", r.URL)
		}
	})
	return s
}

func azureClouds(s *service) *Clouds {
	c := New(Config{Client: func(string) (*http.Client, error) { return s.Client(), nil }})
	c.transport = s.Client()
	return c
}

func TestAzure(t *testing.T) {
	for _, tt := range []struct {
		name  string
		vars  []string
		check func(url.Values) bool
	}{
		{"secret", []string{"AZURE_CLIENT_SECRET", "s3cret"}, func(f url.Values) bool { return f.Get("client_secret") == "s3cret" }},
		{"workload identity", []string{"AZURE_FEDERATED_TOKEN_FILE", writeFile(t, "a.jwt")}, func(f url.Values) bool { return f.Get("client_assertion") == "a.jwt" }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newAzure(t, func(f url.Values) {
				if !tt.check(f) || f.Get("client_id") != "client-1" || !strings.Contains(f.Get("scope"), "https://containerregistry.azure.net/.default") {
					t.Errorf("form %v", f)
				}
			})
			environ(t, append([]string{"AZURE_TENANT_ID", "tenant-1", "AZURE_CLIENT_ID", "client-1", "AZURE_AUTHORITY_HOST", s.URL + "/"}, tt.vars...)...)
			c := azureClouds(s)
			host := strings.TrimPrefix(s.URL, "https://")
			for range 2 {
				got, err := c.Get(t.Context(), "acr-env", host)
				if err != nil || got.Username != "" || len(strings.Split(got.RefreshToken, ".")) != 3 {
					t.Fatalf("%+v, %v", got, err)
				}
				if left := time.Until(got.Renew); left < 85*time.Minute || left > 90*time.Minute {
					t.Errorf("renewed in %v", left)
				}
			}
			if got := s.requests(); len(got) != 3 {
				t.Errorf("asked %q", got)
			}
		})
	}
}

func TestAzureFails(t *testing.T) {
	for _, tt := range []struct {
		name     string
		token    int // status of the authority
		exchange int // status of the registry
		refused  bool
		want     string
	}{
		{"secret refused", 401, 200, true, "status 401: AADSTS7000215"},
		{"registry refuses", 200, 401, true, "exchanging the token at the registry: refused with status 401"},
		{"registry broken", 200, 502, false, "status 502"},
		{"no token", 200, 200, false, "no refresh token"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s *service
			s = newService(t, true, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				switch {
				case strings.HasSuffix(r.URL.Path, "/openid-configuration"):
					fmt.Fprintf(w, `{"token_endpoint":"%[1]s/token","authorization_endpoint":"%[1]s/a","issuer":"%[1]s/tenant-1/v2.0"}`, s.URL)
				case r.URL.Path == "/token" && tt.token != 200:
					w.WriteHeader(tt.token)
					fmt.Fprint(w, `{"error":"invalid_client","error_description":"AADSTS7000215: Invalid client secret provided. hush\r\nTrace"}`)
				case r.URL.Path == "/token":
					fmt.Fprint(w, `{"access_token":"hush","token_type":"Bearer","expires_in":3600}`)
				default:
					w.WriteHeader(tt.exchange)
					fmt.Fprint(w, `{"hush":"hush"}`)
				}
			})
			environ(t, "AZURE_TENANT_ID", "tenant-1", "AZURE_CLIENT_ID", "client-1", "AZURE_AUTHORITY_HOST", s.URL+"/", "AZURE_CLIENT_SECRET", "hush-hush")
			host := strings.TrimPrefix(s.URL, "https://")
			c := azureClouds(s)
			_, err := c.Get(t.Context(), "acr-env", host)
			wantError(t, err, tt.refused, "acr-env", host, tt.want)
		})
	}
}

func TestAzureScope(t *testing.T) {
	for host, want := range map[string]string{
		"x.azurecr.io": "https://containerregistry.azure.net/.default",
		"x.azurecr.cn": "https://management.chinacloudapi.cn/.default",
		"x.azurecr.us": "https://management.usgovcloudapi.net/.default",
	} {
		if got := azureScope(host); got != want {
			t.Errorf("%s: %s", host, got)
		}
	}
}

func TestOwns(t *testing.T) {
	for _, tt := range []struct {
		name, host string
		want       bool
	}{
		{"ecr-login", ecrHost, true},
		{"ecr-login", strings.ToUpper(ecrHost), true},
		{"ecr-login", ecrHost + ":443", true},
		{"ecr-login", "123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", true},
		{"ecr-login", "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", true},
		{"ecr-login", "public.ecr.aws", true},
		{"ecr-login", ecrHost + ".example.com", false},
		{"ecr-login", "registry-1.docker.io", false},
		{"ecr-login", "x.azurecr.io", false},
		{"gcr", "gcr.io", true},
		{"gcr", "eu.gcr.io", true},
		{"gcloud", "europe-docker.pkg.dev", true},
		{"gcr", "pkg.dev", false},
		{"gcr", "notgcr.io", false},
		{"gcr", "gcr.io.example.com", false},
		{"acr-env", "x.azurecr.io", true},
		{"acr-env", "x.azurecr.io:443", true},
		{"acr-env", "x.azurecr.cn", true},
		{"acr-env", "x.azurecr.io.example.com", false},
		{"acr-env", ".azurecr.io", false},
		{"acr-env", "azurecr.io", false},
		{"desktop", "gcr.io", false},
	} {
		if got := Owns(tt.name, tt.host); got != tt.want {
			t.Errorf("%s owns %s: %v", tt.name, tt.host, got)
		}
	}
}

// TestSlow has every request to every cloud hang.
func TestSlow(t *testing.T) {
	for name, setup := range map[string]func(t *testing.T, url string) (helper, host string){
		"ecr": func(t *testing.T, url string) (string, string) {
			environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "secret", "AWS_ENDPOINT_URL", url)
			return "ecr-login", ecrHost
		},
		"ecr by metadata": func(t *testing.T, url string) (string, string) {
			environ(t, "AWS_EC2_METADATA_SERVICE_ENDPOINT", url)
			return "ecr-login", ecrHost
		},
		"google by file": func(t *testing.T, url string) (string, string) {
			environ(t, "GOOGLE_APPLICATION_CREDENTIALS", serviceAccount(t, url))
			return "gcr", "gcr.io"
		},
		"google by metadata": func(t *testing.T, url string) (string, string) {
			environ(t, "GCE_METADATA_HOST", strings.TrimPrefix(url, "http://"))
			return "gcr", "gcr.io"
		},
		"azure by metadata": func(t *testing.T, url string) (string, string) {
			environ(t, "IDENTITY_ENDPOINT", url, "IDENTITY_HEADER", "h")
			return "acr-env", "x.azurecr.io"
		},
	} {
		t.Run(name, func(t *testing.T) {
			stop := make(chan struct{})
			s := newService(t, false, func(_ http.ResponseWriter, r *http.Request) {
				select {
				case <-r.Context().Done():
				case <-stop:
				}
			})
			defer close(stop)
			helper, host := setup(t, s.URL)
			c := New(Config{})
			// A busy machine may ask nothing within the first timeout.
			for _, c.timeout = range []time.Duration{200 * time.Millisecond, time.Second, 5 * time.Second} {
				start := time.Now()
				_, err := c.Get(t.Context(), helper, host)
				if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 30*time.Second {
					t.Errorf("after %v: %v", time.Since(start), err)
				}
				wantError(t, err, false, helper, host)
				if len(s.requests()) > 0 {
					break
				}
			}
			if len(s.requests()) == 0 {
				t.Error("nothing was asked")
			}

			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			c.timeout = time.Minute
			start := time.Now()
			if _, err := c.Get(ctx, helper, host); err == nil || time.Since(start) > 30*time.Second {
				t.Errorf("cancelled, after %v: %v", time.Since(start), err)
			}
		})
	}
}

// TestLog checks that no secret is logged when old credentials go on serving.
func TestLog(t *testing.T) {
	answers := 0
	s := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if answers++; answers > 1 {
			awsFails(w, 500, "ServerException")
			return
		}
		fmt.Fprintf(w, `{"authorizationData":[%s]}`, ecrToken("hush-password", time.Hour))
	})
	environ(t, "AWS_ACCESS_KEY_ID", "AKID", "AWS_SECRET_ACCESS_KEY", "hush-key", "AWS_ENDPOINT_URL", s.URL)
	var out bytes.Buffer
	c := New(Config{Log: zerolog.New(&out)})
	now := time.Now()
	c.now = func() time.Time { return now }
	for range 2 {
		if _, err := c.Get(t.Context(), "ecr-login", ecrHost); err != nil {
			t.Fatal(err)
		}
		now = now.Add(40 * time.Minute)
	}
	if !strings.Contains(out.String(), ecrHost) || strings.Contains(out.String(), "hush") {
		t.Errorf("logged %s", &out)
	}
}
