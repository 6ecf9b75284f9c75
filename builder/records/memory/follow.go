package memory

import (
	"context"
	"iter"

	"handler/function/records"
	"handler/function/records/batch"
)

// Follow reads one batch at a time, outside the lock. The batch under the end of the log still
// grows: Follow reads a Clone.
func (s *Store) Follow(ctx context.Context, ref records.Ref, after uint64, wait bool) iter.Seq2[records.Line, error] {
	return s.followers.Follow(func(out *records.Pacer) {
		s.mu.Lock()
		b := s.find(ref)
		s.mu.Unlock()
		if b == nil {
			out.Fail(records.ErrNotFound)
			return
		}
		for next := after + 1; ; {
			lines, ended, changed := b.from(next)
			if lines == nil {
				if ended || !wait || !out.Wait(ctx, changed) {
					return
				}
				continue
			}
			if !out.Batch(lines, next) {
				return
			}
			next = lines.Next()
		}
	})
}

// from returns the batch that has line n, or the next batch if n was dropped, or nil if there is
// none; whether there will be no more; and what is closed when there are. The latest batch of a log
// is never dropped.
func (b *build) from(n uint64) (lines *batch.Batch, ended bool, changed <-chan struct{}) {
	s := b.store
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, l := range b.log {
		if l.Next() > n {
			if i == len(b.log)-1 {
				l = l.Clone()
			}
			lines = l
			break
		}
	}
	return lines, !b.rec.Running(), b.changed
}
