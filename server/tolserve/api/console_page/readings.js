// What the charts show, from scrapes of /metrics: one reading per scrape.

import { increase, quantile, value } from "./prometheus.js";

export const WINDOW_SECONDS = 300;
// Rates compare a scrape with the one about five seconds before it: over a single second, a handful of steps and at
// most one or two first tokens make the lines jump too much to read.
const RATE_SECONDS = 5;
// A longer silence than this is drawn as a gap: the page was hidden. A slow poll takes up to four seconds.
const GAP_SECONDS = 6;

const P = "tolserve_";
const ratio = (part, whole) => (part !== null && whole > 0 ? part / whole : null);

/** The reading at `after`, from what changed since `before`. Null stands for "nothing to say". */
export function derive(before, after) {
  const seconds = after.time - before.time;
  const rate = (name, labels) => ratio(increase(before.scrape, after.scrape, P + name, labels), seconds);
  const at = (q, name) => quantile(before.scrape, after.scrape, P + name, q);
  const gauge = (name, labels) => value(after.scrape, P + name, labels);
  const recordBytes = gauge("tol_record_bytes");
  const tier = (name) => {
    const used = gauge("tol_slots_used", { tier: name });
    return used === null || recordBytes === null ? null : used * recordBytes;
  };
  return {
    hits: ratio(rate("tol_hits_total"), rate("tol_lookups_total")),
    stall: rate("tol_stall_seconds_total"),
    prompt: rate("prompt_tokens_total"),
    generated: rate("generation_tokens_total"),
    first50: at(0.5, "time_to_first_token_seconds"),
    first95: at(0.95, "time_to_first_token_seconds"),
    inter50: at(0.5, "inter_token_latency_seconds"),
    inter95: at(0.95, "inter_token_latency_seconds"),
    running: gauge("num_requests_running"),
    waiting: gauge("num_requests_waiting"),
    engine: gauge("resident_memory_bytes", { process: "engine" }),
    api: gauge("resident_memory_bytes", { process: "api" }),
    device: tier("device"),
    host: gauge("tol_slots", { tier: "host" }) ? tier("host") : null,
  };
}

/** The readings of the last five minutes, oldest first. */
export class History {
  #scrapes = [];
  readings = [];

  /** Take a scrape made at `time` (seconds). */
  add(time, scrape) {
    const last = this.#scrapes.at(-1);
    if (last && time - last.time > GAP_SECONDS) this.gap(last.time + 1);
    this.#scrapes.push({ time, scrape });
    while (this.#scrapes.length > 2 && this.#scrapes[1].time <= time - RATE_SECONDS) this.#scrapes.shift();
    if (this.#scrapes.length > 1) this.#push(time, derive(this.#scrapes[0], this.#scrapes.at(-1)));
  }

  /** Nothing is known from `time` on: lines break here, and rates begin anew. */
  gap(time) {
    this.#scrapes = [];
    if (this.readings.length && Object.keys(this.readings.at(-1)).length > 1) this.#push(time, {});
  }

  #push(time, reading) {
    this.readings.push({ time, ...reading });
    while (this.readings[0].time < time - WINDOW_SECONDS) this.readings.shift();
  }
}
