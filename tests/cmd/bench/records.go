package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"handler/function/tests/client"
	"handler/function/tests/stack"
)

// attachesPerBuild is how often each build is followed before it is stopped.
const attachesPerBuild = 3

// records times what a NATS server for the records adds to a cached build, and how soon a build is
// followed and stopped through a replica that does not run it.
func (b *benchmark) records(ctx context.Context, w workload) error {
	bin, _, err := stack.BuildNATS(ctx, b.stack.Repo, os.Stderr)
	if err != nil {
		return err
	}
	servers, err := stack.StartNATS(ctx, stack.NATSConfig{Bin: bin, Dir: filepath.Join(b.stack.Dir, "bench-nats"), Servers: 1})
	for _, n := range servers {
		defer n.Kill()
	}
	if err != nil {
		return err
	}
	var functions []*stack.Function
	for _, url := range []string{"", servers[0].URL, servers[0].URL} {
		f, err := b.stack.Function(ctx, stack.FunctionConfig{Env: map[string]string{"nats_url": url}})
		if err != nil {
			return err
		}
		defer f.Kill()
		if url != "" {
			if err := hasRecords(ctx, f); err != nil {
				return err
			}
		}
		functions = append(functions, f)
	}
	if err := b.recorded(ctx, w, functions[0], functions[1]); err != nil {
		return fmt.Errorf("records, cached builds: %w", err)
	}
	if err := b.reached(ctx, w, functions[1], functions[2]); err != nil {
		return fmt.Errorf("records, builds of another replica: %w", err)
	}
	return nil
}

// hasRecords waits until a function has its store.
func hasRecords(ctx context.Context, f *stack.Function) error {
	for {
		l, err := f.Builds(ctx, "")
		if err != nil || l.Complete {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// recorded builds the same with and without a server, in turn.
func (b *benchmark) recorded(ctx context.Context, w workload, without, with *stack.Function) error {
	dir := filepath.Join(b.stack.Dir, "bench-records")
	if err := b.writeContext(dir, 300, 10<<10); err != nil {
		return err
	}
	body, err := stack.Tar(dir, map[string]string{"image": without.Image("bench/records:v1")})
	if err != nil {
		return err
	}
	var all [2]series
	for i := range w.records + 1 {
		for j := range all {
			j ^= i & 1 // each is the first of a pair as often as the other
			time.Sleep(settle)
			took, err := post(ctx, []*stack.Function{without, with}[j], body)
			if err != nil {
				return err
			}
			if i > 0 { // the first run fills the cache
				all[j] = append(all[j], took)
			}
		}
	}
	b.result.RecordsMS = millis(difference(all[1], all[0]))
	fmt.Printf("cached rebuild, 300 files, 3 MB\n  records in memory  %v\n  records in NATS    %v\n  more by            %v ms\n", all[0], all[1], b.result.RecordsMS)
	return nil
}

// difference is the median of what a's take more than b's, pair by pair.
func difference(a, b series) time.Duration {
	var all series
	for i := range a {
		all = append(all, a[i]-b[i])
	}
	return all.median()
}

// millis is d in ms, to a thousandth.
func millis(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// reached has one replica build what does not end by itself, and the other follow and stop it.
func (b *benchmark) reached(ctx context.Context, w workload, owner, other *stack.Function) error {
	var attach, cancel, gone series
	for range max(w.records/2, 1) {
		mark := stack.Mark()
		dir := filepath.Join(b.stack.Dir, "bench-"+mark)
		if err := stack.WriteContext(dir, stack.Dockerfile("FROM busybox", stack.Held(mark))); err != nil {
			return err
		}
		body, err := stack.Tar(dir, map[string]string{"image": owner.Image("bench/" + strings.ToLower(mark) + ":v1")})
		if err != nil {
			return err
		}
		type end struct {
			at  time.Time
			a   client.Answer
			err error
		}
		ended := make(chan end, 1)
		go func() {
			a, err := owner.Post(ctx, body, client.Accept(client.NDJSON), client.Header("X-Call-Id", mark))
			ended <- end{time.Now(), a, err}
		}()
		if err := b.step(ctx, mark, true); err != nil {
			return err
		}
		for range attachesPerBuild {
			took, err := attached(ctx, other, mark)
			if err != nil {
				return err
			}
			attach = append(attach, took)
		}
		began := time.Now()
		if a, err := other.Client.Stop(ctx, mark); err != nil || a.StatusCode != 202 {
			return fmt.Errorf("stopping: %v, %w", a, err)
		}
		if err := b.step(ctx, mark, false); err != nil {
			return err
		}
		gone = append(gone, time.Since(began))
		e := <-ended
		if e.err != nil || e.a.Code != "canceled" {
			return fmt.Errorf("a stopped build: %v, %w", e.a, e.err)
		}
		cancel = append(cancel, e.at.Sub(began))
	}
	b.result.AttachMS, b.result.CancelMS, b.result.CancelStepMS = millis(attach.median()), millis(cancel.median()), millis(gone.median())
	fmt.Printf("a build of another replica\n  GET log?follow=1 to the first line  %v\n  DELETE to the verdict of its caller %v\n  DELETE to the end of the RUN step   %v\n", attach, cancel, gone)
	return nil
}

// step waits until a RUN step with a mark is there, or is gone.
func (b *benchmark) step(ctx context.Context, mark string, there bool) error {
	for {
		steps, err := b.stack.Buildkitd.Steps()
		if err != nil || slices.ContainsFunc(steps, func(line string) bool { return strings.Contains(line, mark) }) == there {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// attached follows a build until its first line.
func attached(ctx context.Context, f *stack.Function, id string) (time.Duration, error) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	l, err := f.ReadLog(ctx, id, "follow=1", func(client.Line) { leave() })
	if l.First == 0 {
		return 0, fmt.Errorf("following: %v, %w", l.Answer, err)
	}
	return l.First, nil
}
