// The page: a task and a model are chosen, the input is filled in, the answer is shown.

import { get, run, setKey } from "./api.js";
import { pretty, showAnswer } from "./answers.js";
import { curlCommand, pythonCommand } from "./commands.js";
import { byId, copyButton, h, say, seconds } from "./dom.js";
import { FieldProblem, makeConfigField, makeField, readFields, showProblem } from "./fields.js";
import { Models } from "./models.js";
import { words } from "./schema.js";

const state = { tasks: new Map(), task: null, fields: [], configOf: null, abort: null, pictures: [], lastVectors: new Map() };

const models = new Models(onModel, (error) => showError(error));

async function start() {
  try {
    const names = await get("tasks", "list");
    const tasks = await Promise.all(names.map((name) => get("tasks", name)));
    tasks.forEach((task) => state.tasks.set(task.task, task));
    byId("task").replaceChildren(...names.map((name) => h("option", { value: name }, words(name))));
    if (!names.length) throw new Error("No task is installed.");
  } catch (error) {
    byId("page-error").textContent = error.message;
    byId("page-error").hidden = false;
    return;
  }
  byId("task").addEventListener("change", () => chooseTask(byId("task").value));
  addEventListener("hashchange", followHash);
  followHash();
  showDocsLink();
}

async function showDocsLink() {
  const plugins = await get("plugins").catch(() => []);
  byId("docs-link").hidden = !plugins.some(({ kind, name, state: is }) => kind === "apis" && name === "openapi" && is === "loaded");
}

// Task and model

function followHash() {
  const [task, model] = decodeURIComponent(location.hash.slice(1)).split("/");
  if (state.task?.task === task && (!model || model === models.chosen)) return;
  const withModels = [...state.tasks.values()].find((each) => each.models.length)?.task;
  chooseTask(state.tasks.has(task) ? task : withModels ?? [...state.tasks.keys()][0], model);
}

function chooseTask(name, model) {
  state.abort?.abort();
  state.task = state.tasks.get(name);
  byId("task").value = name;
  byId("task-description").textContent = state.task.description;
  state.fields.forEach((field) => field.dispose?.());
  const { properties, required } = state.task.input;
  state.fields = Object.entries(properties).map(([key, schema]) => makeField(key, schema, required.includes(key)));
  state.configOf = null;
  byId("fields").replaceChildren(...state.fields.map((field) => field.element));
  clearAnswer();
  models.show(state.task.models, state.task.default_model);
  const { models: all, default_model: standard } = state.task;
  models.choose(all.includes(model) ? model : standard ?? all[0] ?? null);
}

function onModel(name) {
  byId("run").disabled = name === null;
  if (name === null) return;
  history.replaceState(null, "", `#${encodeURIComponent(state.task.task)}/${encodeURIComponent(name)}`);
  if (state.configOf === name) return;
  if (models.details.has(name)) {
    fitConfig(name);
    return;
  }
  state.configOf = null;
  for (const { control } of fieldsOf(configField())) control.disabled = true; // what is typed now would be lost
}

const configField = () => state.fields.find((field) => field.key === "config");

// What a model takes as ``config`` is its own affair: a field for each key, where it says so.
function fitConfig(name) {
  state.configOf = name;
  const index = state.fields.indexOf(configField());
  if (index < 0) return;
  const schema = models.details.get(name).config[state.task.task];
  const property = state.task.input.properties.config;
  const field = schema ? makeConfigField("config", schema) : makeField("config", property, false);
  state.fields[index].element.replaceWith(field.element);
  state.fields[index] = field;
}

// Running

byId("input").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("cancel").addEventListener("click", () => state.abort?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("run").disabled) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("paste", (event) => {
  // Spreadsheets and word processors copy a picture of the text along with it.
  const isTyping = event.target.matches?.("textarea, input:not([type=file], [type=radio])");
  if (isTyping && event.clipboardData?.types.includes("text/plain")) return;
  const files = [...(event.clipboardData?.files ?? [])];
  for (const field of state.fields) {
    const fitting = field.accepts ? files.filter((file) => field.accepts(file)) : [];
    if (!fitting.length) continue;
    field.add(fitting);
    event.preventDefault();
    return;
  }
});
// A file that misses its place must not replace the page.
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());

async function send() {
  if (state.abort) return;
  const { task } = state.task;
  const model = models.chosen;
  clearProblems();
  let values;
  try {
    values = readFields(state.fields);
  } catch (error) {
    showError(error);
    return;
  }
  const abort = new AbortController();
  state.abort = abort;
  const began = performance.now();
  const progress = setInterval(() => showProgress(began), 100);
  setRunning(true);
  showProgress(began);
  say("Running");
  try {
    const answer = await run(task, model, values, abort.signal);
    if (abort.signal.aborted) return;
    show(task, model, values, answer, performance.now() - began);
  } catch (error) {
    if (error.name === "AbortError") {
      say("Cancelled");
    } else {
      for (const id of ["panel-view", "panel-json", "took"]) byId(id).replaceChildren();
      showError(error);
    }
    if (state.task.task === task) showCommands(task, model, values);
  } finally {
    clearInterval(progress);
    state.abort = null;
    setRunning(false);
    models.poll();
    models.describe(model);
  }
}

function setRunning(on) {
  models.isRunning = on;
  byId("run").hidden = on;
  byId("cancel").hidden = !on;
  byId("progress").hidden = !on;
  document.body.classList.toggle("running", on);
  if (on) {
    byId("cancel").focus();
    bringIntoView(byId("progress"));
    models.poll();
  } else if (document.activeElement === document.body) {
    byId("run").focus();
  }
}

// On a small screen the answer is below the input.
function bringIntoView(element) {
  const { top, bottom } = element.getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) element.closest("section").scrollIntoView({ block: "start", behavior: "smooth" });
}

function showProgress(began) {
  const loading = models.loadingFor();
  const passed = (performance.now() - began) / 1000;
  byId("progress").textContent =
    loading === null ? `Running… ${seconds(passed)}` : `${models.chosen} is loading… ${seconds(loading)}`;
}

// The answer

function show(task, model, values, answer, milliseconds) {
  const { batch_fields: batchFields } = state.task;
  // Of what was sent: the fields may hold other files by now.
  const files = state.fields.filter((field) => field.kind === "image").flatMap((field) => values[field.key] ?? []);
  for (const address of state.pictures) URL.revokeObjectURL(address);
  state.pictures = files.map((file) => URL.createObjectURL(file));
  const source = `${task}/${model}`;
  const context = {
    values,
    images: state.pictures,
    isBatch: batchFields.some((key) => Array.isArray(values[key]) && values[key].length > 1),
    lastVector: state.lastVectors.get(source),
  };
  byId("panel-view").replaceChildren(showAnswer(answer, context));
  state.lastVectors.set(source, context.lastVector);
  const json = pretty(answer);
  byId("panel-json").replaceChildren(copyButton(json), h("pre", { class: "code" }, json));
  showCommands(task, model, values);
  byId("took").textContent = `${model}, ${(milliseconds / 1000).toFixed(milliseconds < 10000 ? 2 : 0)} s`;
  say(`Answered in ${(milliseconds / 1000).toFixed(1)} seconds`);
}

function showCommands(task, model, values) {
  for (const [panel, command] of [
    ["panel-curl", curlCommand(task, model, values)],
    ["panel-python", pythonCommand(task, model, values)],
  ]) {
    byId(panel).replaceChildren(copyButton(command), h("pre", { class: "code command" }, command));
  }
}

function clearAnswer() {
  clearProblems();
  byId("took").textContent = "";
  byId("panel-view").replaceChildren(h("p", { class: "empty" }, "The answer appears here."));
  const nothing = () => h("p", { class: "empty" }, "Run something first.");
  for (const name of ["json", "curl", "python"]) byId(`panel-${name}`).replaceChildren(nothing());
}

// Errors

function clearProblems() {
  byId("error").hidden = true;
  for (const field of allFields()) showProblem(field, "");
}

const allFields = () => state.fields.flatMap(fieldsOf);
const fieldsOf = (field) => (field ? (field.fields ?? [field]) : []);

function showError(error) {
  const key = error.field instanceof Object ? error.field.key : error.field;
  const field = error instanceof FieldProblem ? error.field : fieldNamed(key);
  byId("error").textContent = error.message;
  byId("error").hidden = false;
  if (!field) return;
  showProblem(field, error.message);
  field.element.closest("details")?.setAttribute("open", "");
  field.element.scrollIntoView({ block: "nearest" });
  field.control.focus();
}

// The field that ``image[1]`` or ``config.num_beams`` names.
function fieldNamed(name) {
  const parts = (name ?? "").replace(/\[\d+\]/g, "").split(".");
  const field = state.fields.find(({ key }) => key === parts[0]);
  return field?.fields ? field.fields.find(({ key }) => key === parts[1]) : field;
}

// A key, where the server wants one

document.addEventListener("key-wanted", () => {
  byId("key").hidden = false;
});
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-value").value);
  location.reload();
});

// Tabs

const tabs = [...document.querySelectorAll("[role=tab]")];
for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tabs.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    selectTab(tabs[(to + tabs.length) % tabs.length]);
  });
}

function selectTab(chosen) {
  for (const tab of tabs) {
    tab.setAttribute("aria-selected", String(tab === chosen));
    tab.tabIndex = tab === chosen ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
  }
  chosen.focus();
}

start();
