package clouds

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

// docker-credential-acr-env uses an SDK that is no longer maintained, takes no context, and
// sends its token to any host that has ".azurecr.io" in its name. This helper has its name,
// reads the same environment, and prefers the same identities.

// maxAnswer bounds a registry's answer to the exchange, in bytes.
const maxAnswer = 1 << 20

func isAzure(host string) bool { return under(host, "azurecr.io", "azurecr.cn", "azurecr.us") }

func azureKey(host string) string { return "acr-env " + strings.ToLower(host) }

// azureScope returns the scope of the token that a registry exchanges. The registries of the
// national clouds take tokens for the resource manager.
func azureScope(host string) string {
	switch host = hostname(host); {
	case under(host, "azurecr.cn"):
		return "https://management.chinacloudapi.cn/.default"
	case under(host, "azurecr.us"):
		return "https://management.usgovcloudapi.net/.default"
	}
	return "https://containerregistry.azure.net/.default"
}

// azureIdentity returns the identity that the environment describes: a service principal, a
// workload identity, or else the machine's managed identity.
func (c *Clouds) azureIdentity() (azcore.TokenCredential, error) {
	var opts azcore.ClientOptions
	if c.transport != nil {
		opts.Transport = c.transport
	}
	private := privateAuthority(os.Getenv("AZURE_AUTHORITY_HOST"))
	switch {
	case os.Getenv("AZURE_CLIENT_SECRET") != "" || os.Getenv("AZURE_CLIENT_CERTIFICATE_PATH") != "":
		return azidentity.NewEnvironmentCredential(&azidentity.EnvironmentCredentialOptions{
			ClientOptions: opts, DisableInstanceDiscovery: private,
		})
	case os.Getenv("AZURE_FEDERATED_TOKEN_FILE") != "":
		return azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: opts, DisableInstanceDiscovery: private,
		})
	}
	managed := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: opts}
	if id := os.Getenv("AZURE_CLIENT_ID"); id != "" {
		managed.ID = azidentity.ClientID(id)
	}
	return azidentity.NewManagedIdentityCredential(managed)
}

// privateAuthority says whether an authority is not one of Microsoft's. Microsoft's do not
// know it, so that the SDK must not ask them about it.
func privateAuthority(authority string) bool {
	u, err := url.Parse(authority)
	if err != nil || u.Host == "" {
		return false
	}
	for _, known := range []cloud.Configuration{cloud.AzurePublic, cloud.AzureChina, cloud.AzureGovernment} {
		if k, err := url.Parse(known.ActiveDirectoryAuthorityHost); err == nil && k.Host == u.Host {
			return false
		}
	}
	return true
}

func (c *Clouds) azure(ctx context.Context, host string) (Credentials, error) {
	identity, err := c.azureIdentity()
	if err != nil {
		return Credentials{}, errors.New(text(err))
	}
	token, err := identity.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{azureScope(host)}})
	if err != nil {
		return Credentials{}, azureError(err)
	}
	refresh, err := c.azureExchange(ctx, host, token.Token)
	if err != nil {
		return Credentials{}, fmt.Errorf("exchanging the token at the registry: %w", err)
	}
	return Credentials{RefreshToken: refresh, expires: jwtExpiry(refresh)}, nil
}

// azureExchange exchanges a token of Entra's for a refresh token of the registry's, at the
// registry.
func (c *Clouds) azureExchange(ctx context.Context, host, token string) (string, error) {
	client, err := c.cfg.Client(host)
	if err != nil {
		return "", err
	}
	defer client.CloseIdleConnections()
	form := url.Values{"grant_type": {"access_token"}, "service": {host}, "access_token": {token}}
	if tenant := os.Getenv("AZURE_TENANT_ID"); tenant != "" {
		form.Set("tenant", tenant)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+host+"/oauth2/exchange", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := client.Do(req)
	if err != nil {
		return "", errors.New(text(err))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", answered(resp.StatusCode, "")
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return "", err
	}
	var answer struct {
		RefreshToken string `json:"refresh_token"`
	}
	if json.Unmarshal(body, &answer) != nil || answer.RefreshToken == "" {
		return "", errors.New("the answer holds no refresh token")
	}
	return answer.RefreshToken, nil
}

// jwtExpiry returns when a token expires according to its own text, or zero if the text does
// not say. The signature is not checked: the token came from its issuer.
func jwtExpiry(token string) time.Time {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return time.Time{}
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims struct {
		Expires int64 `json:"exp"` // seconds since 1970
	}
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Expires <= 0 {
		return time.Time{}
	}
	return time.Unix(claims.Expires, 0)
}

// entraCode matches the code of an error by which Microsoft's documentation can be searched.
var entraCode = regexp.MustCompile(`AADSTS\d+`)

func azureError(err error) error {
	var failed *azidentity.AuthenticationFailedError
	if errors.As(err, &failed) && failed.RawResponse != nil {
		// The error's text has the whole answer in it, and may be long.
		return answered(failed.RawResponse.StatusCode, entraCode.FindString(err.Error()))
	}
	return errors.New(text(err))
}
