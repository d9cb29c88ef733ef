// The tokens of a prompt and its answer, one element each, and the inspector for one of them.

import { askJson } from "./api.js";
import { bytesOfLabel, bytesOfName, element, labelOf, percent, visible } from "./text.js";

// Tokens are coloured by surprise in bits, which is even in what a token tells: 0 bits are certain, 8 are 1 in 256.
const MOST_BITS = 8;
const MEMORY = {
  hit: "hit: the record was in the device tier",
  miss: "miss: the record had to be fetched",
  pending: "not looked up yet",
  never: "not looked up",
  kept: "not looked up: what it gives was kept from an earlier request",
};
const UNASKED = ["never", "kept"];

const bits = (logprob) => Math.min(MOST_BITS, -logprob / Math.LN2);
const share = (logprob) => percent(Math.exp(logprob));

/** Token ids by label: the stream has none, so the tokenizer is asked for the label, once, when somebody looks. */
const ids = new Map();

async function idOf(label) {
  if (ids.has(label)) return ids.get(label);
  // Part of a character is no text that could be asked for.
  if (/^bytes:/.test(label)) return null;
  const body = { prompt: label, add_special_tokens: false };
  const { tokens } = await askJson("tokenize", { body });
  ids.set(label, tokens.length === 1 ? tokens[0] : null);
  return ids.get(label);
}

export class TokenView {
  #list = document.querySelector("#tokens");
  #inspector = document.querySelector("#inspector");
  #decoder = new TextDecoder();
  #tokens = [];
  #looked = 0; // how many tokens have a hit or a miss
  #shown = null;

  constructor() {
    const at = (event) => event.target.closest(".token");
    this.#list.addEventListener("pointerover", (event) => at(event) && this.#inspect(this.#indexOf(at(event))));
    this.#list.addEventListener("focusin", (event) => at(event) && this.#enter(this.#indexOf(at(event))));
    this.#list.addEventListener("keydown", (event) => this.#key(event));
    this.clear();
  }

  get hits() {
    return this.#tokens.filter((token) => token.memory === "hit").length;
  }

  clear() {
    this.#tokens = [];
    this.#looked = 0;
    this.#shown = null;
    this.#decoder = new TextDecoder();
    this.#list.replaceChildren();
    this.#list.tabIndex = 0;
    this.#write({ label: null, alternatives: [] });
  }

  /** Tokens of the prompt, as /tokenize lists them. */
  addPrompt(tokenIds, names) {
    names.forEach((name, i) => {
      const bytes = bytesOfName(name);
      this.#add(bytes, { label: labelOf(bytes), id: tokenIds[i], prompt: true, alternatives: [] });
    });
  }

  /** A choice of a streamed chunk: tokens with logprobs, then hits of tokens that came before. */
  addChoice({ logprobs, tol }) {
    const list = this.#list;
    const follow = list.scrollHeight - list.scrollTop - list.clientHeight < 8; // unless somebody has scrolled back
    logprobs?.tokens.forEach((label, i) => {
      const alternatives = Object.entries(logprobs.top_logprobs[i] ?? {}).sort(([, a], [, b]) => b - a);
      this.#add(bytesOfLabel(label), { label, logprob: logprobs.token_logprobs[i], alternatives });
    });
    for (const hit of tol?.hits ?? []) this.#mark(this.#looked++, hit === null ? "kept" : hit ? "hit" : "miss");
    if (follow) list.scrollTop = list.scrollHeight;
  }

  /** No more tokens come: the last one will never be looked up. */
  end() {
    this.#tokens.at(-1)?.node.append(this.#decoder.decode());
    for (let i = this.#looked; i < this.#tokens.length; i++) this.#mark(i, "never");
  }

  #add(bytes, token) {
    const node = element("span", { className: "token pending", role: "option", tabIndex: -1 });
    node.textContent = this.#decoder.decode(bytes, { stream: true });
    if (node.textContent.includes("\n")) node.classList.add("newline");
    if (token.prompt) node.classList.add("prompt");
    if (token.logprob !== undefined) node.style.setProperty("--surprise", percent(bits(token.logprob) / MOST_BITS));
    this.#tokens.push({ ...token, node, memory: "pending" });
    this.#name(this.#tokens.at(-1));
    this.#list.append(node);
    if (this.#tokens.length === 1) this.#rove(0);
  }

  #mark(index, memory) {
    const token = this.#tokens[index];
    if (!token) return;
    token.memory = memory;
    token.node.classList.remove("pending");
    token.node.classList.add(memory);
    this.#name(token);
    if (index === this.#shown) this.#write(token);
  }

  #name({ node, label, logprob, memory }) {
    const chance = logprob === undefined ? "prompt" : share(logprob);
    node.ariaLabel = `${visible(label)}, ${chance}, ${UNASKED.includes(memory) ? "not looked up" : memory}`;
  }

  #indexOf(node) {
    return this.#tokens.findIndex((token) => token.node === node);
  }

  /** One token is in the tab order at a time, so that Tab leaves the list. */
  #rove(index) {
    this.#list.tabIndex = -1;
    for (const node of this.#list.querySelectorAll("[tabindex='0']")) node.tabIndex = -1;
    this.#tokens[index].node.tabIndex = 0;
  }

  #enter(index) {
    this.#rove(index);
    this.#inspect(index);
  }

  #key(event) {
    const at = this.#tokens.findIndex((token) => token.node === document.activeElement);
    const last = this.#tokens.length - 1;
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key] ?? this.#line(at, event.key);
    if (at < 0 || next === null || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.#tokens[Math.min(last, Math.max(0, next))].node.focus();
  }

  /** The token nearest in the line above or below; the same one where there is no such line. */
  #line(at, key) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[key];
    if (!step || at < 0) return null;
    const { offsetTop, offsetLeft } = this.#tokens[at].node;
    const top = (i) => this.#tokens[i]?.node.offsetTop;
    let i = at;
    while (top(i) === offsetTop) i += step;
    if (top(i) === undefined) return at;
    const line = [...this.#tokens.keys()].filter((other) => top(other) === top(i));
    const distance = (other) => Math.abs(this.#tokens[other].node.offsetLeft - offsetLeft);
    return line.reduce((best, other) => (distance(other) < distance(best) ? other : best));
  }

  #inspect(index) {
    this.#tokens[this.#shown]?.node.setAttribute("aria-selected", "false");
    this.#shown = index;
    const token = this.#tokens[index];
    token.node.setAttribute("aria-selected", "true");
    this.#write(token);
    if (token.id !== undefined) return;
    idOf(token.label).then((id) => {
      token.id = id;
      if (this.#shown === index) this.#write(token);
    }, () => {}); // without an answer the id stays "–"; the header says what is wrong with the server
  }

  #write({ label, id, logprob, memory, prompt, alternatives }) {
    const set = (part, text) => (this.#inspector.querySelector(`[data-part=${part}]`).textContent = text);
    set("text", label === null ? "–" : visible(label));
    set("id", id ?? "–");
    set("probability", logprob === undefined ? (prompt ? "prompt" : "–") : share(logprob));
    set("logprob", logprob === undefined ? "–" : logprob.toFixed(3));
    set("memory", MEMORY[memory] ?? "–");
    const rows = alternatives.map(([other, value]) => {
      const bar = element("i", { className: "bar" });
      bar.style.setProperty("--share", percent(Math.exp(value)));
      const row = element("li", {}, element("code", {}, visible(other)), bar, element("span", {}, share(value)));
      if (other === label) row.classList.add("chosen");
      return row;
    });
    const hint = element("li", { className: "hint" }, "Point at a token, or move between them with the arrow keys.");
    this.#inspector.querySelector("[data-part=alternatives]").replaceChildren(...(label === null ? [hint] : rows));
  }
}
