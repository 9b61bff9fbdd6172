// What a task's JSON schemas say about the kind of each input and of the answer.

export function words(name) {
  const text = name.replaceAll("_", " ");
  return text.charAt(0).toUpperCase() + text.slice(1);
}

// A schema without the alternatives "a list of these" (batch mode) and null.
export function single(schema) {
  const choices = (schema.anyOf ?? schema.oneOf ?? []).filter((choice) => choice.type !== "null");
  return choices.length ? { ...schema, anyOf: undefined, oneOf: undefined, ...choices[0] } : schema;
}

export function fieldKind(schema) {
  const one = single(schema);
  const types = [one.type].flat().filter((type) => type && type !== "null");
  if (one.contentMediaType?.startsWith("image/")) return "image";
  if (one.contentMediaType?.startsWith("audio/")) return "audio";
  if (one.enum) return "choice";
  if (types.length !== 1) return "json";
  const [type] = types;
  if (type === "array") return single(one.items ?? {}).type === "string" ? "list" : "json";
  return { string: "text", integer: "number", number: "number", boolean: "boolean" }[type] ?? "json";
}

const isNumber = (value) => typeof value === "number";
const isBox = (value) => Array.isArray(value) && value.length === 4 && value.every(isNumber);

// The kind of one result. Several classes with as many probabilities are told from a vector by the classes.
export function answerKind(result, values) {
  if (typeof result === "string") return "text";
  if (Array.isArray(result)) {
    if (result.length && result.every((value) => typeof value === "string")) return "texts";
    if (result.length && result.every(isNumber)) return classesOf(values, result.length) ? "probabilities" : "embedding";
    if (result.length && result.every((value) => isBox(value?.box))) return "regions";
    if (result.length && result.every((value) => typeof (value?.text ?? value?.speaker) === "string")) return "segments";
  } else if (result !== null && typeof result === "object") {
    if (Array.isArray(result.boxes) && Array.isArray(result.labels)) return "regions";
    if (Array.isArray(result.labels) && Array.isArray(result.scores)) return "probabilities";
    if (typeof result.text === "string" && Array.isArray(result.segments ?? result.words)) return "transcript";
  }
  return "json";
}

export function classesOf(values, n) {
  return Object.values(values).find(
    (value) => Array.isArray(value) && value.length === n && value.every((element) => typeof element === "string"),
  );
}

export function regionsOf(result) {
  if (Array.isArray(result)) {
    return result.map((region, index) => ({
      box: region.box,
      label: region.label ?? region.text ?? (region.embedding ? `face ${index + 1}` : ""),
      score: region.embedding ? undefined : (region.score ?? region.confidence), // of a face, it is no probability
    }));
  }
  return result.boxes.map((box, index) => ({ box, label: result.labels[index], score: result.scores?.[index] }));
}
