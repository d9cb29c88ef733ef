// Six small charts with one cursor: uPlot draws the lines, the current values stand as text above them.

import { WINDOW_SECONDS } from "./readings.js";
import { bytes, element, percent, short } from "./text.js";

const HEIGHT = 104; // console.css has the same, so that nothing moves when a chart appears
const seconds = (value) => (value < 0.9995 ? `${short(value * 1000)} ms` : `${short(value)} s`);
const fromZero = (least) => (_, __, max) => [0, Math.max(least, (max ?? 0) * 1.1)];
const wholePercent = (value) => `${Number((value * 100).toPrecision(2))}%`;
const powers = (base, from, to) => Array.from({ length: to - from + 1 }, (_, i) => base ** (from + i));
const decade = (round, value) => round(Math.log10(value));
const wholeDecades = (_, min, max) => {
  const low = decade(Math.floor, min ?? 0.001);
  return [10 ** low, 10 ** Math.max(low + 1, decade(Math.ceil, max ?? 1))];
};
const atDecades = (_, __, min, max) => powers(10, decade(Math.round, min), decade(Math.round, max));

// Each line: key of a reading, label, colour of console.css, dashes. Lines of one chart differ in dashes as well as in
// colour. `axis` holds what differs from uPlot's own choice of ticks.
const PANELS = [
  { title: "Hit rate", format: percent, range: () => [0, 1], axis: { values: wholePercent },
    lines: [["hits", "hits", 1]] },
  { title: "Stall, share of time", format: percent, range: fromZero(0.01), axis: { values: wholePercent },
    lines: [["stall", "stall", 2]] },
  { title: "Tokens per second", format: short, range: fromZero(1), axis: {},
    lines: [["generated", "generated", 1], ["prompt", "prompt", 2, [5, 3]]] },
  { title: "Latency", format: seconds, range: wholeDecades, log: true, axis: { splits: atDecades },
    lines: [["first50", "first token p50", 1], ["first95", "p95", 1, [2, 3]],
      ["inter50", "next token p50", 2], ["inter95", "p95", 2, [2, 3]]] },
  { title: "Requests", format: short, range: fromZero(4), stepped: true,
    axis: { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500] },
    lines: [["running", "running", 1], ["waiting", "waiting", 2, [5, 3]]] },
  { title: "Memory", format: bytes, range: fromZero(2 ** 20), optional: true, axis: { incrs: powers(2, 10, 44) },
    lines: [["engine", "engine", 1], ["api", "API", 2, [5, 3]], ["device", "device tier", 3, [2, 3]],
      ["host", "host tier", 4, [8, 3, 2, 3]]] },
];

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const minutes = (_, splits) => {
  const now = Date.now() / 1000;
  return splits.map((split) => `−${Math.round((now - split) / 60)} min`);
};

function options(panel, width, onCursor) {
  const axis = {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [6, 4, 0, 0],
    cursor: { sync: { key: "console" }, drag: { x: false, y: false }, points: { size: 5 } },
    scales: {
      x: { time: false, range: () => [Date.now() / 1000 - WINDOW_SECONDS, Date.now() / 1000] },
      y: { range: panel.range, distr: panel.log ? 3 : 1 },
    },
    axes: [
      { ...axis, size: 20, gap: 2, values: minutes,
        splits: () => [240, 180, 120, 60].map((age) => Date.now() / 1000 - age) },
      { ...axis, size: 52, gap: 4, space: 28, filter: (_, splits) => splits, ...panel.axis,
        values: (_, splits) => splits.map(panel.axis.values ?? panel.format) },
    ],
    series: [{}, ...panel.lines.map(([, label, number, dash]) => ({
      label,
      stroke: () => colour(`--series-${number}`),
      width: 1.5,
      dash,
      points: { show: false },
      paths: panel.stepped ? uPlot.paths.stepped({ align: 1 }) : uPlot.paths.linear(),
    }))],
    hooks: { setCursor: [(plot) => onCursor(plot.cursor.idx ?? null)] },
  };
}

/** A swatch that shows colour and dashes as the chart draws them. */
function swatch(number, dash) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS(svg.namespaceURI, "line");
  const attributes = { x1: 0, x2: 16, y1: 4, y2: 4, "stroke-width": 2, "stroke-dasharray": (dash ?? []).join(" ") };
  for (const [name, value] of Object.entries(attributes)) line.setAttribute(name, value);
  svg.setAttribute("class", `swatch series-${number}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  return svg;
}

class Chart {
  #panel;
  #plot;
  #keys;
  #values;
  #data = [[]];

  constructor(panel, parent) {
    this.#panel = panel;
    this.#values = panel.lines.map(() => element("b", {}, "–"));
    this.#keys = panel.lines.map(([, label, number, dash], i) =>
      element("span", { className: "key" }, swatch(number, dash), `${label} `, this.#values[i]));
    const box = element("div", { className: "plot" });
    const keys = element("div", { className: "keys" }, ...this.#keys);
    const caption = element("figcaption", {}, element("h3", {}, panel.title), keys);
    parent.append(element("figure", { className: "chart" }, caption, box));
    this.#plot = new uPlot(options(panel, box.clientWidth || 300, (index) => this.#write(index)), this.#data, box);
    new ResizeObserver(() => this.#plot.setSize({ width: box.clientWidth, height: HEIGHT })).observe(box);
  }

  show(readings) {
    const column = (name) => readings.map((reading) => reading[name] ?? null);
    this.#data = [column("time"), ...this.#panel.lines.map(([name]) => column(name))];
    this.#plot.setData(this.#data);
    this.#write(this.#plot.cursor.idx ?? null);
  }

  redraw() {
    this.#plot.redraw(false, true);
  }

  /** The values under the cursor, or the latest ones. Where lines are optional, one without any value has no key. */
  #write(index) {
    this.#panel.lines.forEach((_, i) => {
      const values = this.#data[i + 1] ?? [];
      this.#keys[i].hidden = Boolean(this.#panel.optional) && values.every((value) => value === null);
      const value = values[index ?? values.length - 1] ?? null;
      this.#values[i].textContent = value === null ? "–" : this.#panel.format(value);
    });
  }
}

/** All charts inside `parent`. `show(readings)` draws; colours follow the page's scheme. */
export function makeCharts(parent) {
  const charts = PANELS.map((panel) => new Chart(panel, parent));
  const redraw = () => charts.forEach((chart) => chart.redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return { show: (readings) => charts.forEach((chart) => chart.show(readings)) };
}
