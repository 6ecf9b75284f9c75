package payload

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf16"
	"unicode/utf8"

	"handler/function/api"
)

const (
	maxKeys   = 64
	maxString = 1024 // bytes of a key, a signature, a name or a number
	maxDepth  = 32
)

// envelope is the text form of a body:
//
//	{"signature":"sha256=…","tenant":"acme","tar":"<base64>"}
//
// The keys come in any order. The tenant may be left out. Other keys are ignored.
type envelope struct {
	signature string
	tenant    string // "" if none is named
}

// read writes the decoded tar to w while it comes. encoding/json would hold the whole string
// in memory; read needs less than size, and about 100 KB at most. size is the size of text,
// or more. Each error is an *api.Error.
func (v *envelope) read(text io.Reader, size int64, w io.Writer) error {
	block := int(min(size, base64Block))
	err := v.readObject(&jsonReader{bufio.NewReaderSize(text, block)}, w, block)
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*api.Error](err); ok {
		return e
	}
	msg := err.Error()
	if errors.Is(err, io.EOF) {
		msg = "it is cut short"
	}
	return &api.Error{Code: api.BadEnvelope, Msg: "reading envelope: " + msg, Err: err}
}

func (v *envelope) readObject(r *jsonReader, w io.Writer, block int) error {
	keys := map[string]bool{}
	err := r.object(func(key string) error {
		if keys[key] {
			return fmt.Errorf("the key %q is there twice", key)
		}
		if keys[key] = true; len(keys) > maxKeys {
			return fmt.Errorf("more than %d keys", maxKeys)
		}
		switch key {
		case "signature":
			s, err := r.shortString()
			if err != nil {
				return fmt.Errorf("%q: %w", key, err)
			}
			v.signature = s
			return nil
		case "tenant":
			return v.readTenant(r)
		case "tar":
			d := newBase64Writer(w, block)
			if err := r.string(true, d.write); err != nil {
				return fmt.Errorf("%q: %w", key, err)
			}
			if err := d.close(); err != nil {
				return fmt.Errorf("%q: %w", key, err)
			}
			return nil
		}
		return r.skip(1)
	})
	if err != nil {
		return err
	}
	if !keys["tar"] {
		return errors.New(`no key "tar"`)
	}
	if _, err := r.token(); err != io.EOF {
		return errors.New("something else follows it")
	}
	return nil
}

// readTenant reads a value of any type, because the key means nothing where there is one tenant.
// Only a string names a tenant. It is cut, since no tenant has so long a name.
func (v *envelope) readTenant(r *jsonReader) error {
	if b, err := r.peek(); err != nil || b != '"' {
		return r.skip(1)
	}
	var name []byte
	err := r.string(false, func(p []byte) error {
		name = append(name, p[:min(len(p), maxString-len(name))]...)
		return nil
	})
	v.tenant = string(name)
	return err
}

// jsonReader reads JSON from a stream without holding all of it in memory.
type jsonReader struct{ *bufio.Reader }

// token reads the next byte that is not white space.
func (r *jsonReader) token() (byte, error) {
	for {
		b, err := r.ReadByte()
		if err != nil {
			return 0, err
		}
		switch b {
		case ' ', '\t', '\r', '\n':
		default:
			return b, nil
		}
	}
}

// peek returns the next token without reading it.
func (r *jsonReader) peek() (byte, error) {
	b, err := r.token()
	if err == nil {
		r.UnreadByte()
	}
	return b, err
}

func (r *jsonReader) expect(want byte) error {
	b, err := r.token()
	if err != nil {
		return err
	}
	if b != want {
		return fmt.Errorf("%q where %q should be", b, want)
	}
	return nil
}

// object reads an object. It calls member after each key and its colon; member reads the
// value.
func (r *jsonReader) object(member func(key string) error) error {
	if err := r.expect('{'); err != nil {
		return err
	}
	if b, err := r.peek(); err != nil {
		return err
	} else if b == '}' {
		return r.expect('}')
	}
	for {
		key, err := r.shortString()
		if err != nil {
			return err
		}
		if err := r.expect(':'); err != nil {
			return err
		}
		if err := member(key); err != nil {
			return err
		}
		b, err := r.token()
		if err != nil {
			return err
		}
		switch b {
		case '}':
			return nil
		case ',':
		default:
			return fmt.Errorf("%q where ',' or '}' should be", b)
		}
	}
}

// skip reads one value of any type.
func (r *jsonReader) skip(depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("values nested deeper than %d", maxDepth)
	}
	b, err := r.peek()
	if err != nil {
		return err
	}
	switch b {
	case '"':
		return r.string(false, func([]byte) error { return nil })
	case '{':
		return r.object(func(string) error { return r.skip(depth + 1) })
	case '[':
		return r.skipArray(depth)
	}
	return r.skipLiteral()
}

func (r *jsonReader) skipArray(depth int) error {
	if err := r.expect('['); err != nil {
		return err
	}
	if b, err := r.peek(); err != nil {
		return err
	} else if b == ']' {
		return r.expect(']')
	}
	for {
		if err := r.skip(depth + 1); err != nil {
			return err
		}
		b, err := r.token()
		if err != nil {
			return err
		}
		switch b {
		case ']':
			return nil
		case ',':
		default:
			return fmt.Errorf("%q where ',' or ']' should be", b)
		}
	}
}

// skipLiteral reads a number, true, false or null.
func (r *jsonReader) skipLiteral() error {
	var lit []byte
	for {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		if bytes.IndexByte([]byte(" \t\r\n,:]}[{\""), b) >= 0 {
			r.UnreadByte()
			break
		}
		if lit = append(lit, b); len(lit) > maxString {
			return fmt.Errorf("a value over %d bytes", maxString)
		}
	}
	if !json.Valid(lit) {
		return fmt.Errorf("%q is no JSON value", shorten(string(lit)))
	}
	return nil
}

func (r *jsonReader) shortString() (string, error) {
	var s []byte
	err := r.string(false, func(p []byte) error {
		if s = append(s, p...); len(s) > maxString {
			return fmt.Errorf("a string over %d bytes", maxString)
		}
		return nil
	})
	return string(s), err
}

// string reads a string, and calls emit with its pieces, unescaped. JSON forbids line breaks
// in a string that are not escaped. With lines set they pass: somebody who wraps base64 by
// hand leaves them there.
func (r *jsonReader) string(lines bool, emit func([]byte) error) error {
	if b, err := r.token(); err != nil {
		return err
	} else if b != '"' {
		return fmt.Errorf("%q where a string should begin", b)
	}
	for {
		if _, err := r.Peek(1); err != nil {
			return err
		}
		rest, _ := r.Peek(r.Buffered())
		if n := ordinary(rest, lines); n > 0 {
			if err := emit(rest[:n]); err != nil {
				return err
			}
			r.Discard(n)
			continue
		}
		switch b, _ := r.ReadByte(); b {
		case '"':
			return nil
		case '\\':
			p, err := r.escape()
			if err != nil {
				return err
			}
			if err := emit(p); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%q in a string", b)
		}
	}
}

// ordinary returns how many bytes at the beginning of p stand for themselves in a string.
func ordinary(p []byte, lines bool) int {
	for i, b := range p {
		if b == '"' || b == '\\' || b < ' ' && !(lines && (b == '\n' || b == '\r')) {
			return i
		}
	}
	return len(p)
}

// escape reads what follows a backslash.
func (r *jsonReader) escape() ([]byte, error) {
	b, err := r.ReadByte()
	if err != nil {
		return nil, err
	}
	switch b {
	case '"', '\\', '/':
		return []byte{b}, nil
	case 'b':
		return []byte{'\b'}, nil
	case 'f':
		return []byte{'\f'}, nil
	case 'n':
		return []byte{'\n'}, nil
	case 'r':
		return []byte{'\r'}, nil
	case 't':
		return []byte{'\t'}, nil
	case 'u':
		c, err := r.hex4()
		if err != nil {
			return nil, err
		}
		// Only a character above U+FFFF needs two escapes, a surrogate pair. No key or
		// value that counts has one, so pairs are not put together.
		if utf16.IsSurrogate(c) {
			c = utf8.RuneError
		}
		return utf8.AppendRune(nil, c), nil
	}
	return nil, fmt.Errorf("%q after a backslash", b)
}

func (r *jsonReader) hex4() (rune, error) {
	var c rune
	for range 4 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, err
		}
		switch {
		case '0' <= b && b <= '9':
			b -= '0'
		case 'a' <= b|0x20 && b|0x20 <= 'f':
			b = b | 0x20 - 'a' + 10
		default:
			return 0, fmt.Errorf(`%q after \u`, b)
		}
		c = c<<4 | rune(b)
	}
	return c, nil
}

// base64Writer decodes standard base64, with or without padding. Line breaks can be anywhere.
type base64Writer struct {
	w    io.Writer
	in   []byte // not decoded yet
	out  []byte
	n    int // characters, without padding
	pads int
}

// base64Block bounds the characters that are decoded at once.
const base64Block = 32 << 10

// newBase64Writer decodes about block characters at once, in whole groups of four.
func newBase64Writer(w io.Writer, block int) *base64Writer {
	block = max(block&^3, 4)
	return &base64Writer{w: w, in: make([]byte, 0, block), out: make([]byte, base64.RawStdEncoding.DecodedLen(block))}
}

func (d *base64Writer) write(p []byte) error {
	for len(p) > 0 {
		// Usually p has no padding and no line break, and is decoded in one piece.
		n := min(len(p), cap(d.in)-len(d.in))
		if i := bytes.IndexAny(p[:n], "=\r\n"); i >= 0 {
			n = i
		}
		if n > 0 {
			if d.pads > 0 {
				return errors.New("base64 goes on after its padding")
			}
			d.in = append(d.in, p[:n]...)
			d.n += n
			p = p[n:]
			if len(d.in) == cap(d.in) {
				if err := d.decode(); err != nil {
					return err
				}
			}
			continue
		}
		if p[0] == '=' {
			d.pads++
		}
		p = p[1:]
	}
	return nil
}

func (d *base64Writer) close() error {
	if d.pads > 2 || d.pads > 0 && (d.n+d.pads)%4 != 0 {
		return errors.New("wrong base64 padding")
	}
	return d.decode()
}

func (d *base64Writer) decode() error {
	n, err := base64.RawStdEncoding.Decode(d.out, d.in)
	if err != nil {
		return errors.New("not base64")
	}
	d.in = d.in[:0]
	_, err = d.w.Write(d.out[:n])
	return err
}
