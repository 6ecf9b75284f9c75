// Package batch has lines of a log that follow one another, in one piece of memory, in the form
// in which they go into a store.
package batch

import (
	"encoding/binary"
	"errors"
	"iter"
)

// Size is how many bytes a batch takes before the next line begins another.
const Size = 64 << 10

// Batch is some lines of a log. The number of the first is followed by each line with its length
// before it, all numbers as varints.
type Batch struct {
	First uint64 // number of the first line
	Count uint64 // of lines
	data  []byte // the lines
}

// New is an empty batch whose first line has this number.
func New(first uint64) *Batch { return &Batch{First: first} }

// Next is the number of the line after the last.
func (b *Batch) Next() uint64 { return b.First + b.Count }

// Cost is the memory that a batch takes.
func (b *Batch) Cost() int { return cap(b.data) + 64 }

// Fits says whether another line has room.
func (b *Batch) Fits(line string) bool {
	return b.Count == 0 || len(b.data)+binary.MaxVarintLen32+len(line) <= Size
}

// Full says whether a line of ordinary length has no more room.
func (b *Batch) Full() bool { return len(b.data) >= Size-256 }

// Add copies a line to the end. The caller has asked Fits.
func (b *Batch) Add(line string) {
	b.data = binary.AppendUvarint(b.data, uint64(len(line)))
	b.data = append(b.data, line...)
	b.Count++
}

// Clone returns a batch that later Adds to b do not change. It shares the memory of the lines,
// which Add never changes.
func (b *Batch) Clone() *Batch {
	c := *b
	c.data = b.data[:len(b.data):len(b.data)]
	return &c
}

// All returns the lines and their numbers.
func (b *Batch) All() iter.Seq2[uint64, string] {
	data, n := b.data, b.First
	return func(yield func(uint64, string) bool) {
		for len(data) > 0 {
			size, w := binary.Uvarint(data)
			if !yield(n, string(data[w:w+int(size)])) {
				return
			}
			data, n = data[w+int(size):], n+1
		}
	}
}

// AppendTo appends the batch as Parse reads it.
func (b *Batch) AppendTo(out []byte) []byte {
	return append(binary.AppendUvarint(out, b.First), b.data...)
}

// Parse reads what AppendTo wrote. The batch keeps data.
func Parse(data []byte) (*Batch, error) {
	first, w := binary.Uvarint(data)
	if w <= 0 || first == 0 {
		return nil, errors.New("reading a batch of lines: it has no first number")
	}
	b := &Batch{First: first, data: data[w:]}
	for rest := b.data; len(rest) > 0; b.Count++ {
		size, w := binary.Uvarint(rest)
		if w <= 0 || size > uint64(len(rest)-w) {
			return nil, errors.New("reading a batch of lines: it is cut")
		}
		rest = rest[w+int(size):]
	}
	if first > first+b.Count {
		return nil, errors.New("reading a batch of lines: its numbers are too large")
	}
	return b, nil
}
