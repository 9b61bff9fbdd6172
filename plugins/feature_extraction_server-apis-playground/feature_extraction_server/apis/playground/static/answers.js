// Showing an answer as what it is: captions, probabilities, boxes, transcripts, vectors.

import { h, svg } from "./dom.js";
import { answerKind, classesOf, regionsOf } from "./schema.js";

const VIEWS = {
  text: (result) => h("p", { class: "said" }, result || h("em", { class: "quiet" }, "nothing")),
  texts: (result) => h("ul", { class: "captions" }, result.map((text) => h("li", {}, text))),
  probabilities: (result, context) => bars(result.labels ?? classesOf(context.values, result.length), result.scores ?? result),
  regions,
  segments: (result) => segments(result),
  transcript: (result) =>
    h("div", {}, h("p", { class: "said" }, result.text), segments(result.words ?? result.segments)),
  embedding,
  json: (result) => h("pre", { class: "code" }, pretty(result)),
};

// ``context``: the values that were sent, the media's addresses by key, and the last vector.
export function showAnswer(answer, context) {
  if (!context.isBatch) return item(answer, context, 0);
  if (!answer.length) return h("p", { class: "quiet" }, "An empty list.");
  return h(
    "ol",
    { class: "batch" },
    answer.map((result, index) => h("li", {}, h("p", { class: "quiet" }, titleOf(context, index)), item(result, context, index))),
  );
}

function item(result, context, index) {
  const kind = answerKind(result, context.values);
  const element = VIEWS[kind](result, context, index);
  element.dataset.kind = kind;
  return element;
}

export function titleOf(context, index) {
  const names = Object.values(context.values).map((value) => value?.[index]?.name);
  return names.find((name) => name) ?? `${index + 1}`;
}

// Probabilities and scores

function bars(labels, values) {
  const order = values.map((value, index) => [labels[index], value]).sort((a, b) => b[1] - a[1]);
  return h("ul", { class: "bars" }, order.map(([label, value]) => bar(label, value)));
}

function bar(label, value, properties = {}) {
  return h(
    "li",
    properties,
    h("span", { class: "bar-label" }, label),
    h("span", { class: "bar", "aria-hidden": "true" }, h("span", { style: { width: `${100 * value}%` } })),
    h("span", { class: "bar-value" }, percent(value)),
  );
}

const percent = (value) => `${(100 * value).toFixed(1)} %`;

// Boxes over the picture

function regions(result, context, index) {
  const found = regionsOf(result);
  const address = context.images[index] ?? context.images[0];
  if (!found.length) return h("p", { class: "quiet" }, "Nothing was found.");
  const hues = hueOfEach(found.map((region) => region.label));
  const list = h("ul", { class: "bars regions" });
  const picture = h("img", { src: address, alt: "The picture with what was found in it" });
  const frame = h("div", { class: "frame" }, picture);
  const highlight = (number, on) => {
    for (const element of [frame.querySelectorAll(".box")[number], list.children[number]]) {
      element?.classList.toggle("lit", on);
    }
  };
  picture.addEventListener("load", () => {
    for (const [number, region] of found.entries()) {
      const element = boxOf(region, picture, hues.get(region.label));
      element.addEventListener("pointerenter", () => highlight(number, true));
      element.addEventListener("pointerleave", () => highlight(number, false));
      frame.append(element);
    }
  });
  for (const [number, region] of found.entries()) {
    const row = bar(region.label || `${number + 1}`, region.score ?? 0, { tabindex: "0" });
    row.style.setProperty("--hue", hues.get(region.label));
    if (region.score === undefined) row.replaceChildren(region.label);
    for (const [event, on] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]]) {
      row.addEventListener(event, () => highlight(number, on));
    }
    list.append(row);
  }
  return h("div", {}, address ? frame : null, list);
}

// In shares of the picture, whose pixels a box is given in, so that it fits at every size.
function boxOf(region, picture, hue) {
  const [left, top, right, bottom] = region.box;
  const x = (value) => (100 * value) / picture.naturalWidth;
  const y = (value) => (100 * value) / picture.naturalHeight;
  const score = region.score === undefined ? "" : ` ${percent(region.score)}`;
  const element = h("div", { class: "box" }, h("span", {}, `${region.label}${score}`));
  Object.assign(element.style, {
    left: `${x(left)}%`,
    top: `${y(top)}%`,
    width: `${x(right - left)}%`,
    height: `${y(bottom - top)}%`,
  });
  element.style.setProperty("--hue", hue);
  element.classList.toggle("label-inside", y(top) < 8);
  return element;
}

function hueOfEach(labels) {
  const different = [...new Set(labels)];
  return new Map(different.map((label, index) => [label, Math.round((205 + (360 * index) / different.length) % 360)]));
}

// Transcripts with times

function segments(parts) {
  const time = (value) => (typeof value === "number" ? value.toFixed(2) : "");
  return h(
    "ol",
    { class: "segments" },
    parts.map((part) =>
      h("li", {}, h("span", { class: "quiet" }, `${time(part.start)} – ${time(part.end)}`), h("span", {}, part.text ?? part.word ?? part.speaker)),
    ),
  );
}

// Vectors

function embedding(result, context, index) {
  const norm = Math.hypot(...result);
  const last = context.lastVector;
  const facts = [
    ["Numbers", String(result.length)],
    ["Norm", norm.toFixed(3)],
  ];
  if (last && last.vector.length === result.length) {
    const dot = result.reduce((sum, value, i) => sum + value * last.vector[i], 0);
    const similarity = dot / (norm * Math.hypot(...last.vector) || 1);
    facts.push([`Similarity to the last one (${last.title})`, similarity.toFixed(3)]);
  }
  context.lastVector = { vector: result, title: titleOf(context, index) };
  return h(
    "div",
    {},
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    plot(result),
  );
}

// A bar for each number, or for the mean of a few where there are many.
function plot(vector) {
  const width = 320;
  const n = Math.min(vector.length, width);
  const means = Array.from({ length: n }, (_, i) => {
    const part = vector.slice(Math.floor((i * vector.length) / n), Math.floor(((i + 1) * vector.length) / n));
    return part.reduce((sum, value) => sum + value, 0) / part.length;
  });
  const highest = Math.max(...means.map(Math.abs)) || 1;
  const step = width / n;
  const path = means.map((mean, i) => `M${((i + 0.5) * step).toFixed(2)} 40V${(40 - (38 * mean) / highest).toFixed(2)}`).join("");
  return svg(
    "svg",
    { class: "plot", viewBox: `0 0 ${width} 80`, preserveAspectRatio: "none", role: "img", "aria-label": `Plot of the ${vector.length} numbers` },
    svg("path", { class: "zero", d: `M0 40H${width}` }),
    svg("path", { d: path, "stroke-width": Math.max(0.6, 0.8 * step) }),
  );
}

// JSON with lists of numbers and texts on one line

export function pretty(value, indent = "") {
  const inner = `${indent}  `;
  if (Array.isArray(value)) {
    if (!value.some((element) => element !== null && typeof element === "object")) {
      return `[${value.map((element) => JSON.stringify(element)).join(", ")}]`;
    }
    return `[\n${value.map((element) => inner + pretty(element, inner)).join(",\n")}\n${indent}]`;
  }
  if (value !== null && typeof value === "object") {
    const pairs = Object.entries(value).map(([key, element]) => `${inner}${JSON.stringify(key)}: ${pretty(element, inner)}`);
    return pairs.length ? `{\n${pairs.join(",\n")}\n${indent}}` : "{}";
  }
  return JSON.stringify(value);
}
