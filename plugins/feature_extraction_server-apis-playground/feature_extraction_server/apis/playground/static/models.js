// The models of a task: which one is to be used, and how they are.

import { get, post } from "./api.js";
import { byId, h, say, seconds } from "./dom.js";

const BUSY_MS = 700;
const IDLE_MS = 4000;
const COMING = ["starting", "loading"];
const GOING_ON = [...COMING, "stopping"];

// Not by scrollIntoView(), from where the Tab key would go on: past the link that skips this list.
function scrollTo(element) {
  const list = byId("models");
  const [inner, outer] = [element.getBoundingClientRect(), list.getBoundingClientRect()];
  list.scrollTop += Math.min(0, inner.top - outer.top) + Math.max(0, inner.bottom - outer.bottom);
}

export class Models {
  constructor(onChoice, onError) {
    this.onChoice = onChoice;
    this.onError = onError;
    this.rows = new Map();
    this.chosen = null;
    this.isRunning = false;
    this.timer = 0;
    this.details = new Map();
    document.addEventListener("visibilitychange", () => this.poll());
    setInterval(() => this.tick(), 250);
  }

  show(names, standard) {
    this.rows = new Map(names.map((name) => [name, this.row(name, name === standard)]));
    const rows = [...this.rows.values()].map((row) => row.element);
    byId("models").replaceChildren(...(rows.length ? rows : [h("p", { class: "notice" }, "No model for this task is installed.")]));
    this.choose(null);
    this.poll();
  }

  row(name, isStandard) {
    const row = { name, status: null, seenAt: 0 };
    row.radio = h("input", { type: "radio", name: "model", id: `model-${name}`, value: name, onchange: () => this.choose(name) });
    row.state = h("span", { class: "state" }, "…");
    row.work = h("span", { class: "quiet" });
    row.button = h("button", { type: "button", class: "small", onclick: () => this.toggle(row) }, "Start");
    row.element = h(
      "div",
      { class: "model", "data-model": name },
      h("label", { for: row.radio.id }, row.radio, h("span", { class: "model-name" }, name), isStandard ? h("span", { class: "tag" }, "default") : null),
      h("span", { class: "model-state" }, row.state, row.work),
      row.button,
    );
    return row;
  }

  choose(name) {
    this.chosen = this.rows.has(name) ? name : null;
    for (const row of this.rows.values()) row.element.classList.toggle("chosen", row.name === name);
    const row = this.rows.get(name);
    if (row) {
      row.radio.checked = true;
      scrollTo(row.element);
    }
    byId("model-details").replaceChildren();
    if (this.chosen) this.describe(name);
    this.onChoice(this.chosen);
  }

  status() {
    return this.rows.get(this.chosen)?.status ?? null;
  }

  // Ask for all states: often while something is going on, rarely else, and never while nobody looks.
  async poll() {
    clearTimeout(this.timer);
    if (document.hidden || !this.rows.size) return;
    const asked = this.rows;
    await Promise.all([...asked.values()].map((row) => this.ask(row)));
    if (asked !== this.rows) return;
    const busy = this.isRunning || [...asked.values()].some(isBusy);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), busy ? BUSY_MS : IDLE_MS);
  }

  async ask(row) {
    try {
      const status = await get("models", row.name, "status");
      const before = row.status?.state;
      Object.assign(row, { status, seenAt: performance.now() });
      if (before && before !== status.state) say(`${row.name} is ${status.state}`);
      this.draw(row);
      if (row.name === this.chosen && before !== status.state) this.describe(row.name);
    } catch (error) {
      row.status = null;
      row.state.textContent = "unknown";
      row.state.dataset.state = "unknown";
    }
  }

  draw(row) {
    const { state, error, queue_depth: waiting, running_jobs: running } = row.status;
    row.state.dataset.state = state;
    row.state.title = error ?? "";
    const work = [waiting ? `${waiting} waiting` : "", running ? `${running} at work` : ""].filter(Boolean).join(", ");
    row.work.textContent = error ?? work;
    row.element.classList.toggle("has-error", error !== null);
    const isUp = ["running", ...COMING].includes(state);
    row.button.textContent = isUp ? "Stop" : "Start";
    row.button.setAttribute("aria-label", `${isUp ? "Stop" : "Start"} ${row.name}`);
    this.tick(row);
  }

  tick(only) {
    for (const row of only ? [only] : this.rows.values()) {
      if (!row.status) continue;
      const { state } = row.status;
      row.state.textContent = GOING_ON.includes(state) ? `${state} ${seconds(this.secondsInState(row))}` : state;
    }
  }

  secondsInState(row) {
    return row.status.state_seconds + (performance.now() - row.seenAt) / 1000;
  }

  loadingFor() {
    const row = this.rows.get(this.chosen);
    return row && COMING.includes(row.status?.state) ? this.secondsInState(row) : null;
  }

  async toggle(row) {
    const isUp = ["running", ...COMING].includes(row.status?.state);
    try {
      await post("models", row.name, isUp ? "stop" : "start");
    } catch (error) {
      this.onError(error);
    }
    await this.poll();
  }

  async describe(name) {
    try {
      const model = await get("models", name);
      this.details.set(name, model);
      if (name === this.chosen) {
        const open = byId("model-details").querySelector("details")?.open ?? false;
        byId("model-details").replaceChildren(about(model, open));
        this.onChoice(name);
      }
    } catch (error) {
      this.onError(error);
    }
  }
}

function isBusy({ status }) {
  return status && (GOING_ON.includes(status.state) || status.queue_depth + status.running_jobs > 0);
}

function about(model, open) {
  const [first, ...rest] = model.description.split("\n\n");
  const { counts } = model;
  const facts = [
    ["Version", model.version],
    ["Runs on", model.device],
    ["Memory of its process", model.memory_bytes && `${(model.memory_bytes / 1e9).toFixed(2)} GB`],
    ["Loaded in", model.load_seconds && `${model.load_seconds} s`],
    ["Answered", counts.jobs && `${counts.jobs} requests, ${counts.items} items, ${counts.failures} failures`],
    ["Loaded", counts.loads && (counts.loads === 1 ? "once" : `${counts.loads} times`)],
    ...model.settings.map((setting) => [setting.name, setting.secret ? "secret" : setting.value]),
  ].filter(([, value]) => value !== null && value !== undefined && value !== 0);
  return h(
    "details",
    { class: "about", open },
    h("summary", {}, first || "About this model"),
    rest.map((text) => h("p", { class: "quiet" }, text)),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
  );
}
