package clouds

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecr/types"
	"github.com/aws/aws-sdk-go-v2/service/ecrpublic"
	"github.com/aws/smithy-go"
	"github.com/awslabs/amazon-ecr-credential-helper/ecr-login/api"
)

// The client of Amazon's helper takes no context, swallows errors and keeps tokens in a
// file. Only its parser of registry names is used here; the SDK does the rest.

// publicRegion is the only region that has the API of public.ecr.aws.
const publicRegion = "us-east-1"

func isAmazon(host string) bool {
	_, err := api.ExtractRegistry(host)
	return err == nil
}

// amazonKey returns one key for each region: a token is good for all registries of its
// region that the role may use, also those of other accounts.
func amazonKey(host string) string {
	reg, err := api.ExtractRegistry(strings.ToLower(host))
	if err != nil {
		return "ecr-login " + host
	}
	return fmt.Sprintf("ecr-login %s %s %t", reg.Service, reg.Region, reg.FIPS)
}

func amazonRegistry(host string) (*api.Registry, error) {
	reg, err := api.ExtractRegistry(strings.ToLower(host))
	if err != nil {
		return nil, errors.New("not the name of an ECR registry")
	}
	return reg, nil
}

// amazonConfig reads the configuration anew each time: the files that the environment names
// may have changed.
func amazonConfig(ctx context.Context, reg *api.Registry) (aws.Config, error) {
	region := reg.Region
	if reg.Service == api.ServiceECRPublic {
		region = publicRegion
	}
	opts := []func(*config.LoadOptions) error{config.WithRegion(region)}
	if reg.FIPS {
		opts = append(opts, config.WithUseFIPSEndpoint(aws.FIPSEndpointStateEnabled))
	}
	return config.LoadDefaultConfig(ctx, opts...)
}

func (c *Clouds) amazon(ctx context.Context, host string) (Credentials, error) {
	reg, err := amazonRegistry(host)
	if err != nil {
		return Credentials{}, err
	}
	cfg, err := amazonConfig(ctx, reg)
	if err != nil {
		return Credentials{}, amazonError(err)
	}
	var creds Credentials
	var token *string
	if reg.Service == api.ServiceECRPublic {
		out, err := ecrpublic.NewFromConfig(cfg).GetAuthorizationToken(ctx, &ecrpublic.GetAuthorizationTokenInput{})
		if err != nil {
			return Credentials{}, amazonError(err)
		}
		if data := out.AuthorizationData; data != nil {
			token, creds.expires = data.AuthorizationToken, aws.ToTime(data.ExpiresAt)
		}
	} else {
		out, err := ecr.NewFromConfig(cfg).GetAuthorizationToken(ctx, &ecr.GetAuthorizationTokenInput{})
		if err != nil {
			return Credentials{}, amazonError(err)
		}
		if len(out.AuthorizationData) > 0 {
			data := out.AuthorizationData[0]
			token, creds.expires = data.AuthorizationToken, aws.ToTime(data.ExpiresAt)
		}
	}
	decoded, err := base64.StdEncoding.DecodeString(aws.ToString(token))
	user, password, ok := strings.Cut(string(decoded), ":")
	if err != nil || !ok || user == "" || password == "" {
		return Credentials{}, errors.New("the answer holds no authorization token")
	}
	creds.Username, creds.Password = user, password
	return creds, nil
}

// CreateRepository creates a repository in ECR if it is missing, but none in the public
// registry. If it cannot find out whether the repository is missing, that is no error: the
// push will tell.
func (c *Clouds) CreateRepository(ctx context.Context, host, repository string) error {
	reg, err := amazonRegistry(host)
	if err != nil || reg.Service != api.ServiceECR {
		return nil
	}
	key := host + "/" + repository
	c.mu.Lock()
	seen, ok := c.known[key]
	c.mu.Unlock()
	if ok && c.now().Sub(seen) < repositoryKnown {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	there, err := c.createRepository(ctx, reg, repository)
	if err != nil {
		return fmt.Errorf("creating repository %q at %s: %w", repository, host, c.late(ctx, err))
	}
	if there {
		now := c.now()
		c.mu.Lock()
		defer c.mu.Unlock()
		for key, seen := range c.known {
			if now.Sub(seen) >= repositoryKnown {
				delete(c.known, key)
			}
		}
		c.known[key] = now
	}
	return nil
}

// createRepository looks for the repository, creates it if it is missing, and says whether
// it is there now.
func (c *Clouds) createRepository(ctx context.Context, reg *api.Registry, repository string) (there bool, err error) {
	log := c.cfg.Log.With().Str("registry", reg.ID).Str("region", reg.Region).Str("repository", repository).Logger()
	cfg, err := amazonConfig(ctx, reg)
	if err != nil {
		log.Warn().Str("error", amazonError(err).Error()).Msg("cannot look for the repository")
		return false, nil
	}
	client := ecr.NewFromConfig(cfg)
	// The repository is looked for first: a role that may push to it may lack the right to
	// create it.
	_, err = client.DescribeRepositories(ctx, &ecr.DescribeRepositoriesInput{
		RegistryId: &reg.ID, RepositoryNames: []string{repository},
	})
	if err == nil {
		return true, nil
	}
	// A role may lack the right to look, too. Then creating it tells whether it is there.
	if missing := new(types.RepositoryNotFoundException); !errors.As(err, &missing) && !errors.Is(amazonError(err), ErrRefused) {
		log.Warn().Str("error", amazonError(c.late(ctx, err)).Error()).Msg("cannot look for the repository")
		return false, nil
	}
	_, err = client.CreateRepository(ctx, &ecr.CreateRepositoryInput{RegistryId: &reg.ID, RepositoryName: &repository})
	if exists := new(types.RepositoryAlreadyExistsException); errors.As(err, &exists) {
		return true, nil
	}
	if err != nil {
		return false, amazonError(err)
	}
	log.Info().Msg("created the repository")
	return true, nil
}

// amazonError returns an SDK's error without its URL and request ids.
func amazonError(err error) error {
	if ae := smithy.APIError(nil); errors.As(err, &ae) {
		what := ae.ErrorCode() + ": " + ae.ErrorMessage()
		// A throttled request has status 400 too, and is not refused.
		if _, throttled := retry.DefaultThrottleErrorCodes[ae.ErrorCode()]; throttled {
			return errors.New(clean(what))
		}
		if re := (*awshttp.ResponseError)(nil); errors.As(err, &re) {
			return answered(re.HTTPStatusCode(), what)
		}
		return errors.New(clean(what))
	}
	return errors.New(text(err))
}
