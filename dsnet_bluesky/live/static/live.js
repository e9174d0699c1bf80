// The page: what is going on now, the newest exposure, and the last results.
// Whatever comes from the server is put in as text, never as HTML.

import { Figure } from "./figure.js";
import { Missing, Refused, Stream, forgetKey, get, newest, root, setKey, takeKeyFromAddress } from "./tiled.js";

const LISTED = 15;
const NAMED = 3; // exposures that failed, named in the list for each result
const BETWEEN = 250; // ms between two looks at the catalog, however fast updates come
const POLL = 3000; // ms between two looks without the stream
const POLL_LIVE = 15_000; // ms between two looks with it: updates are hints, the catalog is the truth

const RESULT = {
  sample: "sample", scan: "original_scan_id", time: "original_start_time", raw: "raw_uid", beam: "direct_beam_uid",
  method: "method", model: "model_name", version: "model_version",
  status: "status", reason: "reason", exposures: "exposures", failures: "failures", updated: "updated",
};
const RUN = { sample: "start.sample", scan: "start.scan_id", time: "start.time", purpose: "start.purpose", stopped: "stop.time" };
const PURPOSES = { direct_beam: "direct beam", sample: "sample", blank: "blank", dark: "dark" };

const $ = (id) => document.getElementById(id);
const figure = new Figure($("curves"), $("residuals"), readOut);

let results = [];
let pinned = null; // the result chosen; null: follow the newest
let drawn = ""; // what is in the figure: result, exposure
let exposure = null;
let variables = { key: null }; // of the result shown: q and units, which do not change
let streams = [];
let reachable = false; // whether the last look succeeded
let timer = null;
let looking = false;
let again = false;
let looked = 0;

start();

function start() {
  takeKeyFromAddress();
  pinned = new URLSearchParams(location.hash.slice(1)).get("result");
  $("login").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key").value.trim());
    $("key").value = "";
    lookSoon();
  });
  $("follow").addEventListener("click", () => choose(null));
  $("ui").href = `${root}/ui/`;
  document.addEventListener("visibilitychange", () => document.hidden || lookSoon());
  lookSoon();
}

function lookSoon() {
  if (looking) {
    again = true;
    return;
  }
  clearTimeout(timer);
  timer = setTimeout(look, Math.max(0, looked + BETWEEN - Date.now()));
}

/** Look at the catalog once, and see to it that it is looked at again. */
async function look() {
  looking = true;
  again = false;
  try {
    await update();
    reachable = true;
    if (!streams.length) streams = ["desmeared", "raw"].map((path) => new Stream(path, lookSoon, sayConnection));
    sayConnection();
  } catch (error) {
    complain(error);
  }
  looked = Date.now();
  looking = false;
  const pause = document.hidden || (reachable && isLive()) ? POLL_LIVE : POLL;
  timer = setTimeout(look, again ? BETWEEN : pause);
}

async function update() {
  const [found, runs] = await Promise.all([
    newest("desmeared", LISTED, RESULT),
    newest("raw", 1, RUN).catch((error) => { if (error instanceof Missing || error instanceof Refused) return []; throw error; }),
  ]);
  results = found;
  $("login").hidden = true;
  $("main").hidden = false;
  if (pinned && !results.some((result) => result.id === pinned)) results.push(...await one(pinned));
  sayNow(runs[0]);
  list();
  await show(current());
}

/** The result to show: the one chosen, else the newest that has something to show. */
function current() {
  return results.find((result) => result.id === pinned)
    ?? results.find((result) => result.exposures > 0 || result.status === "failed")
    ?? results[0];
}

/** A result that is not among the last ones; none if it is not there. */
async function one(key) {
  try {
    const { data } = await get(`metadata/desmeared/${encodeURIComponent(key)}`, { fields: "metadata" });
    const said = data.attributes.metadata;
    return [{ id: key, ...Object.fromEntries(Object.entries(RESULT).map(([name, where]) => [name, said[where] ?? null])) }];
  } catch (error) {
    if (!(error instanceof Missing)) throw error;
    pinned = null;
    return [];
  }
}

function complain(error) {
  reachable = false;
  if (error instanceof Refused) {
    forgetKey(error.held);
    $("main").hidden = true;
    if ($("login").hidden) {
      $("login").hidden = false;
      $("key").focus();
    }
    connection("refused", "not signed in");
  } else if (error instanceof Missing) {
    connection("away", "this server has no results (/desmeared)");
  } else {
    connection("away", "the server does not answer; trying again");
    console.warn(error);
  }
}

function isLive() {
  return streams.length > 0 && streams.every((stream) => stream.live);
}

function sayConnection() {
  if (!reachable) return; // said by what was asked last
  if (isLive()) connection("live", "live");
  else connection("polling", `asking every ${POLL / 1000} s`);
}

function connection(state, text) {
  if ($("connection").textContent === text) return; // or a screen reader says it again and again
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

// -- what is said --

function sayNow(run) {
  let text = "No scan has been recorded yet.";
  if (run) {
    const what = PURPOSES[run.purpose] ?? "scan";
    const name = `${run.scan === null ? "Scan" : `Scan ${run.scan}`} (${run.purpose === "sample" ? nameOf(run) : what})`;
    text = run.stopped
      ? `No scan is running. ${name} ended at ${clock(run.stopped)}.`
      : `${name} is running since ${clock(run.time)}.`;
    if (!run.stopped && run.purpose === "sample" && !results.some((result) => result.raw === run.id)) {
      text += " It has no result yet.";
    }
  }
  if ($("now").textContent !== text) $("now").textContent = text;
}

function list() {
  $("empty").hidden = results.length > 0;
  const shown = current()?.id;
  const focused = document.activeElement?.dataset?.result;
  $("results").replaceChildren(...results.flatMap((result) => rows(result, result.id === shown)));
  if (focused) $("results").querySelector(`[data-result="${CSS.escape(focused)}"]`)?.focus();
}

/** A result as a row of the table, and a second one with what went wrong. */
function rows(result, shown) {
  const open = element("button", nameOf(result), { type: "button" });
  open.dataset.result = result.id;
  open.addEventListener("click", () => choose(result.id));
  const sample = element("td");
  sample.append(open);
  const status = element("td", result.status);
  status.dataset.status = result.status;
  const line = element("tr");
  line.append(
    sample, element("td", when(result.time)), element("td", modelOf(result)),
    element("td", String(result.exposures ?? 0), { className: "number" }), status,
  );
  if (shown) line.setAttribute("aria-current", "true");
  const wrong = whatWentWrong(result);
  if (!wrong.length) return [line];
  line.className = "explained";
  const cell = element("td", "", { colSpan: 5, className: "reason" });
  cell.append(...wrong.map((text) => element("p", text)));
  const below = element("tr");
  below.append(cell);
  return [line, below];
}

function whatWentWrong({ reason, failures }) {
  const rest = (failures ?? []).length - NAMED;
  return [
    ...(reason ? [reason] : []),
    ...(failures ?? []).slice(0, NAMED).map((failure) => `Exposure ${failure.exposure + 1}: ${failure.reason}`),
    ...(rest > 0 ? [`${rest} more exposures failed.`] : []),
  ];
}

function element(tag, text = "", properties = {}) {
  return Object.assign(document.createElement(tag), { textContent: text, ...properties });
}

function nameOf({ sample, raw, id }) {
  const name = sample !== null && typeof sample === "object" ? sample.name ?? JSON.stringify(sample) : sample;
  return String(name ?? raw ?? id);
}

function modelOf({ method, model, version }) {
  return model ? `${model} ${version ?? ""}`.trim() : method ?? "";
}

function clock(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
}

function when(seconds) {
  if (!seconds) return "";
  const date = new Date(1000 * seconds);
  const day = date.toDateString() === new Date().toDateString() ? "" : `${date.toISOString().slice(0, 10)} `;
  return day + clock(seconds);
}

// -- the result shown --

function choose(key) {
  pinned = key;
  history.replaceState(null, "", location.pathname + location.search + (key ? `#${new URLSearchParams({ result: key })}` : ""));
  lookSoon();
}

async function show(result) {
  $("follow").hidden = !pinned;
  if (!result) return;
  const failed = new Set((result.failures ?? []).map((failure) => failure.exposure));
  let index = (result.exposures ?? 0) - 1;
  while (failed.has(index)) index -= 1; // the newest that holds numbers
  $("title").textContent = result.scan === null ? nameOf(result) : `${nameOf(result)}, scan ${result.scan}`;
  sayFailure(result, index);
  link(result);
  if (index < 0) {
    $("figure").hidden = true;
    drawn = "";
    $("facts").textContent = [modelOf(result), result.status].join(" · ");
    return;
  }
  const wanted = `${result.id} ${index}`;
  if (wanted !== drawn) {
    exposure = await read(result.id, index);
    $("figure").hidden = false; // before it is drawn: it needs a width
    figure.draw(exposure);
    drawn = wanted;
    const said = `of exposure ${index + 1} of ${nameOf(result)}`;
    $("curves").setAttribute("aria-label", `Intensity against q ${said}: measured, desmeared with its band, smeared again`);
    $("residuals").setAttribute("aria-label", `Residuals ${said}, in standard deviations`);
    $("figure").dataset.drawn = wanted;
  }
  const chi2 = exposure.chi2 === null ? [] : [`χ² = ${exposure.chi2.toPrecision(3)}`];
  const which = result.status === "running" ? `exposure ${index + 1}` : `exposure ${index + 1} of ${result.exposures}`;
  $("facts").textContent = [which, modelOf(result), ...chi2, result.status].join(" · ");
}

function sayFailure(result, shown) {
  let text = result.status === "failed" ? `This result failed: ${result.reason}` : "";
  const last = (result.failures ?? []).find((failure) => failure.exposure === result.exposures - 1);
  if (!text && last) {
    text = `Exposure ${last.exposure + 1} failed: ${last.reason}`;
    if (shown >= 0) text += ` Shown is exposure ${shown + 1}.`;
  }
  $("failure").hidden = !text;
  if ($("failure").textContent !== text) $("failure").textContent = text;
}

function link(result) {
  const page = (path, key) => `${root}/ui/browse/${path}/${encodeURIComponent(key)}`;
  $("links").hidden = false;
  $("link-result").href = page("desmeared", result.id);
  $("link-raw").href = page("raw", result.raw);
  $("link-api").href = `${root}/api/v1/metadata/desmeared/${encodeURIComponent(result.id)}`;
  $("link-beam").hidden = !result.beam;
  if (result.beam) $("link-beam").href = page("raw", result.beam);
}

/** Read one exposure. Every array holds it: the number of exposures is written after all of them. */
async function read(key, index) {
  const path = `desmeared/${encodeURIComponent(key)}`;
  if (variables.key !== key) {
    const { data } = await get(`search/${path}`, { fields: "metadata", "page[limit]": 100 });
    const units = Object.fromEntries(data.map((node) => [node.id, node.attributes.metadata?.attrs?.units ?? ""]));
    variables = { key, units, q: await get(`array/full/${path}/q`, { format: "application/json" }) };
  }
  const at = { format: "application/json", slice: `${index}:${index + 1}` };
  const names = ["I", "Idev", "I_smeared", "Idev_smeared", "I_resmeared", "chi2"].filter((name) => name in variables.units);
  const rows = await Promise.all(names.map((name) => get(`array/full/${path}/${name}`, at)));
  const of = Object.fromEntries(names.map((name, i) => [name, rows[i][0]]));
  const residual = of.I_smeared.map((value, i) => {
    const of_sigma = (value - of.I_resmeared[i]) / of.Idev_smeared[i];
    return value === null || of.I_resmeared[i] === null || !Number.isFinite(of_sigma) ? null : of_sigma;
  });
  return {
    q: variables.q, measured: of.I_smeared, desmeared: of.I, error: of.Idev, again: of.I_resmeared, residual,
    chi2: of.chi2 ?? null, unit: unit(variables.units.I),
  };
}

function unit(units) {
  if (units === "" || units === "1") return "arb. units";
  return units.replace(/^1\s*\/\s*(\w+)$/, "$1⁻¹");
}

function readOut(index) {
  if (index === null || !exposure) {
    $("readout").textContent = "";
    return;
  }
  const number = (value) => (value === null || value === undefined ? "–" : value.toPrecision(4));
  $("readout").textContent =
    `q = ${number(exposure.q[index])} nm⁻¹ · measured ${number(exposure.measured[index])} · ` +
    `desmeared ${number(exposure.desmeared[index])} ± ${number(exposure.error[index])} · residual ${number(exposure.residual[index])} σ`;
}
