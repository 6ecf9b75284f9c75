package buildkit

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/moby/buildkit/session/auth"
	"golang.org/x/crypto/nacl/sign"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"handler/function/api"
	"handler/function/registry"
)

// authServer answers the daemon's questions about registries, for one build.
//
// The daemon keeps the tokens that it is given, and uses them for every session that has the
// same key. So each build has a key of its own.
type authServer struct {
	auth.UnimplementedAuthServer
	grant *registry.Grant
	seed  []byte

	mu       sync.Mutex
	failures []*api.Error
}

func newAuthServer(grant *registry.Grant) *authServer {
	seed := make([]byte, sha256.Size)
	rand.Read(seed)
	return &authServer{grant: grant, seed: seed}
}

// Register makes authServer a session.Attachable.
func (s *authServer) Register(server *grpc.Server) { auth.RegisterAuthServer(server, s) }

// Credentials is asked for where a registry wants Basic authentication. The daemon also asks
// before it lets this build use the connection that another one has logged in with.
func (s *authServer) Credentials(ctx context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	user, password, err := s.grant.Basic(ctx, req.Host)
	if err != nil {
		return nil, s.fail(err)
	}
	return &auth.CredentialsResponse{Username: user, Secret: password}, nil
}

func (s *authServer) FetchToken(ctx context.Context, req *auth.FetchTokenRequest) (*auth.FetchTokenResponse, error) {
	tok, err := s.grant.Token(ctx, registry.TokenRequest{
		Host: req.Host, Realm: req.Realm, Service: req.Service, Scopes: req.Scopes,
	})
	if err != nil {
		return nil, s.fail(err)
	}
	return &auth.FetchTokenResponse{
		Token:     tok.Value,
		ExpiresIn: max(int64(tok.Expires.Sub(tok.IssuedAt).Seconds()), 1),
		IssuedAt:  tok.IssuedAt.Unix(),
	}, nil
}

// GetTokenAuthority must have an answer. Without a key, the daemon asks for the credentials
// themselves and fetches tokens with them.
func (s *authServer) GetTokenAuthority(_ context.Context, req *auth.GetTokenAuthorityRequest) (*auth.GetTokenAuthorityResponse, error) {
	key, err := s.key(req.Host, req.Salt)
	if err != nil {
		return nil, err
	}
	return &auth.GetTokenAuthorityResponse{PublicKey: key.Public().(ed25519.PublicKey)}, nil
}

func (s *authServer) VerifyTokenAuthority(_ context.Context, req *auth.VerifyTokenAuthorityRequest) (*auth.VerifyTokenAuthorityResponse, error) {
	key, err := s.key(req.Host, req.Salt)
	if err != nil {
		return nil, err
	}
	return &auth.VerifyTokenAuthorityResponse{Signed: sign.Sign(nil, req.Payload, (*[ed25519.PrivateKeySize]byte)(key))}, nil
}

func (s *authServer) key(host string, salt []byte) (ed25519.PrivateKey, error) {
	seed, err := hkdf.Key(sha256.New, s.seed, salt, "registry "+host, ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("deriving a token key: %w", err)
	}
	return ed25519.NewKeyFromSeed(seed), nil
}

// fail keeps err with its cause, and gives its message to the daemon. A report.Failure finds
// the message in the daemon's own error.
func (s *authServer) fail(err error) error {
	e, ok := errors.AsType[*api.Error](err)
	if !ok {
		return status.Error(codes.Unknown, "authentication failed")
	}
	s.mu.Lock()
	s.failures = append(s.failures, e)
	s.mu.Unlock()
	return status.Error(codes.PermissionDenied, e.Msg)
}

// failed returns the errors so far, the last one first.
func (s *authServer) failed() []*api.Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := slices.Clone(s.failures)
	slices.Reverse(list)
	return list
}
