// Tar archives: ustar, with PAX records for what it has no room for.

const BLOCK = 512;
const encoder = new TextEncoder();

const PIECE = 1 << 20;
const SMALL = 256 * 1024;
const AHEAD = 64;

// An entry is {name, flag, mode, mtime, link, data}: flag is the type's character
// ("0" file, "1" hard link, "2" symbolic link, "5" directory), mode is a number
// or a function of a file's first bytes, mtime is in seconds, data is a Blob and
// only a file's.

// tarStream is an archive of entries, which are read while it is. Small files
// are read many at once and passed on by the megabyte: browsers take a
// millisecond for each read, however short.
function tarStream(entries) {
  const reads = [];
  const read = (i) => {
    for (let next = reads.length; next < entries.length && next < i + AHEAD; next++) {
      const data = entries[next].data;
      reads[next] = data && bytes(data.size > SMALL ? data.slice(0, BLOCK) : data);
      // Whoever awaits it is told; until then nobody need be.
      reads[next]?.catch(() => {});
    }
    return reads[i];
  };
  async function* blocks() {
    for (const [i, entry] of entries.entries()) {
      const start = await read(i);
      reads[i] = undefined;
      const size = entry.data ? entry.data.size : 0;
      const mode = typeof entry.mode === "function" ? entry.mode(start ?? new Uint8Array()) : entry.mode;
      yield* headers({ ...entry, mode }, size);
      if (size > SMALL) yield* chunks(entry.data.stream());
      else if (size > 0) yield start;
      yield padding(size);
    }
    yield new Uint8Array(2 * BLOCK);
  }
  const source = pieces(blocks());
  return new ReadableStream({
    async pull(controller) {
      const { value, done } = await source.next();
      if (done) controller.close();
      else controller.enqueue(value);
    },
    cancel: () => source.return(),
  });
}

async function* chunks(readable) {
  const reader = readable.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

// pieces joins what is small.
async function* pieces(parts) {
  let piece = new Uint8Array(PIECE);
  let used = 0;
  for await (const part of parts) {
    if (used + part.length > PIECE) {
      yield piece.subarray(0, used);
      piece = new Uint8Array(PIECE);
      used = 0;
    }
    if (part.length > PIECE) {
      yield part;
    } else {
      piece.set(part, used);
      used += part.length;
    }
  }
  yield piece.subarray(0, used);
}

function* headers(entry, size) {
  const records = {};
  if (!fits(entry.name, 100)) records.path = entry.name;
  if (entry.link && !fits(entry.link, 100)) records.linkpath = entry.link;
  if (size >= 8 ** 11) records.size = String(size);
  if (Object.keys(records).length > 0) {
    const data = paxRecords(records);
    yield header({ name: "PaxHeaders/" + entry.name, flag: "x", mode: 0o644, mtime: 0 }, data.length);
    yield data;
    yield padding(data.length);
  }
  yield header(entry, size);
}

function fits(text, length) {
  return text.length <= length && /^[\x20-\x7e]*$/.test(text);
}

function padding(size) {
  return new Uint8Array((BLOCK - (size % BLOCK)) % BLOCK);
}

function header({ name, flag, mode, mtime, link }, size) {
  const block = new Uint8Array(BLOCK);
  const text = (at, value) => block.set(encoder.encode(value), at);
  // Where a name does not fit, a PAX record has it.
  const ascii = (value) => value.replace(/[^\x20-\x7e]/g, "_").slice(0, 100);
  const octal = (at, digits, value) => text(at, value.toString(8).padStart(digits, "0"));
  text(0, ascii(name));
  octal(100, 7, mode & 0o7777);
  octal(108, 7, 0);
  octal(116, 7, 0);
  octal(124, 11, size < 8 ** 11 ? size : 0);
  octal(136, 11, Math.min(Math.max(Math.trunc(mtime), 0), 8 ** 11 - 1));
  text(148, "        ");
  text(156, flag);
  if (link) text(157, ascii(link));
  text(257, "ustar\x0000");
  octal(148, 6, block.reduce((sum, byte) => sum + byte, 0));
  block[154] = 0;
  return block;
}

// A record begins with its own length in bytes, these digits included.
function paxRecords(records) {
  let all = "";
  for (const [key, value] of Object.entries(records)) {
    const rest = ` ${key}=${value}\n`;
    const bytes = encoder.encode(rest).length;
    let length = bytes + String(bytes).length;
    length = bytes + String(length).length;
    all += length + rest;
  }
  return encoder.encode(all);
}

// readTar returns the entries of an archive. It fails on what is no archive.
async function readTar(blob) {
  const entries = [];
  const window = blobWindow(blob);
  let pax = {};
  for (let at = 0; ; ) {
    const block = await window(at, BLOCK);
    if (block.length < BLOCK) throw new Error("the archive ends too early");
    if (block.every((byte) => byte === 0)) return entries;
    if (!sumsUp(block)) throw new Error(entries.length > 0 ? "the archive is damaged" : "this is not a tar");
    const flag = String.fromCharCode(block[156] || 48);
    const size = pax.size ? Number(pax.size) : number(block, 124, 12);
    const data = blob.slice(at + BLOCK, at + BLOCK + size);
    if (!(size >= 0) || data.size < size) throw new Error("the archive ends too early");
    at += BLOCK + Math.ceil(size / BLOCK) * BLOCK;

    if ("xLKg".includes(flag) && size > 1 << 20) throw new Error("the archive has a header of more than 1 MiB");
    if (flag === "x") {
      Object.assign(pax, parsePax(await bytes(data)));
    } else if (flag === "L") {
      pax.path = string(await bytes(data));
    } else if (flag === "K") {
      pax.linkpath = string(await bytes(data));
    } else if (flag !== "g") {
      const ustar = string(block.subarray(257, 262)) === "ustar";
      const gnu = block[262] === 32;
      const prefix = ustar && !gnu ? string(block.subarray(345, 500)) : "";
      const name = string(block.subarray(0, 100));
      entries.push({
        name: pax.path ?? (prefix ? prefix + "/" + name : name),
        flag: flag === "7" ? "0" : flag,
        mode: number(block, 100, 8),
        mtime: pax.mtime ? Number(pax.mtime) : number(block, 136, 12),
        link: pax.linkpath ?? string(block.subarray(157, 257)),
        data: size > 0 ? data : undefined,
      });
      pax = {};
    }
  }
}

// blobWindow reads a Blob by the megabyte: a read for each header takes minutes
// where there are many.
function blobWindow(blob) {
  let start = 0;
  let buffer = new Uint8Array(0);
  return async (at, length) => {
    if (at < start || at + length > start + buffer.length) {
      start = at;
      buffer = await bytes(blob.slice(at, at + Math.max(length, 1 << 20)));
    }
    return buffer.subarray(at - start, at - start + length);
  };
}

async function bytes(blob) {
  return new Uint8Array(await blob.arrayBuffer());
}

// string reads a field up to its first NUL.
function string(field) {
  const end = field.indexOf(0);
  return new TextDecoder().decode(end < 0 ? field : field.subarray(0, end));
}

// number reads octal digits, or GNU's binary form of large numbers.
function number(block, at, length) {
  const field = block.subarray(at, at + length);
  if (field[0] & 0x80) {
    return field.subarray(1).reduce((n, byte) => n * 256 + byte, field[0] & 0x7f);
  }
  return parseInt(string(field).trim() || "0", 8);
}

function sumsUp(block) {
  let sum = 0;
  for (let i = 0; i < BLOCK; i++) sum += i >= 148 && i < 156 ? 32 : block[i];
  return sum === number(block, 148, 8);
}

function parsePax(data) {
  const records = {};
  for (let at = 0; at < data.length; ) {
    const space = data.indexOf(32, at);
    const length = Number(string(data.subarray(at, space)));
    if (space < 0 || !(length > 0)) throw new Error("the archive has a malformed PAX header");
    const record = new TextDecoder().decode(data.subarray(space + 1, at + length - 1));
    const equals = record.indexOf("=");
    const key = record.slice(0, equals);
    if (key.startsWith("GNU.sparse.")) throw new Error("the archive has sparse files: pack it without --sparse");
    records[key] = record.slice(equals + 1);
    at += length;
  }
  return records;
}

