// The device tier as a grid of cells, one record each, on a canvas: thousands of cells redrawn in a few milliseconds.

import { askJson } from "./api.js";
import { count, element, visible } from "./text.js";

// Cells of 10 pixels fill a desktop's width at this count; a larger cache shows its most recently used records.
const MOST_CELLS = 2048;
const TABLE_ROWS = 50;
const EVICTED_SHOWN = 40;
// Lower ends of the steps of "uses": a factor of four each, since a few tokens are used thousands of times.
const STEPS = [1, 2, 4, 16, 64, 256, 1024];
const LARGEST_CELL = 20;
const SMALLEST_CELL = 9;
const AREA_HEIGHT = 150; // pixels that the cells should fill

const stepOf = (uses) => STEPS.findLastIndex((least) => uses >= least);
const STATES = { resident: "resident", pinned: "pinned: used by the last step", arriving: "arriving" };

/** "the token, its id, uses and state" in words. */
export function describe(token) {
  const uses = token.uses === 1 ? "1 use" : `${count(token.uses)} uses`;
  return `“${visible(token.text)}”  id ${token.id}, ${uses}, ${STATES[token.state]}`;
}

/** Which cell shows which token. A token keeps its cell while it is there, so nothing moves but what changes. */
export class Seats {
  #cellOf = new Map();
  cells = [];

  /** `tokens` are those to show now, `size` how many cells there are. */
  place(tokens, size) {
    tokens = tokens.slice(0, size);
    const present = new Set(tokens.map((token) => token.id));
    if (size < this.cells.length) this.#cellOf.clear();
    this.cells = new Array(size).fill(null);
    for (const [id, cell] of this.#cellOf) if (!present.has(id)) this.#cellOf.delete(id);
    for (const token of tokens) if (this.#cellOf.has(token.id)) this.cells[this.#cellOf.get(token.id)] = token;
    let free = 0;
    for (const token of tokens) {
      if (this.#cellOf.has(token.id)) continue;
      while (this.cells[free] !== null) free++;
      this.cells[free] = token;
      this.#cellOf.set(token.id, free);
    }
  }
}

function paintCell(context, palette, token, x, y, size) {
  const inner = size - 1;
  if (token === null || token.state === "arriving") {
    context.strokeStyle = token === null ? palette.line : palette.ink;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, inner - 1, inner - 1);
    if (token === null) return;
    context.beginPath();
    context.moveTo(x + 0.5, y + inner - 0.5);
    context.lineTo(x + inner - 0.5, y + 0.5);
    context.stroke();
    return;
  }
  context.fillStyle = palette.heat[stepOf(token.uses)] ?? palette.heat[0];
  context.fillRect(x, y, inner, inner);
  if (token.state !== "pinned") return;
  context.strokeStyle = palette.pin;
  context.lineWidth = 2;
  context.strokeRect(x + 1, y + 1, inner - 2, inner - 2);
}

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const heat = STEPS.map((_, i) => colour(`--heat-${i}`));
  return { heat, line: colour("--line"), ink: colour("--ink"), pin: colour("--pin"), focus: colour("--focus") };
}

export class CacheMap {
  #canvas = document.querySelector("#map");
  #readout = document.querySelector("#map-readout");
  #spoken = document.querySelector("#map-spoken");
  #rows = document.querySelector("#hot tbody");
  #seats = new Seats();
  #layout = { columns: 1, size: LARGEST_CELL };
  #selected = null;
  #tokens = [];

  constructor() {
    this.#writeLegend();
    this.#canvas.addEventListener("pointermove", (event) => this.#select(this.#cellAt(event)));
    this.#canvas.addEventListener("pointerdown", (event) => this.#select(this.#cellAt(event)));
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    this.#canvas.addEventListener("focus", () => this.#selected === null && this.#select(0, true));
    document.querySelector("#hot").addEventListener("toggle", () => this.#writeTable());
    new ResizeObserver(() => this.#draw()).observe(this.#canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  /** Ask the server and show what it says. Rejects as `askJson` does. */
  async poll(signal) {
    this.show(await askJson(`v1/tol/cache?limit=${MOST_CELLS}`, { signal }));
  }

  show({ slots, used, tokens, evicted }) {
    this.note("");
    this.#tokens = tokens;
    this.#seats.place(tokens, Math.min(slots, MOST_CELLS));
    const part = used > tokens.length ? `, the ${count(tokens.length)} most recently used shown` : "";
    document.querySelector("#map-count").textContent = `${count(used)} of ${count(slots)} slots used${part}`;
    this.#draw();
    this.#writeReadout();
    this.#writeTable();
    const chips = evicted.slice(0, EVICTED_SHOWN).map(({ id, text }) =>
      element("li", { title: `id ${id}` }, visible(text)));
    document.querySelector("#evicted").replaceChildren(...(chips.length ? chips : [element("li", {}, "none yet")]));
  }

  /** A line instead of the map; "" brings the map back. */
  note(text) {
    const note = document.querySelector("#map-note");
    note.textContent = text;
    note.hidden = !text;
    document.querySelector("#map-body").hidden = Boolean(text);
    document.querySelector("#map-legend").hidden = Boolean(text);
    if (text) document.querySelector("#map-count").textContent = "";
  }

  #fit() {
    const width = Math.max(this.#canvas.parentElement.clientWidth, 40);
    const cells = Math.max(this.#seats.cells.length, 1);
    const wanted = Math.floor(Math.sqrt((width * AREA_HEIGHT) / cells));
    const size = Math.min(LARGEST_CELL, Math.max(SMALLEST_CELL, wanted));
    const columns = Math.floor(width / size);
    this.#layout = { columns, size };
    return { width, height: Math.ceil(cells / columns) * size };
  }

  #draw() {
    const { width, height } = this.#fit();
    const scale = devicePixelRatio;
    const canvas = this.#canvas;
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== wide) canvas.width = wide;
    if (canvas.height !== high) canvas.height = high;
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    const context = canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const palette = readPalette();
    this.#seats.cells.forEach((token, i) => paintCell(context, palette, token, ...this.#corner(i), this.#layout.size));
    if (this.#selected === null || this.#selected >= this.#seats.cells.length) return;
    const [x, y] = this.#corner(this.#selected);
    context.strokeStyle = palette.focus;
    context.lineWidth = 2;
    context.strokeRect(x, y, this.#layout.size - 1, this.#layout.size - 1);
  }

  #corner(index) {
    const { columns, size } = this.#layout;
    return [(index % columns) * size, Math.floor(index / columns) * size];
  }

  #cellAt(event) {
    const { columns, size } = this.#layout;
    const column = Math.min(columns - 1, Math.floor(event.offsetX / size));
    const index = Math.floor(event.offsetY / size) * columns + column;
    return index >= 0 && index < this.#seats.cells.length ? index : this.#selected;
  }

  #move(event) {
    const { columns } = this.#layout;
    const last = this.#seats.cells.length - 1;
    const at = this.#selected ?? 0;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: last - at };
    if (!(event.key in steps) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = at + steps[event.key];
    if (next >= 0 && next <= last) this.#select(next, true);
  }

  #select(index, speak = false) {
    this.#selected = index;
    this.#draw();
    this.#writeReadout();
    if (speak) this.#spoken.textContent = this.#readout.textContent;
  }

  #writeReadout() {
    if (this.#selected === null) return;
    const token = this.#seats.cells[this.#selected];
    this.#readout.textContent = token ? describe(token) : "free slot";
  }

  #writeTable() {
    if (!document.querySelector("#hot").open) return;
    const hottest = [...this.#tokens].sort((a, b) => b.uses - a.uses).slice(0, TABLE_ROWS);
    this.#rows.replaceChildren(...hottest.map(({ id, text, uses, state }) =>
      element("tr", {}, ...[visible(text), id, count(uses), state].map((cell) => element("td", {}, String(cell))))));
  }

  #writeLegend() {
    const cell = (kind, title = "") => element("i", { className: `cell ${kind}`, title });
    const cells = STEPS.map((least, i) => cell(`heat-${i}`, `${least} uses or more`));
    document.querySelector("#map-legend").append(
      element("span", {}, "1 use"), element("span", { className: "cells" }, ...cells),
      element("span", {}, `${count(STEPS.at(-1))}+`),
      ...["pinned", "arriving", "free"].map((kind) => element("span", {}, cell(kind), ` ${kind}`)));
  }
}
