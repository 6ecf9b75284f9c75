// Command tenant-forget removes what the builder keeps of a tenant: the contexts that the tenant
// sent ahead and its cache, which are in the builder's own repositories, and the records and logs
// of its builds in NATS. The tenant must be out of the file of tenants before. The command prints
// what it has removed, what it could not remove, and what else there is of the tenant elsewhere.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"handler/function/owned"
	"handler/function/records/jetstream"
	"handler/function/registry"
	"handler/function/signature"
	"handler/function/tenants"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tenant-forget:", err)
		os.Exit(1)
	}
}

// timeout is for one repository, and for the records.
const timeout = 30 * time.Minute

// options are what the command line says.
type options struct {
	id              string
	contexts, cache string            // repositories; empty for none
	registryConfig  string            // a file; empty for no credentials
	cas             map[string]string // files, by the registry's host
	tenants         []string          // files

	nats          string // the addresses of servers; empty for none
	access        jetstream.Access
	payloadSecret string // a file
}

func parse(args []string, help io.Writer) (*options, error) {
	o := &options{cas: make(map[string]string)}
	f := flag.NewFlagSet("tenant-forget", flag.ContinueOnError)
	f.SetOutput(help)
	f.StringVar(&o.id, "id", "", "the tenant's `id`")
	f.StringVar(&o.contexts, "contexts", "", "the function's context_repository")
	f.StringVar(&o.cache, "cache", "", "the function's cache_repository; http:// before it asks the registry over plain http")
	f.StringVar(&o.registryConfig, "registry-config", "", "the registry config, a `file`")
	f.Func("ca", "`host=file`: the CA of a registry", func(v string) error {
		host, file, ok := strings.Cut(v, "=")
		if !ok || host == "" || file == "" {
			return errors.New("want host=file")
		}
		o.cas[host] = file
		return nil
	})
	f.Func("tenants", "a `file` of tenants, which must not have the id any more", func(v string) error {
		o.tenants = append(o.tenants, v)
		return nil
	})
	f.StringVar(&o.nats, "nats", "", "the function's nats_url, with records and logs of builds")
	f.StringVar(&o.access.Credential, "nats-credential", "", "the function's secret nats-credential, a `file`")
	f.StringVar(&o.access.CA, "nats-ca", "", "the function's secret nats-ca, a `file`")
	f.StringVar(&o.payloadSecret, "payload-secret", "", "the payload secret, a `file`: the names of records are made with its lines")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("%q is no flag", f.Arg(0))
	case o.contexts == "" && o.cache == "" && o.nats == "":
		return nil, errors.New("neither a repository of contexts nor one of cache nor NATS is named, so there is nothing to remove")
	case o.nats != "" && o.payloadSecret == "":
		return nil, errors.New("without the payload secret, a tenant's records in NATS cannot be told from those of others")
	}
	return o, nil
}

func run(ctx context.Context, args []string, out, help io.Writer) error {
	o, err := parse(args, help)
	if err != nil {
		return err
	}
	if err := o.check(); err != nil {
		return err
	}
	var roots [][]byte
	if o.nats != "" {
		if roots, err = readRoots(o.payloadSecret); err != nil {
			return err
		}
	}
	log := zerolog.New(os.Stderr).Level(zerolog.WarnLevel)
	credentials := registry.New(registry.Config{File: o.registryConfig, CAFiles: o.cas, Log: log})
	var failed error
	for _, r := range []struct {
		repository string
		tags       *regexp.Regexp
	}{{o.contexts, contextTags(o.id)}, {o.cache, cacheTags(o.id)}} {
		if r.repository == "" {
			continue
		}
		if err := remove(ctx, credentials, r.repository, r.tags, out); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", r.repository, err))
		}
	}
	if o.nats == "" {
		fmt.Fprintf(out, stays, o.id, recordsStay)
		return failed
	}
	if err := o.removeRecords(ctx, roots, out); err != nil {
		failed = errors.Join(failed, fmt.Errorf("records: %w", err))
	}
	fmt.Fprintf(out, stays, o.id, otherRecordsStay)
	return failed
}

// readRoots returns the lines of the payload secret.
func readRoots(name string) ([][]byte, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the payload secret: %w", err)
	}
	keys, _ := signature.ParseKeys(text)
	if len(keys) == 0 {
		return nil, fmt.Errorf("reading the payload secret: %s has no key", name)
	}
	return keys, nil
}

// removeRecords removes the records and logs of builds that have ended, and says how many.
func (o *options) removeRecords(ctx context.Context, roots [][]byte, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	f, err := jetstream.Forget(ctx, jetstream.Options{
		URL: o.nats, NATS: o.access.Options(), Roots: roots,
		Problem: func(err error) { fmt.Fprintln(out, "records:", err) },
	}, o.id)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "records: %d removed\n", f.Removed)
	if f.Running > 0 {
		return fmt.Errorf("%d left, of builds that run: run this again when they have ended", f.Running)
	}
	return nil
}

// check wants an id of the right form that no tenant has any more.
func (o *options) check() error {
	if !tenants.IsID(o.id) {
		return fmt.Errorf("%q is no id of a tenant", o.id)
	}
	if len(o.tenants) == 0 {
		return nil
	}
	var files []tenants.File
	for _, name := range o.tenants {
		data, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("reading tenants: %w", err)
		}
		files = append(files, tenants.File{Name: name, Data: data})
	}
	set, err := tenants.Read(files, tenants.Installation{})
	if err != nil {
		return fmt.Errorf("reading tenants: %w", err)
	}
	if t := set.ByID(o.id); t != nil {
		return fmt.Errorf("%s is the id of tenant %s: remove the tenant from the file first", o.id, t.Name)
	}
	return nil
}

// contextTags matches the tags of a tenant's contexts, as package contexts makes them.
func contextTags(id string) *regexp.Regexp {
	return regexp.MustCompile("^" + regexp.QuoteMeta(id) + "-sha256-[0-9a-f]{64}$")
}

// cacheTags matches the tags of a tenant's cache: isolation.Key.SharedKey, and "-os-arch" or
// "-os-arch-variant" for a part of an image. The tags of a tenant whose id begins with this id
// and "-" have more before the SharedKey, and so do not match: ids are shorter than a SharedKey.
func cacheTags(id string) *regexp.Regexp {
	return regexp.MustCompile("^" + regexp.QuoteMeta(id) + "-[0-9a-f]{40}(-[a-z0-9]{1,10}){0,3}$")
}

// remove removes the tags that match from a repository, and prints them and those that are left.
func remove(ctx context.Context, credentials *registry.Credentials, repository string, tags *regexp.Regexp, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := owned.New(owned.Config{
		Repository: repository,
		Login:      credentials.Login,
		RootCAs:    credentials.RootCAs,
	})
	if err != nil {
		return err
	}
	removed, left, err := r.Remove(ctx, tags.MatchString)
	if err != nil && len(removed)+len(left) == 0 {
		return err
	}
	fmt.Fprintf(out, "%s: %d removed\n", repository, len(removed))
	for _, tag := range removed {
		fmt.Fprintf(out, "  %s\n", tag)
	}
	if len(left) > 0 {
		fmt.Fprintf(out, "%s: %d left, for the registry's own tools\n", repository, len(left))
		for _, reference := range left {
			fmt.Fprintf(out, "  %s\n", reference)
		}
	}
	return err
}

// stays says what else there is of a tenant. Its arguments are the tenant's id and a line about
// records.
const stays = `Of %s there still is:
  in the registries: the images that it pushed; and the bytes of what was removed, until garbage collection
  on the daemons: its layers, contexts and cache mounts, until garbage collection or buildctl prune
  on the daemons: the history of its builds, for the time in buildkitd.toml
  in the memory of the function: the records and logs of its builds, for a day at most
%s  in the log: the lines of its builds
`

const (
	recordsStay = `  in NATS, if the function has nats_url: the records and logs of its builds, for a week; -nats and -payload-secret remove them
`
	otherRecordsStay = `  in NATS: the records and logs of its builds under lines that the payload secret no longer has, for a week
`
)
