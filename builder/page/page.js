// The page itself. Text of a build is only ever set as text.

const CONFIG_FILE = "com.openfaas.docker.config";
const CONTEXT_DIR = "context";

// Builds are posted to where the page takes them, the root of a host.
const endpoint = location.origin + "/";

// Bounds of what is shown, not of what a build may print.
const MAX_LINES = 4000;
const MAX_LINE = 4096; // characters
const MAX_ROWS = 500; // steps
const MAX_ANSWER = 256 * 1024; // characters of a line, or of an answer that is no stream

const $ = (id) => document.getElementById(id);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

function size(n) {
  for (const unit of ["bytes", "kB", "MB"]) {
    if (n < 1000) return `${unit === "bytes" ? n : n.toPrecision(3)} ${unit}`;
    n /= 1000;
  }
  return `${n.toPrecision(3)} GB`;
}

function seconds(n) {
  if (n < 60) return `${n.toFixed(1)} s`;
  return `${Math.floor(n / 60)} min ${String(Math.floor(n % 60)).padStart(2, "0")} s`;
}

// Problem is an error that belongs to one field of the form.
class Problem extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

// ---- Sources: a folder or an archive becomes entries of a context

// A source has name, about, notes, and either entries, a function that reads
// them, or whole, a Blob that is a complete request and is sent as it is.
let source = null;

function cleanName(name) {
  return name.replace(/^(\.?\/+)+/, "").replace(/\/+$/, "");
}

function folderSource(name, list) {
  return {
    name,
    notes: [
      "Executable bits and links do not come through a browser. Scripts that begin with #! and Linux programs are packed as executable, all else is not. Choose a tar to keep everything.",
    ],
    entries: async () => folderEntries(await list()),
  };
}

function folderEntries({ files, dirs }) {
  const entries = new Map();
  const addDir = (name) => {
    for (let end = name.length; end > 0; end = name.lastIndexOf("/", end - 1)) {
      const dir = name.slice(0, end);
      if (entries.has(dir)) return;
      entries.set(dir, { name: dir, flag: "5", mode: 0o755, mtime: 0 });
    }
  };
  dirs.forEach(addDir);
  for (const { name, file } of files) {
    if (name.includes("/")) addDir(name.slice(0, name.lastIndexOf("/")));
    entries.set(name, { name, flag: "0", mode: (head) => (runs(head) ? 0o755 : 0o644), mtime: file.lastModified / 1000, data: file });
  }
  return [...entries.values()].sort((a, b) => (a.name < b.name ? -1 : 1));
}

// runs tells a script and an ELF program by how they begin.
function runs(head) {
  const text = String.fromCharCode(...head.subarray(0, 4));
  return text.startsWith("#!") || text === "\x7fELF";
}

function pickedFolder(fileList) {
  const files = [...fileList];
  const root = files[0].webkitRelativePath.split("/")[0];
  return folderSource(root, async () => ({
    files: files.map((file) => ({ name: file.webkitRelativePath.slice(root.length + 1), file })),
    dirs: [],
  }));
}

// A dropped folder is read anew for each build, and has its empty directories.
function droppedFolder(root) {
  return folderSource(root.name, async () => {
    const files = [];
    const dirs = [];
    const walk = async (dir, prefix) => {
      const reader = dir.createReader();
      for (;;) {
        const batch = await new Promise((ok, fail) => reader.readEntries(ok, fail));
        if (batch.length === 0) return;
        for (const entry of batch) {
          const name = prefix + entry.name;
          if (entry.isDirectory) {
            dirs.push(name);
            await walk(entry, name + "/");
          } else {
            files.push({ name, file: await new Promise((ok, fail) => entry.file(ok, fail)) });
          }
        }
      }
    };
    await walk(root, "");
    return { files, dirs };
  });
}

async function archiveSource(file) {
  const head = [...(await bytes(file.slice(0, 4)))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  const format = head.startsWith("1f8b") ? "gzip" : head === "28b52ffd" ? "zstd" : null;
  let archive = file;
  if (format) {
    const decompressor = decompress(format);
    if (!decompressor) {
      return {
        name: file.name,
        about: size(file.size),
        whole: file,
        notes: [`Sent as it is: this browser cannot look into ${format}. It has to be a complete request, with ${CONFIG_FILE} and ${CONTEXT_DIR}/ in it.`],
      };
    }
    archive = await new Response(file.stream().pipeThrough(decompressor)).blob();
  }
  const entries = (await readTar(archive))
    .map((entry) => ({ ...entry, name: cleanName(entry.name) }))
    .filter((entry) => entry.name !== "" && entry.name !== ".");
  const about = `${plural(entries.length, "entry").replace("entrys", "entries")}, ${size(file.size)}`;

  const config = entries.find((entry) => entry.name === CONFIG_FILE);
  if (config) {
    let image = "";
    let skipPush = false;
    try {
      ({ image = "", skipPush = false } = JSON.parse(await config.data.text()));
    } catch {
      // The builder says what is wrong with it.
    }
    return {
      name: file.name,
      about,
      whole: file,
      image: String(image),
      skipPush,
      notes: [`A complete request, sent as it is: its ${CONFIG_FILE} says what to build${image ? `, ${image}` : ""}.`],
    };
  }
  const notes = [];
  const top = entries.length > 0 ? entries[0].name.split("/")[0] : "";
  const inside = (entry) => (entry.name === top && entry.flag === "5") || entry.name.startsWith(top + "/");
  if (top && entries.every(inside)) {
    const cut = (name) => name.slice(top.length + 1);
    for (const entry of entries) {
      entry.name = cut(entry.name);
      if (entry.flag === "1") entry.link = cut(cleanName(entry.link));
    }
    notes.push(`All of it lies in ${top}/, which is taken for the context.`);
  }
  return { name: file.name, about, notes, entries: async () => entries.filter((entry) => entry.name !== "") };
}

function decompress(format) {
  try {
    return new DecompressionStream(format);
  } catch {
    return null;
  }
}

const missingDockerfile = (name) =>
  `There is no ${name} in it. A function's folder needs its template first: run faas-cli build --shrinkwrap and choose the folder that it makes below build/.`;

function checkDockerfile(entries) {
  const name = cleanName($("dockerfile").value.trim()) || "Dockerfile";
  // BuildKit takes dockerfile for Dockerfile.
  const other = name.replace(/(^|\/)Dockerfile$/, "$1dockerfile");
  if (!entries.some((entry) => entry.name === name || entry.name === other)) throw new Problem("source", missingDockerfile(name));
}

let choices = 0;

// choose shows a source, or why there is none. What is read when another has been
// chosen is let go.
async function choose(open) {
  const choice = ++choices;
  setSource(null);
  setError("source", "");
  try {
    const next = await open();
    const entries = await next.entries?.();
    if (choice !== choices) return;
    if (entries) {
      const files = entries.filter((entry) => entry.flag === "0");
      next.about ??= `${plural(files.length, "file")}, ${size(files.reduce((n, entry) => n + (entry.data?.size ?? 0), 0))}`;
      setSource(next);
      checkDockerfile(entries);
    } else {
      setSource(next);
    }
  } catch (err) {
    if (choice === choices) setError("source", err instanceof Problem ? err.message : `It cannot be read: ${err.message}.`);
  }
}

function setSource(next) {
  const had = source !== null;
  source = next;
  $("unchosen").hidden = $("source-hint").hidden = next !== null;
  $("chosen").hidden = next === null;
  $("drop").classList.toggle("full", next !== null);
  for (const field of document.querySelectorAll("[data-config]")) field.hidden = Boolean(next?.whole);
  if (next === null) {
    $("folder").value = $("archive").value = "";
    if (had && $("clear") === document.activeElement) $("folder").focus();
    return;
  }
  $("chosen-name").textContent = next.name;
  $("chosen-size").textContent = next.about;
  $("chosen-notes").replaceChildren(...next.notes.map((note) => element("li", "", note)));
}

// ---- The request

// trimmed is the secret as the builder reads it: without Unicode's white space.
function trimmed(secret) {
  const space = "[\\t-\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
  return secret.replace(new RegExp(`^${space}|${space}$`, "g"), "");
}

function readConfig() {
  const config = {};
  const image = $("image").value.trim();
  if (image) config.image = image;
  else if (!$("skip-push").checked) throw new Problem("image", "Where is the image to be pushed?");
  const args = $("args").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (args.length > 0) {
    config.buildArgs = Object.fromEntries(args.map((line) => {
      const at = line.indexOf("=");
      if (at < 1) throw new Problem("args", `“${line}” is not NAME=value.`);
      return [line.slice(0, at), line.slice(at + 1)];
    }));
  }
  const platforms = $("platforms").value.split(/[\s,]+/).filter(Boolean);
  if (platforms.length > 0) config.platforms = platforms;
  for (const key of ["dockerfile", "target"]) {
    if ($(key).value.trim()) config[key] = $(key).value.trim();
  }
  for (const [id, key] of [["no-cache", "noCache"], ["pull", "pull"], ["skip-push", "skipPush"]]) {
    if ($(id).checked) config[key] = true;
  }
  return config;
}

// pack returns the request's body as a Blob, compressed: what is signed is what
// is sent.
async function pack(from, config) {
  if (from.whole) return from.whole;
  const entries = await from.entries();
  checkDockerfile(entries);
  const packed = tarStream([
    { name: CONFIG_FILE, flag: "0", mode: 0o644, mtime: 0, data: new Blob([JSON.stringify(config)]) },
    { name: CONTEXT_DIR + "/", flag: "5", mode: 0o755, mtime: 0 },
    ...entries.map((entry) => ({
      ...entry,
      name: `${CONTEXT_DIR}/${entry.name}${entry.flag === "5" ? "/" : ""}`,
      link: entry.flag === "1" ? `${CONTEXT_DIR}/${entry.link}` : entry.link,
    })),
  ]);
  return new Response(packed.pipeThrough(new CompressionStream("gzip"))).blob();
}

// readTenant returns the headers that name the tenant. There are none without a name.
function readTenant() {
  const name = $("tenant").value.trim();
  if (!name) return {};
  // A browser refuses other characters with an error that names no field.
  if (!/^[\x21-\x7e]+$/.test(name)) throw new Problem("tenant", "A tenant's name has lower-case letters, digits, dots, hyphens and underscores.");
  return { "X-Build-Tenant": name };
}

async function sign(secret, body) {
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const key = await crypto.subtle.importKey("raw", encoder.encode(secret), algorithm, false, ["sign"]);
  const mac = new Uint8Array(await crypto.subtle.sign("HMAC", key, body));
  return "sha256=" + Array.from(mac, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// records reads an answer's lines as they come.
async function* records(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    if (rest.length > MAX_ANSWER) throw new Error("a line of the answer is too long");
    for (const line of lines) {
      if (line.trim()) yield JSON.parse(line);
    }
  }
}

// refusal is the verdict in an answer that is no stream.
async function refusal(res) {
  const text = (await res.text()).slice(0, MAX_ANSWER);
  try {
    const record = JSON.parse(text);
    if (record.status === "failed") return { ...record, title: "Refused" };
  } catch {
    // It is not of the builder.
  }
  const status = `${res.status} ${res.statusText}`.trim();
  return {
    status: "failed",
    title: "Not built",
    error: text.trim() ? `${status}: ${text.trim().slice(0, 2000)}` : status,
    hint: "The builder does not answer like this. It came from something on the way: the gateway, its provider, or a proxy.",
  };
}

const hints = {
  unauthorized: "Is this the payload secret that the builder has? White space around it does not matter. At a builder with several tenants it is your own, beside your name.",
  image_forbidden: "The builder's allowed_images names the repositories that may be pushed to.",
  registry_denied: "The builder pushes with the credentials in its registry-config secret.",
};

const LOST = {
  status: "lost",
  title: "Connection lost",
  error: "The answer ended before the builder said what came of the build.",
  hint: "Most likely a timeout on the way cut it off: the gateway and its provider have their own. A build whose caller is gone is canceled.",
};

// run builds, and returns the verdict: the last record, or what stands for it.
async function run(from, config, secret, tenant, signal) {
  view.phase("Packing");
  const body = await pack(from, config);
  const limit = about?.limits?.body_bytes;
  if (limit && body.size > limit) {
    return { status: "failed", title: "Too large", error: `The request has ${size(body.size)}. This builder takes ${size(limit)}.` };
  }
  signal.throwIfAborted();
  const signature = await sign(secret, await body.arrayBuffer());
  signal.throwIfAborted();
  view.phase(`Sending ${size(body.size)}`);
  const res = await fetch(endpoint, {
    method: "POST",
    body,
    signal,
    headers: {
      "Content-Type": "application/octet-stream",
      "X-Build-Signature": signature,
      ...tenant,
      // The CE gateway passes lines on as they come for a list that begins so.
      Accept: "text/event-stream, application/x-ndjson",
    },
  });
  if (!res.ok) return refusal(res);
  view.answered = true;
  view.phase("Waiting");
  let builds = false;
  for await (const record of records(res.body)) {
    if (record.image) view.image(record.image);
    if (record.log?.length > 0) {
      if (!builds) describe(); // which counts it from now on
      builds = true;
      view.phase("Building");
      view.log(record.log);
    }
    if (record.status === "success" || record.status === "failed") return record;
  }
  return LOST;
}

// ---- What is shown of a build

function element(tag, className, text) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", "#i-" + name);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

// short cuts digests as BuildKit's own progress does.
function short(text) {
  return text.replace(/(sha256:[0-9a-f]{12})[0-9a-f]{52}/g, "$1");
}

const view = {
  steps: new Steps(),
  rows: new Map(),
  pending: [],
  dropped: 0,
  following: true,
  timer: 0,
  started: 0,
  answered: false,
  pushes: true,

  begin({ image = "", skipPush = false }) {
    this.steps = new Steps();
    this.rows = new Map();
    this.pending = [];
    this.dropped = 0;
    this.following = true;
    this.answered = false;
    this.started = performance.now();
    for (const id of ["empty", "course", "success", "failure", "warnings", "dropped", "follow"]) $(id).hidden = true;
    for (const id of ["steps", "lines"]) $(id).replaceChildren();
    $("steps-count").textContent = "";
    $("run").hidden = $("cancel").hidden = false;
    $("build").className = "";
    $("progress").removeAttribute("value");
    this.image(image);
    this.pushes = !skipPush;
    clearInterval(this.timer);
    this.timer = setInterval(() => this.paint(), 100);
    this.paint();
  },

  phase(text) {
    if ($("build-title").textContent === text) return;
    $("build-title").textContent = text;
    $("status").textContent = text;
    document.title = `${text} · Function builder`;
  },

  image(text) {
    if ($("build-image").textContent !== text) $("build-image").textContent = text;
  },

  log(lines) {
    for (const line of lines) {
      const [, kind, text] = /^(?:([vslw]): )?(.*)$/s.exec(line);
      const ended = kind === "v" && this.steps.take(text, performance.now()).state !== "running";
      this.pending.push({ kind: ended ? "ended" : kind, text });
    }
    // A hidden tab paints rarely.
    const over = this.pending.length - MAX_LINES;
    if (over > 0) {
      this.pending.splice(0, over);
      this.dropped += over;
    }
  },

  // paint brings the document up to date, ten times a second at most, however
  // fast lines come.
  paint() {
    const now = performance.now();
    $("elapsed").textContent = seconds((now - this.started) / 1000);
    this.paintLog();
    for (const step of this.steps.byName.values()) this.paintStep(step, now);
    const fraction = this.steps.fraction();
    if (fraction !== null) $("progress").value = fraction;
    const total = this.steps.byName.size;
    const { cached } = this.steps.counts();
    $("steps-count").textContent = total === 0 ? "" : cached > 0 ? `${total}, ${cached} cached` : String(total);
  },

  paintStep(step, now) {
    let row = this.rows.get(step);
    if (!row) {
      if (this.rows.size >= MAX_ROWS) return;
      row = { li: element("li"), state: element("span", "unseen"), name: element("span", "name", short(step.name)), time: element("span", "time") };
      const text = element("div");
      text.append(row.state, row.name);
      row.li.append(icon("running"), text, row.time);
      this.rows.set(step, row);
      $("steps").append(row.li);
    }
    const spent = step.seconds + (step.state === "running" ? (now - step.since) / 1000 : 0);
    const time = step.state === "cached" ? "cached" : seconds(spent);
    if (row.time.textContent !== time) row.time.textContent = time;
    if (row.shown === step.state) return;
    row.shown = step.state;
    row.li.className = step.state + (isInternal(step.name) ? " internal" : "");
    row.li.firstChild.replaceWith(icon(step.state));
    row.state.textContent = step.state + ": ";
  },

  paintLog() {
    if (this.pending.length === 0) return;
    $("course").hidden = false;
    const lines = $("lines");
    const fragment = document.createDocumentFragment();
    for (const { kind, text } of this.pending.splice(0)) {
      // What a step itself prints is left as it is.
      const shown = kind === "l" || kind === "w" ? text : short(text.replace(TIMESTAMP, ""));
      const cut = shown.length - MAX_LINE;
      fragment.append(element("div", kind, cut > 0 ? `${shown.slice(0, MAX_LINE)} … ${plural(cut, "character")} more` : shown));
    }
    lines.append(fragment);
    while (lines.childElementCount > MAX_LINES) {
      lines.firstChild.remove();
      this.dropped++;
    }
    if (this.dropped > 0) {
      $("dropped").hidden = false;
      $("dropped").textContent = `… ${plural(this.dropped, "earlier line")} not shown`;
    }
    this.follow();
  },

  follow() {
    if (this.following) $("log").scrollTop = $("log").scrollHeight;
  },

  end(record) {
    clearInterval(this.timer);
    const ok = record.status === "success";
    const now = performance.now();
    this.steps.end(ok ? "done" : record.status === "failed" ? "failed" : "canceled", now);
    this.paint();
    if (ok) $("progress").value = 1;
    // Nothing moves any more.
    else if (!$("progress").hasAttribute("value")) $("progress").value = record.status === "canceled" ? 0 : 1;
    if (record.duration) $("elapsed").textContent = seconds(record.duration);
    $("build").className = record.status;
    if (ok) this.succeeded(record);
    else this.failed(record);
    const warnings = record.warnings ?? [];
    $("warnings").hidden = warnings.length === 0;
    $("warnings").replaceChildren(...warnings.map((text) => element("li", "", text)));
    const focused = document.activeElement === $("cancel");
    $("cancel").hidden = true;
    if (focused) $("build-title").focus({ preventScroll: true });
  },

  succeeded(record) {
    const pushed = Boolean(record.image) && this.pushes;
    this.phase(pushed ? "Pushed" : "Built");
    this.image("");
    $("success").hidden = false;
    $("out-image").textContent = record.image ?? "not pushed";
    $("out-digest").textContent = record.digest ?? "";
    $("deploy").hidden = !pushed;
    if (pushed) $("out-deploy").textContent = `faas-cli deploy --image ${record.image} --name ${functionName(record.image)}`;
  },

  failed(record) {
    this.phase(record.title ?? { canceled: "Canceled" }[record.status] ?? "Failed");
    $("failure").hidden = false;
    const { text, name, lines } = splitError(record.error ?? "");
    $("failure-text").textContent = text;
    $("failure-hint").textContent = record.hint ?? hints[record.code] ?? "";
    $("failure-source").hidden = lines.length === 0;
    $("failure-source").replaceChildren(
      element("span", "name", name),
      ...lines.map((line) => element("span", / >>> /.test(line) ? "blamed" : "", line)),
    );
    $("status").textContent = `${$("build-title").textContent}. ${text}`;
  },
};

// functionName is the last part of an image's name.
function functionName(image) {
  return image.replace(/@.*$/, "").replace(/^.*\//, "").replace(/:.*$/, "").replace(/[^A-Za-z0-9-]/g, "-");
}

// splitError takes the Dockerfile's lines out of an error, as BuildKit prints
// them: name:line, then lines between two rules.
function splitError(error) {
  const found = /^(.*?)\n(\S+:\d+)\n-{4,}\n(.*?)\n-{4,}\s*$/s.exec(error);
  if (!found) return { text: error, name: "", lines: [] };
  return { text: found[1].trim(), name: found[2], lines: found[3].split("\n") };
}

// ---- The form

let running = null; // the AbortController of the build

function setError(field, message) {
  $(field + "-error").textContent = message;
  const input = field === "source" ? $("drop") : $(field);
  if (message) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

function showProblem(problem) {
  setError(problem.field, problem.message);
  if (problem.field === "source") (source ? $("clear") : $("folder")).focus();
  else $(problem.field).focus();
}

async function submit() {
  for (const field of ["source", "image", "secret", "tenant", "args"]) setError(field, "");
  let config;
  let secret;
  let tenant;
  try {
    if (!source) throw new Problem("source", "Choose what to build.");
    config = source.whole ? { image: source.image ?? "", skipPush: source.skipPush } : readConfig();
    secret = trimmed($("secret").value);
    if (!secret) throw new Problem("secret", "The builder takes signed requests only.");
    tenant = readTenant();
  } catch (err) {
    if (!(err instanceof Problem)) throw err;
    showProblem(err);
    return;
  }

  running = new AbortController();
  const { signal } = running;
  $("fields").disabled = $("submit").disabled = true;
  view.begin(config);
  $("cancel").focus({ preventScroll: true });
  const top = $("build").getBoundingClientRect().top;
  if (top < 0 || top > innerHeight / 2) $("build").scrollIntoView();

  let verdict;
  try {
    verdict = await run(source, config, secret, tenant, signal);
  } catch (err) {
    verdict = signal.aborted ? { status: "canceled", error: "Nothing was pushed, unless the push had ended." } : failure(err);
  }
  running = null;
  $("fields").disabled = $("submit").disabled = false;
  if (verdict.code === "unauthorized") setError("secret", "The builder has another one.");
  view.end(verdict);
  describe();
}

// failure is the verdict where the page itself could not go on.
function failure(err) {
  if (err instanceof Problem) {
    setError(err.field, err.message);
    return { status: "failed", title: "Not sent", error: err.message };
  }
  if (err.name === "NotReadableError" || err.name === "NotFoundError") {
    return { status: "failed", title: "Not sent", error: "A file changed after it was chosen, or cannot be read.", hint: "Choose the folder again. A dropped folder is read anew each time." };
  }
  if (view.answered) return { ...LOST, error: `${LOST.error} (${err.message})` };
  return { status: "failed", title: "Not built", error: `The builder cannot be reached: ${err.message}.` };
}

// ---- About the builder, from the same address

let about = null;

async function describe() {
  try {
    const res = await fetch(endpoint, { headers: { Accept: "application/json" } });
    if (!res.ok) throw new Error(String(res.status));
    about = await res.json();
    const { daemons, builds_in_flight: builds, limits, version } = about;
    $("about").classList.toggle("error", daemons.reachable === 0);
    $("about").textContent = [
      `version ${version}`,
      daemons.reachable === 0 ? "no buildkitd can be reached" : daemons.total > 1 ? `${daemons.reachable} of ${daemons.total} daemons` : "daemon reachable",
      `${builds} of ${limits.builds} builds running`,
    ].join(" · ");
  } catch {
    $("about").textContent = "";
  }
}

// ---- Wiring

function wire() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running) submit();
  });
  $("cancel").addEventListener("click", () => running?.abort());
  $("clear").addEventListener("click", () => {
    choices++;
    setSource(null);
    setError("source", "");
    $("folder").focus();
  });
  $("folder").addEventListener("change", ({ target }) => {
    const files = [...target.files];
    if (files.length > 0) choose(async () => pickedFolder(files));
  });
  $("archive").addEventListener("change", ({ target }) => {
    const [file] = target.files;
    if (file) choose(() => archiveSource(file));
  });

  // A file of several keys pasted into one line would be no key at all.
  $("secret").addEventListener("paste", (event) => {
    const lines = event.clipboardData.getData("text").split(/[\r\n]+/).map(trimmed).filter(Boolean);
    if (lines.length < 2) return;
    event.preventDefault();
    event.target.value = lines[0];
  });

  // The whole window takes a drop: beside the field it would open the file.
  let depth = 0;
  for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
    addEventListener(type, (event) => {
      event.preventDefault();
      if (type === "dragenter") depth++;
      if (type === "dragleave") depth--;
      if (type === "drop") depth = 0;
      $("drop").classList.toggle("over", depth > 0 && !running);
    });
  }
  addEventListener("drop", (event) => {
    if (running) return;
    const dropped = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    choose(async () => {
      if (dropped.length !== 1) throw new Problem("source", "Drop one folder, or one tar.");
      const [entry] = dropped;
      if (entry.isDirectory) return droppedFolder(entry);
      return archiveSource(await new Promise((ok, fail) => entry.file(ok, fail)));
    });
  });

  $("log").addEventListener("scroll", () => {
    const log = $("log");
    view.following = log.scrollHeight - log.scrollTop - log.clientHeight < 24;
    $("follow").hidden = view.following;
  });
  $("follow").addEventListener("click", () => {
    view.following = true;
    view.follow();
    $("log").focus();
  });
  // Lines that wrap anew have another height.
  addEventListener("resize", () => view.follow());

  // Leaving would cancel the build.
  addEventListener("beforeunload", (event) => {
    if (running) event.preventDefault();
  });

  if (!globalThis.crypto?.subtle) {
    $("insecure").hidden = false;
    $("fields").disabled = $("submit").disabled = true;
  }
  describe();
}

// Below a path, as at the gateway's /function/builder, other functions have this
// origin too, and could read what is typed here.
if (location.pathname === "/") {
  document.querySelector("main").append($("own").content);
  wire();
} else {
  $("shared").hidden = false;
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const from = $(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(from.textContent);
      button.textContent = "Copied";
      $("status").textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    } catch {
      getSelection().selectAllChildren(from);
    }
  });
}
