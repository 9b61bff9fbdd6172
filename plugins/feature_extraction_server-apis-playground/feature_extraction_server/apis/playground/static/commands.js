// The curl and Python commands that send the same request.

import { featuresUrl, hasFiles, hasKey, isFiles } from "./api.js";

// The key itself is not shown.
const AUTHORIZATION = "Bearer YOUR_API_KEY";

const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value));

export function curlCommand(task, model, values) {
  const lines = [`curl -s ${shell(featuresUrl(task, model))}`];
  if (hasKey()) lines.push(`-H ${shell(`Authorization: ${AUTHORIZATION}`)}`);
  if (!hasFiles(values)) {
    lines.push(`-H 'Content-Type: application/json'`, `-d ${shell(JSON.stringify(values))}`);
    return lines.join(" \\\n  ");
  }
  for (const [key, value] of Object.entries(values)) {
    if (isFiles(value)) for (const file of value) lines.push(`-F ${shell(`${key}=@${curlFile(file.name)}`)}`);
    else lines.push(`--form-string ${shell(`${key}=${asText(value)}`)}`);
  }
  return lines.join(" \\\n  ");
}

// A name with curl's own separators in it must be quoted.
const curlFile = (name) => (/[;,"\\]/.test(name) ? `"${name.replaceAll("\\", "\\\\").replaceAll('"', '\\"')}"` : name);

export function pythonCommand(task, model, values) {
  const lines = ["import requests", "", "response = requests.post(", `    ${python(featuresUrl(task, model))},`];
  if (hasKey()) lines.push(`    headers={"Authorization": ${python(AUTHORIZATION)}},`);
  if (!hasFiles(values)) {
    lines.push(`    json=${python(values)},`);
  } else {
    const entries = Object.entries(values);
    const files = entries.filter(([, value]) => isFiles(value)).flatMap(([key, value]) => value.map((file) => [key, file]));
    const rest = entries.filter(([, value]) => !isFiles(value)).map(([key, value]) => [key, asText(value)]);
    lines.push("    files=[");
    for (const [key, file] of files) lines.push(`        (${python(key)}, open(${python(file.name)}, "rb")),`);
    lines.push("    ],");
    if (rest.length) lines.push(`    data=${python(Object.fromEntries(rest))},`);
  }
  lines.push(")", "print(response.json())");
  return lines.join("\n");
}

// A JSON value as Python spells it. JSON's strings are Python's too.
function python(value) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object") {
    const pairs = Object.entries(value).map(([key, element]) => `${python(key)}: ${python(element)}`);
    return `{${pairs.join(", ")}}`;
  }
  return JSON.stringify(value);
}
