// The page: asks the server once a second while somebody looks, and hands what it says to the parts.

import { ApiError, Unreachable, askJson, askText, call, key } from "./api.js";
import { CacheMap } from "./cachemap.js";
import { makeCharts } from "./charts.js";
import { Playground } from "./playground.js";
import { parse, value } from "./prometheus.js";
import { History } from "./readings.js";
import { bytes, count } from "./text.js";

const POLL_MS = 1000;
const TIMEOUT_MS = 4000; // a server that hangs is not reachable either

const $ = (selector) => document.querySelector(selector);
// What the page has learnt of the server: the model's name, and whether it has a table (a base model has none).
const server = { model: null, table: true };
new Playground(server);
const charts = makeCharts($("#chart-grid"));
const map = new CacheMap();
const history = new History();

let refused = false; // the key is missing or wrong: no use in asking again until there is another one
let timer = null;
let polling = false;

function showState(state, text) {
  const engine = $("#engine");
  if (engine.textContent !== text) engine.textContent = text;
  engine.dataset.state = state;
  $("#charts").classList.toggle("stale", state === "away");
  $("#cache").classList.toggle("stale", state !== "ready"); // the records are gone with the engine
}

function showKey(error) {
  $("#key-state").textContent = refused ? "needed" : key.get() ? "set" : "none";
  $("#key-error").textContent = error ?? "";
  if (refused) $("#key-box").open = true;
}

async function pollReady(signal) {
  try {
    await call("ready", { signal });
    showState("ready", "ready");
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showState("waiting", error.message);
    return false;
  }
}

async function pollModel(signal) {
  server.model = (await askJson("v1/models", { signal })).data[0].id;
  $("#model").textContent = server.model;
}

async function pollMetrics(signal) {
  const scrape = parse(await askText("metrics", { signal }));
  history.add(Date.now() / 1000, scrape);
  charts.show(history.readings);
  const slots = (name) => value(scrape, `tolserve_tol_${name}`, { tier: "device" });
  const size = value(scrape, "tolserve_tol_record_bytes");
  const total = slots("slots");
  const text = total ? `${count(slots("slots_used"))} / ${count(total)}` : "–";
  $("#slots").textContent = total && size ? `${text} (${bytes(total * size)})` : text;
  $("#running").textContent = count(value(scrape, "tolserve_num_requests_running") ?? 0);
}

async function pollMap(signal) {
  try {
    await map.poll(signal);
  } catch (error) {
    if (!(error instanceof ApiError) || error.status === 401) throw error;
    server.table = error.code !== "no_table";
    map.note(server.table ? error.message : "This is a base model: it has no table, so there is no cache to show.");
  }
}

async function poll() {
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  const used = key.get();
  try {
    const ready = await pollReady(signal);
    if (refused) return;
    if (server.model === null) await pollModel(signal);
    await Promise.all([pollMetrics(signal), ready && server.table ? pollMap(signal) : null]);
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      if (used !== key.get()) return; // another one was given meanwhile
      refused = true;
      showKey(used ? "The server refuses this key." : "The server asks for a key.");
    } else if (error instanceof ApiError || error instanceof Unreachable) {
      history.gap(Date.now() / 1000);
      Object.assign(server, { model: null, table: true }); // another model may be served when it comes back
      showState("away", error instanceof ApiError ? error.message : "not reachable");
    } else {
      throw error; // a fault of this page
    }
  }
}

/** One poll after the other, never two at once; none while the page is hidden. */
async function loop() {
  clearTimeout(timer);
  if (polling || document.hidden) return;
  polling = true;
  const started = performance.now();
  try {
    await poll();
  } finally {
    polling = false;
    timer = setTimeout(loop, Math.max(0, POLL_MS - (performance.now() - started)));
  }
}

$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("#key").value.trim();
  if (!/^[\x21-\x7e]*$/.test(given)) return showKey("A key has no spaces and only plain ASCII characters.");
  key.set(given);
  $("#key").value = "";
  refused = false;
  showKey();
  if (given) $("#key-box").open = false;
  loop();
});

document.addEventListener("visibilitychange", loop);
showKey();
loop();
