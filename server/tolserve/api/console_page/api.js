// Requests to the server: the key, errors, streams.

const STORED = "tolserve-api-key";

/** The API key. It lives in this tab's session storage and in the Authorization header, nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(STORED) ?? "",
  set: (value) => (value ? sessionStorage.setItem(STORED, value) : sessionStorage.removeItem(STORED)),
};

/** An answer that is no success: `status`, and the server's own message, `param` and `code`. */
export class ApiError extends Error {
  constructor(status, error = {}) {
    super(error.message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, param: error.param, code: error.code });
  }
}

/** Nobody answers, or the connection broke. */
export class Unreachable extends Error {}

/** What the promise gives. Whatever fetch and its streams throw becomes Unreachable, unless the caller aborted. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Unreachable("the server is not reachable");
  }
}

/** GET, or POST with a JSON body; the response, its body unread. Rejects with ApiError or Unreachable. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  const options = { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const response = await reached(fetch(path, options));
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new ApiError(response.status, answer.error);
}

/** The same, and the body as JSON or as text. */
export const askJson = async (path, options) => reached((await call(path, options)).json());
export const askText = async (path, options) => reached((await call(path, options)).text());

/** Server-sent events from text that arrives in any pieces. `feed` returns the data of the events it completed. */
export class EventParser {
  #rest = "";
  #data = [];

  feed(text) {
    const events = [];
    // A CR at the very end may be the first half of CR LF.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) this.#data.push(line.slice(5).replace(/^ /, ""));
      if (line !== "" || !this.#data.length) continue;
      events.push(this.#data.join("\n"));
      this.#data = [];
    }
    return events;
  }
}

/** The JSON chunks of a streamed answer. Throws ApiError where it carries an error, Unreachable where it breaks. */
export async function* chunks(response) {
  const parser = new EventParser();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reached(reader.read()); !part.done; part = await reached(reader.read())) {
    for (const data of parser.feed(part.value)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(response.status, chunk.error);
      yield chunk;
    }
  }
  throw new Unreachable("the stream ended before the answer was complete");
}
