// Package payload turns the body of a request into a config, secrets and a build context.
// It stores the body while the body is hashed for its signature. Once the signature has
// passed, it decompresses and indexes the tar in the body, and serves the build context out
// of the stored tar. It unpacks nothing onto a file system.
package payload

import "handler/function/budget"

// Limits bound what a client may send. A limit of zero lets nothing pass. An error names the
// limit by the function's setting.
type Limits struct {
	Body     int64 // bytes of the body, as it is sent
	Unpacked int64 // bytes of the tar, decompressed
	Config   int64 // bytes of com.openfaas.docker.config
	Secrets  int64 // bytes of com.openfaas.secrets
	Names    int64 // bytes of all paths and link targets together; the same number again bounds long extended headers
	Entries  int   // of the tar, with the parent directories that it leaves out
	Path     int   // bytes of one path or link target
}

// Options say how to receive a payload.
type Options struct {
	Limits Limits

	// Dir is where a payload goes that does not fit into memory.
	Dir string

	// InMemory is how many bytes of a body, or of the tar in it, are kept in memory. A
	// larger one lies in a file in Dir. The file has no name.
	InMemory int64

	// HeadSize is how many bytes of a body are received in one goroutine and little
	// memory. Larger is called once, before a larger body goes on as a stream. An error
	// of Larger ends the body. Larger may be nil.
	HeadSize int64
	Larger   func() error

	// NoRoom is called when HeadDisk, or later Disk, is spent. If it returns nil, Receive
	// tries again. If it returns an error, or is nil, the body ends.
	NoRoom func() error

	// A body draws on HeadMemory and HeadDisk until Larger is called, and on Memory and
	// Disk from then on. The Spool closes all four. A nil account counts nothing.
	HeadMemory, HeadDisk, Memory, Disk *budget.Account

	// Gate is shared by all bodies that are received as streams. It may be nil.
	Gate Gate

	// ContentKey keys the hashes of files' contents.
	ContentKey [32]byte

	// SHA256 sums the whole body while it arrives. Without it, a plain tar is summed
	// when Spool.SHA256 is called.
	SHA256 bool

	// ContextOnly is for a build context that is sent ahead. The tar must hold context/,
	// needs no config, and must not be in a text envelope.
	ContextOnly bool

	// Raw keeps the body as it was sent, for Spool.Raw, and drops the tar in it. Then
	// the Context cannot be read.
	Raw bool
}

// Payload is what a client sent, after the checks of its form.
type Payload struct {
	Config  []byte   // nil if there is none, which only ContextOnly allows
	Secrets []byte   // nil if there are none
	Context *Context // nil if there is none; then the config may say where it is

	// Warnings name the parts of the tar that are ignored.
	Warnings []string

	memory int64 // bytes that the index has taken
}
