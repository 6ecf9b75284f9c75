const TIMESTAMP = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ /;

// Steps keeps the state of each step of a build, as its log lines tell it.
class Steps {
  constructor() {
    this.byName = new Map();
    this.byLine = new Map();
    this.furthest = 0;
  }

  // take reads a "v: " line without its "v: ", and returns the step it is of. A
  // step's line comes when it starts, and again with an ending when it ends; one
  // from the cache has only the latter.
  take(line, now) {
    const ending = /^(.*) (?:(\d+\.\d\d)s(?: (CANCELED|ERROR))?|(CACHED))$/s.exec(line);
    if (ending) {
      let step = this.byLine.get(ending[1]);
      if (!step && ending[4]) step = this.step(ending[1]);
      if (step) {
        step.state = { CANCELED: "canceled", ERROR: "failed" }[ending[3]] ?? (ending[4] ? "cached" : "done");
        step.seconds += Number(ending[2] ?? 0);
        return step;
      }
    }
    const step = this.step(line);
    step.state = "running";
    step.since = now;
    this.byLine.set(line, step);
    return step;
  }

  // step is found by its name: the export and the push are two runs of one.
  step(line) {
    const name = line.replace(TIMESTAMP, "");
    let step = this.byName.get(name);
    if (!step) {
      step = { name, state: "running", seconds: 0, since: 0 };
      this.byName.set(name, step);
    }
    return step;
  }

  // end settles what still runs when the build has ended.
  end(state, now) {
    for (const step of this.byName.values()) {
      if (step.state !== "running") continue;
      step.state = state;
      step.seconds += (now - step.since) / 1000;
    }
  }

  // counts are the steps of the Dockerfile that ended well, and how many of
  // them came from the cache.
  counts() {
    let steps = 0;
    let cached = 0;
    for (const { name, state } of this.byName.values()) {
      if (isInternal(name) || (state !== "done" && state !== "cached")) continue;
      steps++;
      if (state === "cached") cached++;
    }
    return { steps, cached };
  }

  // fraction is how much of the build is done, as far as can be known: steps name
  // their number and the last one's, stage by stage, and stages appear late. It
  // never goes back. It is null before the first step.
  fraction() {
    const stages = new Map();
    let exported = 0;
    for (const { name, state } of this.byName.values()) {
      const ended = state === "done" || state === "cached";
      if (name.startsWith("exporting to ") && ended) exported = 1;
      const numbered = /^\[(?:(.+) )?(\d+)\/(\d+)\] /.exec(name);
      if (!numbered) continue;
      const stage = stages.get(numbered[1]) ?? { done: 0, total: Number(numbered[3]) };
      if (ended) stage.done++;
      stages.set(numbered[1], stage);
    }
    if (stages.size === 0) return null;
    let done = exported;
    let total = 1;
    for (const stage of stages.values()) {
      done += stage.done;
      total += stage.total;
    }
    this.furthest = Math.max(this.furthest, done / total);
    return this.furthest;
  }
}

// isInternal tells what BuildKit adds from the steps of a Dockerfile.
function isInternal(name) {
  return name.startsWith("[internal] ") || name.startsWith("exporting to ");
}

