// Prometheus' text format, and what two scrapes say about the time between them.

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$/;
const LABEL = /([A-Za-z_]\w*)="((?:\\.|[^"\\])*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

const number = (text) => (/^[+-]?Inf$/i.test(text) ? (text[0] === "-" ? -Infinity : Infinity) : Number(text));

/** A scrape: Map of metric name to Map of label string to {labels, value}. Lines that are no sample are left out. */
export function parse(text) {
  const scrape = new Map();
  for (const line of text.split("\n")) {
    const match = line.startsWith("#") ? null : LINE.exec(line);
    if (!match) continue;
    const [, name, written = "", value] = match;
    const labels = {};
    for (const [, label, raw] of written.matchAll(LABEL)) {
      labels[label] = raw.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    if (!scrape.has(name)) scrape.set(name, new Map());
    scrape.get(name).set(written, { labels, value: number(value) });
  }
  return scrape;
}

const matches = (labels, wanted) => Object.entries(wanted).every(([name, value]) => labels[name] === value);

/** Sum of a metric's series with the wanted labels; null when there is none. */
export function value(scrape, name, wanted = {}) {
  const series = [...(scrape.get(name)?.values() ?? [])].filter(({ labels }) => matches(labels, wanted));
  return series.length ? series.reduce((sum, sample) => sum + sample.value, 0) : null;
}

/** What a counter grew by, summed over its series; one that fell began anew at zero. Null when there is none. */
export function increase(before, after, name, wanted = {}) {
  let sum = null;
  for (const [written, sample] of after.get(name) ?? []) {
    if (!matches(sample.labels, wanted)) continue;
    const old = before.get(name)?.get(written)?.value ?? 0;
    sum = (sum ?? 0) + (sample.value >= old ? sample.value - old : sample.value);
  }
  return sum;
}

/** The q-quantile of what a histogram observed between two scrapes, linear inside a bucket as Prometheus has it. Null
 * when it observed nothing. */
export function quantile(before, after, name, q) {
  const restarted = value(after, `${name}_count`) < value(before, `${name}_count`);
  const old = restarted ? new Map() : before;
  const grown = new Map();
  for (const [written, { labels, value: total }] of after.get(`${name}_bucket`) ?? []) {
    const past = old.get(`${name}_bucket`)?.get(written)?.value ?? 0;
    const bound = number(labels.le);
    grown.set(bound, (grown.get(bound) ?? 0) + total - past);
  }
  const buckets = [...grown].sort(([a], [b]) => a - b);
  const rank = q * (buckets.at(-1)?.[1] ?? 0);
  if (!(rank > 0)) return null;
  let [low, below] = [0, 0];
  for (const [bound, upTo] of buckets) {
    if (upTo >= rank) return bound === Infinity ? low : low + ((bound - low) * (rank - below)) / (upTo - below);
    [low, below] = [bound, upTo];
  }
  return null;
}
