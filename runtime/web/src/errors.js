/** Something that a user can correct; the message is one line that says what was given and what was expected. */
export class EdgeRuntimeError extends Error {
  name = "EdgeRuntimeError"; // not the class's, which a bundler shortens
}

/** The bundle is damaged, unsafe to open, or of another version. */
export class BundleError extends EdgeRuntimeError {
  name = "BundleError";
}

/** A request does not fit the bundle: a label, a clock, a number of steps, a guidance scale. */
export class RequestError extends EdgeRuntimeError {
  name = "RequestError";
}

/** Refuses a request with a message. @param {unknown} when @param {string} message */
export function refuse(when, message) {
  if (when) throw new RequestError(message);
}

/** A value as messages show it. @param {unknown} value */
export function shown(value) {
  const text = typeof value === "bigint" ? `${value}` : (JSON.stringify(value) ?? String(value));
  return text.length > 120 ? `${text.slice(0, 120)}...` : text;
}

/** What an error says, on one line. @param {unknown} error */
export function oneLine(error) {
  return String(error instanceof Error ? error.message || error.name : error)
    .replace(/\s+/g, " ")
    .slice(0, 300);
}
