// The server's HTTP interface. All URLs are relative to the page, which may be served below a prefix.

export class ServerError extends Error {
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

export const url = (...parts) => new URL(["api", ...parts.map(encodeURIComponent)].join("/"), document.baseURI).href;

export const featuresUrl = (task, model) => url("tasks", task, "models", model, "features");

// A key of the visitor's, as long as the tab is open.
const KEY = "feature-extraction-server-key";

export const hasKey = () => sessionStorage.getItem(KEY) !== null;

export const setKey = (key) => sessionStorage.setItem(KEY, key);

// The page asks for more than a server may let through (RATE_LIMIT), which has done nothing of what it refuses so.
const MAX_REPEATS = 20;
const MAX_WAIT_S = 30;

async function ask(target, options = {}, repeats = MAX_REPEATS) {
  if (hasKey()) options.headers = { ...options.headers, Authorization: `Bearer ${sessionStorage.getItem(KEY)}` };
  let response;
  try {
    response = await fetch(target, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  const text = await response.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new ServerError(`The server answered ${response.status} ${response.statusText} without JSON.`);
  }
  const wait = Number(response.headers.get("Retry-After") ?? Infinity);
  if (body.code === "rate_limited" && repeats && wait <= MAX_WAIT_S) {
    await new Promise((resolve) => {
      // Up to twice as long, so that what was refused together does not come together again.
      setTimeout(resolve, 1000 * wait * (1 + Math.random()));
      options.signal?.addEventListener("abort", resolve, { once: true });
    });
    return ask(target, options, repeats - 1);
  }
  if (response.status === 401) document.dispatchEvent(new Event("key-wanted"));
  if (!response.ok) throw new ServerError(body.error ?? `The server answered ${response.status}.`, body.field ?? null);
  return body;
}

export const get = (...parts) => ask(url(...parts));

export const post = (...parts) => ask(url(...parts), { method: "POST" });

// Files go as a form, everything else as JSON.
export function run(task, model, values, signal) {
  const target = featuresUrl(task, model);
  if (!hasFiles(values)) {
    const headers = { "Content-Type": "application/json" };
    return ask(target, { method: "POST", headers, body: JSON.stringify(values), signal });
  }
  const form = new FormData();
  for (const [key, value] of Object.entries(values)) {
    if (isFiles(value)) for (const file of value) form.append(key, file, file.name);
    // A browser would give a text's lines the ends that forms have: as a blob it goes as it is.
    else form.append(key, new Blob([typeof value === "string" ? value : JSON.stringify(value)]));
  }
  return ask(target, { method: "POST", body: form, signal });
}

export const isFiles = (value) => Array.isArray(value) && value[0] instanceof Blob;

export const hasFiles = (values) => Object.values(values).some(isFiles);
