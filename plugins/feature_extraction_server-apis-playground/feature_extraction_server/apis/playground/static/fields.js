// The form: one field for each key of a task's input, by the key's schema.

import { h, svg } from "./dom.js";
import { canRecord, Recorder } from "./recorder.js";
import { fieldKind, single, words } from "./schema.js";

export class FieldProblem extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

// Each kind gives an element to show and a function that returns the value, undefined where there is none.
const KINDS = {
  image: (field) => mediaField(field, "image", field.many ? "an image or several" : "an image"),
  audio: (field) => mediaField(field, "audio", field.many ? "a recording or several" : "a recording"),
  text: textField,
  list: listField,
  number: numberField,
  boolean: booleanField,
  choice: choiceField,
  json: jsonField,
};

export function makeField(key, schema, required, compact = false) {
  const one = single(schema);
  const kind = fieldKind(schema);
  const field = { key, kind, required, compact, schema: one, id: `${compact ? "config" : "field"}-${key}`, many: hasList(schema) };
  field.description = schema.description ?? one.description ?? "";
  field.problem = h("p", { class: "problem", id: `${field.id}-problem`, hidden: true });
  Object.assign(field, KINDS[kind](field));
  field.control.setAttribute("aria-describedby", `${field.id}-help ${field.id}-problem`);
  if (required) field.control.setAttribute("aria-required", "true");
  field.element = h(
    "div",
    { class: `field ${kind}` },
    h("label", { for: field.id }, words(key), required ? null : h("span", { class: "quiet" }, " optional")),
    h("p", { class: "quiet help", id: `${field.id}-help` }, field.description),
    field.body,
    field.problem,
  );
  return field;
}

export function showProblem(field, message) {
  field.problem.textContent = message;
  field.problem.hidden = !message;
  if (message) field.control.setAttribute("aria-invalid", "true");
  else field.control.removeAttribute("aria-invalid");
}

// The values of a form by key. A required one that is missing is a problem.
export function readFields(fields) {
  const values = {};
  for (const field of fields) {
    const value = field.read();
    if (value !== undefined) values[field.key] = value;
    else if (field.required) throw new FieldProblem(field, `${words(field.key)} is missing.`);
  }
  return values;
}

const hasList = (schema) => (schema.anyOf ?? []).some((choice) => choice.type === "array");

// Media

const ICONS = {
  image: "M4 5h16v14H4zM4 16l4.500-4.500 4 4 2.500-2.500 5 5M15.500 9.500h.01",
  audio: "M12 3.500a3 3 0 0 1 3 3v5a3 3 0 0 1-6 0v-5a3 3 0 0 1 3-3zM5.500 11.500a6.500 6.500 0 0 0 13 0M12 18v3",
};

function mediaField(field, medium, what) {
  const files = [];
  const input = h("input", {
    type: "file",
    id: field.id,
    accept: medium === "audio" ? "audio/*,.flac,.ogg,.wav,.mp3" : "image/*",
    multiple: field.many,
    class: "hidden",
  });
  const list = h("ul", { class: "files", "aria-label": `Chosen for ${words(field.key)}` });
  const zone = h(
    "label",
    { class: "zone", for: field.id },
    svg("svg", { class: "zone-icon", viewBox: "0 0 24 24", "aria-hidden": "true" }, svg("path", { d: ICONS[medium] })),
    h("span", {}, h("strong", {}, `Choose ${what}`), medium === "image" ? ", drop or paste it here" : " or drop it here"),
  );
  const add = (more) => {
    if (!field.many) removeAll();
    for (const file of field.many ? more : [...more].slice(0, 1)) {
      const address = URL.createObjectURL(file);
      files.push({ file, address });
      list.append(preview(medium, file, address, (item) => remove(file, item)));
    }
    showProblem(field, "");
  };
  const remove = (file, item) => {
    const index = files.findIndex((entry) => entry.file === file);
    URL.revokeObjectURL(files.splice(index, 1)[0].address);
    item.remove();
    input.focus();
  };
  const removeAll = () => {
    for (const { address } of files.splice(0)) URL.revokeObjectURL(address);
    list.replaceChildren();
  };
  input.addEventListener("change", () => {
    add([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
  acceptDrops(zone, medium, add);
  const recording = medium === "audio" && recordButton((file) => add([file]), (message) => showProblem(field, message));
  return {
    control: input,
    body: h("div", {}, input, zone, recording, list),
    accepts: (file) => file.type.startsWith(`${medium}/`),
    add,
    read: () => (files.length ? files.map((entry) => entry.file) : undefined),
    dispose: removeAll,
  };
}

function preview(medium, file, address, remove) {
  const size = file.size < 1e5 ? `${Math.ceil(file.size / 1000)} kB` : `${(file.size / 1e6).toFixed(1)} MB`;
  const shown =
    medium === "image"
      ? h("img", { src: address, alt: "", onerror: (event) => event.target.classList.add("unknown") })
      : h("audio", { src: address, controls: true });
  const item = h(
    "li",
    { class: medium },
    shown,
    h("a", { class: "name", href: address, download: file.name, title: "Save" }, file.name),
    h("span", { class: "quiet" }, size),
    h("button", { type: "button", class: "remove", "aria-label": `Remove ${file.name}`, onclick: () => remove(item) }, "×"),
  );
  return item;
}

function acceptDrops(zone, medium, add) {
  const over = (event) => {
    event.preventDefault();
    zone.classList.add("over");
  };
  zone.addEventListener("dragenter", over);
  zone.addEventListener("dragover", over);
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    // A file without a known type is the server's to judge.
    add([...event.dataTransfer.files].filter((file) => !file.type || file.type.startsWith(`${medium}/`)));
  });
}

function recordButton(done, fail) {
  if (!canRecord()) return null;
  const time = h("span", { class: "quiet" });
  const level = h("meter", { min: 0, max: 1, "aria-label": "Loudness", hidden: true });
  const button = h("button", { type: "button", class: "record" }, "Record");
  let recorder = null;
  const show = () => {
    button.textContent = recorder ? "Stop recording" : "Record";
    button.classList.toggle("on", recorder !== null);
    level.hidden = recorder === null;
    if (!recorder) time.textContent = "";
  };
  button.addEventListener("click", async () => {
    if (recorder) {
      const file = await recorder.stop();
      recorder = null;
      show();
      if (file) done(file);
      return;
    }
    try {
      recorder = await Recorder.start((loudness, length) => {
        level.value = loudness;
        time.textContent = `${length.toFixed(1)} s`;
      });
      fail("");
    } catch (error) {
      fail(error.name === "NotAllowedError" ? "The browser may not use the microphone." : "There is no microphone.");
    }
    show();
  });
  return h("div", { class: "recording" }, button, level, time);
}

// Texts, numbers, choices

function textField(field) {
  const { examples, default: standard } = field.schema;
  const placeholder = examples?.[0] ?? standard;
  const control = field.compact
    ? h("input", { id: field.id, type: "text", placeholder })
    : h("textarea", { id: field.id, rows: 3, placeholder });
  return { control, body: control, read: () => (control.value === "" && !field.required ? undefined : control.value) };
}

function listField(field) {
  const example = field.schema.examples?.[0] ?? ["first", "second"];
  const control = h("textarea", { id: field.id, rows: field.compact ? 2 : 3, placeholder: example.join("\n") });
  const read = () => {
    const lines = control.value.split(control.value.includes("\n") ? "\n" : ",").map((line) => line.trim());
    const found = lines.filter((line) => line !== "");
    return found.length ? found : undefined;
  };
  return { control, body: h("div", {}, control, h("p", { class: "quiet help" }, "One a line, or separated by commas.")), read };
}

function numberField(field) {
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum, type, default: standard } = field.schema;
  const control = h("input", {
    id: field.id,
    type: "number",
    min: minimum ?? exclusiveMinimum,
    max: maximum ?? exclusiveMaximum,
    step: [type].flat().includes("integer") ? 1 : "any",
    placeholder: standard ?? "",
  });
  const read = () => {
    if (control.validity.badInput) throw new FieldProblem(field, `${words(field.key)} must be a number.`);
    return control.value === "" ? undefined : Number(control.value);
  };
  return { control, body: control, read };
}

function booleanField(field) {
  return choices(field, [true, false], (value) => (value ? "Yes" : "No"));
}

function choiceField(field) {
  return choices(field, field.schema.enum.filter((value) => value !== null), String);
}

function choices(field, values, name) {
  const standard = field.schema.default;
  const unset = standard === undefined || standard === null ? "Default" : `Default (${name(standard)})`;
  const control = h(
    "select",
    { id: field.id },
    field.required ? null : h("option", { value: "" }, unset),
    values.map((value, index) => h("option", { value: String(index) }, name(value))),
  );
  return { control, body: control, read: () => (control.value === "" ? undefined : values[Number(control.value)]) };
}

function jsonField(field) {
  const control = h("textarea", { id: field.id, rows: 3, class: "code", spellcheck: "false", placeholder: "{}" });
  const read = () => {
    if (control.value.trim() === "") return undefined;
    try {
      return JSON.parse(control.value);
    } catch (error) {
      throw new FieldProblem(field, `${words(field.key)} is not valid JSON: ${error.message}`);
    }
  };
  return { control, body: control, read };
}

// ``config`` of a model that says which keys it takes: a field for each of them.
export function makeConfigField(key, schema) {
  const required = schema.required ?? [];
  const fields = Object.entries(schema.properties ?? {}).map(([name, property]) =>
    makeField(name, property, required.includes(name), true),
  );
  const read = () => {
    const values = readFields(fields);
    return Object.keys(values).length ? values : undefined;
  };
  const element = h(
    "details",
    { class: "field config" },
    h("summary", {}, words(key), h("span", { class: "quiet" }, " optional")),
    h("div", { class: "config-fields" }, fields.map((field) => field.element)),
  );
  return { key, kind: "config", required: false, element, fields, read };
}
