// The playground: a form, one streamed completion at a time, its tokens and what it used.

import { ApiError, askJson, call, chunks } from "./api.js";
import { count, element, percent, short } from "./text.js";
import { TokenView } from "./tokens.js";

const NUMBERS = ["max_tokens", "temperature", "top_p", "seed"];
const LOGPROBS = 5;

/** Times of one run, in seconds on the page's clock. */
class Timer {
  #start = performance.now();
  #first = null;
  #last = null;

  token() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  get firstToken() {
    return this.#first === null ? null : (this.#first - this.#start) / 1000;
  }

  /** Tokens per second after the first one. */
  rate(tokens) {
    return tokens > 1 && this.#last > this.#first ? ((tokens - 1) * 1000) / (this.#last - this.#first) : null;
  }
}

export class Playground {
  #server;
  #form = document.querySelector("#run-form");
  #button = document.querySelector("#run");
  #status = document.querySelector("#run-status");
  #error = document.querySelector("#run-error");
  #view = new TokenView();
  #stop = null; // AbortController of the run in progress

  /** `server` is what the page knows: `model`, a name or null, and `table`, whether there is one. */
  constructor(server) {
    this.#server = server;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#stop) this.#stop.abort();
      else this.#run();
    });
    document.querySelector("#playground").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.ctrlKey && !this.#stop) this.#form.requestSubmit();
      if (event.key === "Escape") this.#stop?.abort();
    });
    for (const radio of document.querySelectorAll("[name=colouring]")) {
      radio.addEventListener("change", () => this.#colour(radio.value));
    }
    this.#colour(document.querySelector("[name=colouring]:checked").value);
  }

  #colour(by) {
    document.querySelector("#tokens").className = `tokens by-${by}`;
    for (const kind of ["probability", "memory"]) {
      document.querySelector(`.for-${kind}`).hidden = kind !== by;
    }
  }

  async #run() {
    this.#stop = new AbortController();
    this.#button.textContent = "Stop";
    this.#fail(null);
    this.#view.clear();
    document.querySelector("#usage").replaceChildren();
    this.#status.textContent = "running";
    try {
      this.#status.textContent = await this.#stream(this.#stop.signal);
    } catch (error) {
      this.#status.textContent = error.name === "AbortError" ? "stopped" : "failed";
      if (error.name !== "AbortError") this.#fail(error);
    } finally {
      this.#view.end();
      this.#stop = null;
      this.#button.textContent = "Run";
    }
  }

  /** Runs to the end and returns how it ended. */
  async #stream(signal) {
    const { prompt, ...numbers } = this.#values();
    const model = this.#server.model ?? (await askJson("v1/models", { signal })).data[0].id;
    const listing = { model, prompt, return_token_strs: true };
    const { tokens, token_strs } = await askJson("tokenize", { body: listing, signal });
    // The server would begin with a token of its own, and every hit would stand one token too late.
    if (!tokens.length) throw new ApiError(400, { message: "write a prompt first", param: "prompt" });
    const body = {
      model, prompt, ...numbers, stream: true, stream_options: { include_usage: true }, logprobs: LOGPROBS,
      ...(this.#server.table && { tol: { token_hits: true } }),
    };
    const timer = new Timer();
    const response = await call("v1/completions", { body, signal });
    this.#view.addPrompt(tokens, token_strs);
    let reason = null;
    for await (const { choices: [choice], usage } of chunks(response)) {
      if (choice?.logprobs?.tokens.length) timer.token();
      if (choice) this.#view.addChoice(choice);
      reason = choice?.finish_reason ?? reason;
      if (usage) this.#report(usage, timer);
    }
    return reason === "length" ? "done: max tokens reached" : "done: the model ended its answer";
  }

  /** The form as request fields; an empty number is left to the server. */
  #values() {
    const values = { prompt: this.#form.elements.prompt.value };
    for (const name of NUMBERS) {
      const input = this.#form.elements[name];
      // JavaScript's numbers would change a larger one on the way.
      if (input.validity.badInput || Math.abs(input.valueAsNumber) > Number.MAX_SAFE_INTEGER) {
        throw new ApiError(400, { message: `${name}: write a number of at most 15 digits`, param: name });
      }
      if (input.value !== "") values[name] = input.valueAsNumber;
    }
    return values;
  }

  /** The server's words under the form, and its field marked; null takes them away. */
  #fail(error) {
    for (const field of this.#form.elements) field.removeAttribute("aria-invalid");
    this.#error.textContent = error?.message ?? "";
    const field = error?.param && this.#form.elements[error.param];
    if (!field) return;
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }

  #report({ prompt_tokens, prompt_tokens_details, completion_tokens, tol }, timer) {
    const rate = timer.rate(completion_tokens);
    const first = timer.firstToken;
    const facts = {
      Prompt: `${count(prompt_tokens)} tokens`,
      Kept: `${count(prompt_tokens_details.cached_tokens)} of them`,
      Answer: `${count(completion_tokens)} tokens`,
      Speed: rate === null ? "–" : `${short(rate)} tokens/s`,
      "First token": first === null ? "–" : `${short(first * 1000)} ms`,
      Lookups: count(tol.lookups),
      Hits: tol.lookups ? `${count(tol.hits)} (${percent(tol.hits / tol.lookups)})` : "0",
      Stall: `${short(tol.stall_ms)} ms`,
    };
    document.querySelector("#usage").replaceChildren(...Object.entries(facts).map(([name, text]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, text))));
  }
}
