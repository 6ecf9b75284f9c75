package clouds

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"os"
	"time"

	"cloud.google.com/go/compute/metadata"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google"
)

// go-containerregistry uses the same packages for Google, but it hides when a token
// expires, remembers a first failure for ever, and asks the metadata server without a
// deadline.

const (
	// googleUser is the user name whose password is an access token.
	googleUser  = "oauth2accesstoken"
	googleScope = "https://www.googleapis.com/auth/cloud-platform"
	googleFile  = "GOOGLE_APPLICATION_CREDENTIALS"
)

func isGoogle(host string) bool { return host == "gcr.io" || under(host, "gcr.io", "pkg.dev") }

func googleKey(string) string { return "google" }

func (c *Clouds) google(ctx context.Context, _ string) (Credentials, error) {
	var token *oauth2.Token
	var err error
	if os.Getenv(googleFile) != "" {
		token, err = googleFromFile(ctx)
	} else {
		token, err = googleFromMetadata(ctx)
	}
	if err != nil {
		return Credentials{}, googleError(err)
	}
	if token.AccessToken == "" {
		return Credentials{}, errors.New("the answer holds no access token")
	}
	return Credentials{Username: googleUser, Password: token.AccessToken, expires: token.Expiry}, nil
}

// googleFromFile reads the file anew each time: it is a mounted secret that may have changed.
func googleFromFile(ctx context.Context) (*oauth2.Token, error) {
	ctx = context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Transport: bound{ctx}})
	found, err := google.FindDefaultCredentials(ctx, googleScope)
	if err != nil {
		return nil, err
	}
	return found.TokenSource.Token()
}

// bound sends requests with its context. Those of a service account are made without one.
type bound struct{ ctx context.Context }

func (b bound) RoundTrip(req *http.Request) (*http.Response, error) {
	return http.DefaultTransport.RoundTrip(req.WithContext(b.ctx))
}

func googleFromMetadata(ctx context.Context) (*oauth2.Token, error) {
	answer, err := metadata.NewClient(nil).GetWithContext(ctx,
		"instance/service-accounts/default/token?"+url.Values{"scopes": {googleScope}}.Encode())
	if err != nil {
		return nil, err
	}
	var token struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
	}
	if json.Unmarshal([]byte(answer), &token) != nil {
		return nil, errors.New("the metadata server's answer is no token")
	}
	return &oauth2.Token{
		AccessToken: token.AccessToken,
		Expiry:      time.Now().Add(time.Duration(token.ExpiresIn) * time.Second),
	}, nil
}

func googleError(err error) error {
	if re := (*oauth2.RetrieveError)(nil); errors.As(err, &re) && re.Response != nil {
		var said struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		json.Unmarshal(re.Body, &said)
		return answered(re.Response.StatusCode, said.Error+" "+said.Description)
	}
	if me := (*metadata.Error)(nil); errors.As(err, &me) {
		return answered(me.Code, "")
	}
	if nd := metadata.NotDefinedError(""); errors.As(err, &nd) {
		return answered(http.StatusNotFound, "the instance has no service account")
	}
	return errors.New(text(err))
}
