"use strict";
// Draws the runs of the JSON in #data. Nothing is fetched, but by a page that is served live.
const PHASES = ["compute", "push", "wait", "apply", "pull"];
const RUN_COLOURS = 8;
let { runs, data_url: dataUrl } = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();
const byId = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const runColour = (index) => `run-${index % RUN_COLOURS}`;
const shown = () => runs.map((run, index) => ({ run, index })).filter(({ run }) => !hidden.has(run.path));

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A run is named once, in the chips on top; elsewhere it is its colour and number.
function mark(index) {
  const made = element("span", null, { class: "mark", style: `--run: var(--${runColour(index)})`, title: runs[index].name });
  made.append(element("span", null, { class: "dot" }), document.createTextNode(index + 1));
  return made;
}

// 0 1 2 5 as "0-2 5".
function ranges(numbers) {
  const found = [];
  for (const each of [...numbers].sort((a, b) => a - b)) {
    const last = found[found.length - 1];
    if (last && last[1] === each - 1) last[1] = each; else found.push([each, each]);
  }
  return found.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(" ");
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "-";
  if (value !== 0 && Math.abs(value) < 1e-4) return Number(value).toExponential(digits - 1);
  return Number(value).toLocaleString("en", { maximumSignificantDigits: digits });
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "-";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes.toLocaleString("en", { maximumSignificantDigits: 3 })} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 60) return `${number(seconds, 3)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function layout(more = {}) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
    margin: { l: 48, r: 12, t: 8, b: 36 },
    showlegend: false,
    hovermode: "x unified",
    uirevision: "kept",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    ...more,
    xaxis: { ...axis, title: { text: "step", standoff: 6 }, rangemode: "normal", ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"], displayModeBar: "hover" };
const draw = (id, traces, more) => Plotly.react(id, traces, layout(more), CONFIG);

// Round values of a logarithmic axis, few enough for their labels.
function logTicks(low, high, most) {
  const from = Math.floor(low), to = Math.ceil(high);
  for (const digits of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = from; power <= to; power += 1) for (const digit of digits) ticks.push(digit * 10 ** power);
    const seen = ticks.filter((value) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9);
    if (seen.length >= 3 && seen.length <= most) return seen;
    if (seen.length < 3) break; // less than a decade: as on a linear axis
    if (digits.length === 1) return seen.filter((value, place) => place % Math.ceil(seen.length / most) === 0);
  }
  const span = (10 ** high - 10 ** low) / 4, unit = 10 ** Math.floor(Math.log10(span));
  const step = [5, 2, 1].map((factor) => factor * unit).find((each) => each <= span);
  const ticks = [];
  for (let value = Math.ceil(10 ** low / step) * step; value <= 10 ** high; value += step) ticks.push(value);
  return ticks;
}

function setLogTicks(id) {
  const changes = {};
  for (const name of ["xaxis", "yaxis"]) {
    const axis = byId(id)._fullLayout[name];
    if (axis.type !== "log") continue;
    const ticks = logTicks(axis.range[0], axis.range[1], name === "xaxis" ? Math.max(3, axis._length / 70) : 8);
    if (String(axis.tickvals) === String(ticks)) continue;
    changes[`${name}.tickvals`] = ticks;
    changes[`${name}.ticktext`] = ticks.map((value) => (value >= 1e6 || value < 1e-4 ? value.toExponential(0) : number(value)));
  }
  if (Object.keys(changes).length) Plotly.relayout(id, changes);
}

function line(curve, index, more) {
  return { type: "scatter", mode: "lines", x: curve.x, y: curve.y, line: { color: colour(runColour(index)), width: 2 }, ...more };
}

function valueNear(curve, step) {
  let found = null;
  for (let i = 0; i < curve.x.length && curve.x[i] <= Math.max(step, curve.x[0]); i += 1) if (curve.y[i] !== null) found = curve.y[i];
  return found;
}

const inWords = ({ who, text }) => (text.startsWith(who) ? text : `${who}: ${text}`);

// What a run went on from: recoveries, and stops that it was resumed after.
const faults = (run) => [...run.recoveries, ...run.resumes].sort((a, b) => a.step - b.step);

function drawLoss() {
  const traces = [];
  let crosses = 0;
  for (const { run, index } of shown()) {
    if (byId("raw").checked) {
      traces.push(line(run.loss.raw, index, { opacity: 0.28, hoverinfo: "skip", line: { color: colour(runColour(index)), width: 1 } }));
    }
    traces.push(line(run.loss.smooth, index, { name: run.name, hovertemplate: "%{y:.5g}" }));
    const found = faults(run);
    if (found.length) {
      crosses += found.length;
      traces.push({
        type: "scatter",
        mode: "markers",
        name: "went on",
        x: found.map((each) => Math.max(each.step, 1)),
        y: found.map((each) => valueNear(run.loss.smooth, each.step)),
        text: found.map((each) => inWords(each).slice(0, 110)),
        hovertemplate: "%{text}",
        marker: { symbol: "x", size: 10, color: colour("bad"), line: { color: colour("card"), width: 1 } },
      });
    }
  }
  const axis = (id) => (byId(id).checked ? { type: "log", uirevision: "log", tickmode: "array" } : { type: "linear", uirevision: "linear" });
  draw("loss", traces, { xaxis: axis("log-x"), yaxis: axis("log-y") }).then((plot) => {
    setLogTicks("loss");
    plot.removeAllListeners("plotly_relayout");
    plot.on("plotly_relayout", () => setLogTicks("loss"));
  });
  const cross = crosses ? " A cross is a fault or a stop from which the run went on." : "";
  byId("loss-note").textContent = `Thick: smoothed over a fiftieth of the run; thin: each step.${cross} Drag to zoom, double-click to go back.`;
}

function plotIn(parent, id, caption) {
  let plot = byId(id);
  if (!plot) {
    const figure = element("figure");
    if (caption) figure.append(element("figcaption", caption));
    figure.append((plot = element("div", null, { id, class: "plot" })));
    parent.append(figure);
  }
  return plot;
}

function drawMetrics() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))];
  byId("evaluations").hidden = names.length === 0;
  names.forEach((name, number) => plotIn(byId("metrics"), `metric-${number}`, name)); // all, then sizes are known
  names.forEach((name, number) => {
    const id = `metric-${number}`;
    const traces = shown().filter(({ run }) => run.metrics[name])
      .map(({ run, index }) => line(run.metrics[name], index, { mode: "lines+markers", name: run.name, marker: { size: 5 }, hovertemplate: "%{y:.5g}" }));
    draw(id, traces);
  });
}

function drawTime() {
  const there = shown().filter(({ run }) => run.time.x.length);
  byId("phases").style.height = `${runs.length > 1 ? Math.max(200, 80 + 34 * there.length) : 130}px`;
  draw("phases", PHASES.map((phase) => ({
    type: "bar",
    orientation: "h",
    name: phase,
    y: there.map(({ index }) => (runs.length > 1 ? `run ${index + 1}` : "")),
    x: there.map(({ run }) => run.time.mean[phase]),
    marker: { color: colour(phase) },
    hovertemplate: "%{x:.3g} ms",
  })), { barmode: "stack", hovermode: "y unified", xaxis: { title: { text: "ms", standoff: 6 } }, yaxis: { autorange: "reversed" }, bargap: 0.45 });
  draw("throughput", there.map(({ run, index }) => line({ x: run.time.x, y: run.time.steps_per_s }, index, { name: run.name, hovertemplate: "%{y:.4g} steps/s" })), { yaxis: { rangemode: "tozero" } });
  const parent = byId("phases-over-time");
  runs.forEach((run, index) => {
    const plot = plotIn(parent, `phases-${index}`, runs.length > 1 ? `run ${index + 1}` : null);
    plot.parentElement.hidden = hidden.has(run.path) || run.time.x.length < 2;
  });
  runs.forEach((run, index) => {
    const id = `phases-${index}`;
    if (byId(id).parentElement.hidden || !byId("over-time").open) return;
    draw(id, PHASES.map((phase) => ({
      type: "scatter", mode: "lines", stackgroup: "all", name: phase, x: run.time.x, y: run.time[phase],
      line: { width: 0, color: colour(phase) }, fillcolor: colour(phase), hovertemplate: "%{y:.3g} ms",
    })), { yaxis: { rangemode: "tozero" } });
  });
  for (const term of document.querySelectorAll("dl.phases dt")) term.style.setProperty("--phase", `var(--${term.textContent})`);
}

function table(id, headings, rows, none) {
  const place = byId(id);
  place.replaceChildren();
  if (!rows.length) { place.append(element("p", none, { class: "quiet" })); return; }
  const isEmpty = (cell) => cell === "-" || cell === "" || cell === null || cell === undefined;
  const kept = headings.map((_, column) => column).filter((column) => rows.some(({ cells }) => !isEmpty(cells[column])) && (runs.length > 1 || headings[column][0] !== "run"));
  const made = element("table");
  const head = element("tr");
  for (const column of kept) {
    const [heading, kind] = headings[column], th = element("th", null, { class: kind || "" });
    th.append(heading);
    head.append(th);
  }
  const header = element("thead"), body = element("tbody");
  header.append(head);
  for (const { cells, className } of rows) {
    const row = element("tr", null, { class: className || "" });
    for (const column of kept) {
      const td = element("td", null, { class: headings[column][1] || "" });
      td.append(isEmpty(cells[column]) ? "-" : cells[column]);
      row.append(td);
    }
    body.append(row);
  }
  made.append(header, body);
  const scroll = element("div", null, { class: "scroll" });
  scroll.append(made);
  place.append(scroll);
}

function hostRows({ run, index }) {
  const hosts = new Map();
  const at = (host) => {
    if (!hosts.has(host)) hosts.set(host, { shards: [], standbys: [], workers: [], bytes: null, load: null });
    return hosts.get(host);
  };
  for (const { shard, host, standby, bytes, load } of run.hosts.shards) {
    const there = at(host);
    there.shards.push(shard);
    if (bytes !== null && bytes !== undefined) there.bytes += bytes;
    if (load !== null && load !== undefined) there.load = Math.max(there.load, load);
    if (standby) at(standby).standbys.push(shard);
  }
  for (const { rank, host } of run.hosts.workers) at(host).workers.push(rank);
  return [...hosts].map(([host, { shards, standbys, workers, bytes, load }]) => ({
    cells: [mark(index), host, ranges(shards), ranges(standbys), ranges(workers), bytes === null ? "-" : size(bytes), load === null ? "-" : `${Math.round(100 * load)} %`],
  }));
}

function hasDied(run) {
  return /^(failed|killed)/.test(run.outcome);
}

function drawTables() {
  table("recoveries", [["run"], ["after step", "number"], ["what"]],
    shown().flatMap(({ run, index }) => faults(run).map((each) => ({ cells: [mark(index), each.step, inWords(each)] }))),
    shown().some(({ run }) => hasDied(run)) ? "None that a run went on from." : "None: nothing died or failed.");
  const verdict = (text) => element("span", text, { class: { verified: "good", complete: "" }[text] ?? "bad" });
  table("checkpoints", [["run"], ["step", "number"], ["size", "number"], ["verdict"]],
    shown().flatMap(({ run, index }) => run.checkpoints.filter((each) => each.verdict !== "removed").map((each) => ({ cells: [mark(index), each.step, size(each.bytes), verdict(each.verdict)] }))),
    "There are none.");
  const removed = shown().reduce((sum, { run }) => sum + run.checkpoints.filter((each) => each.verdict === "removed").length, 0);
  byId("removed").textContent = removed ? `${number(removed, 9)} older ones were removed, as newer ones were kept.` : "";
  table("hosts", [["run"], ["host"], ["shards"], ["standbys"], ["workers"], ["size", "number"], ["most load", "number"]],
    shown().flatMap((each) => (each.run.hosts ? hostRows(each) : [])), "Not recorded.");
  drawConfiguration();
}

function drawConfiguration() {
  const present = shown();
  const keys = [...new Set(present.flatMap(({ run }) => Object.keys(run.configuration)))];
  byId("differs-control").hidden = present.length < 2;
  const only = byId("differs").checked && present.length > 1;
  if (present.length === 1) { // in columns
    const list = (kept) => {
      const made = element("dl", null, { class: "settings" });
      for (const key of kept) {
        const pair = element("div");
        pair.append(element("dt", key), element("dd", present[0].run.configuration[key]));
        made.append(pair);
      }
      return made;
    };
    const isPlace = (key) => key.startsWith("version of") || ["python", "host", "cpus"].includes(key);
    const place = element("details", null, byId("place")?.open ? { id: "place", open: "" } : { id: "place" });
    place.append(element("summary", "Versions and machine"), list(keys.filter(isPlace)));
    byId("configuration").replaceChildren(...(keys.length ? [list(keys.filter((key) => !isPlace(key))), place] : [element("p", "Not recorded.", { class: "quiet" })]));
    return;
  }
  const rows = keys.map((key) => {
    const values = present.map(({ run }) => run.configuration[key]);
    return { className: new Set(values).size > 1 ? "differs" : "", cells: [key, ...values] };
  });
  rows.sort((a, b) => b.className.length - a.className.length); // what differs first
  table("configuration", [["setting", "key"], ...present.map(({ index }) => [mark(index)])], rows.filter((row) => !only || row.className), only ? "Nothing differs." : "Not recorded.");
}

function drawOverview() {
  const place = byId("overview");
  place.replaceChildren();
  place.classList.toggle("one", shown().length === 1);
  for (const { run, index } of shown()) {
    const card = element("div", null, { class: "card", style: `--run: var(--${runColour(index)})` });
    const good = run.outcome === "finished" || run.outcome.startsWith("stopped");
    const list = element("dl");
    const rate = run.time.steps_per_s.length ? 1000 / PHASES.reduce((sum, phase) => sum + run.time.mean[phase], 0) : null;
    const rows = [
      ["outcome", run.outcome, good ? "good" : hasDied(run) ? "bad" : ""],
      ["steps", run.steps ? `${number(run.reached, 9)} of ${number(run.steps, 9)}` : number(run.reached, 9)],
      ["loss, smoothed", number(run.loss.last)],
      ...Object.entries(run.metrics).map(([name, curve]) => [name, number(curve.y[curve.y.length - 1])]),
      ["steps/s", number(rate, 3)],
      ["trained for", duration(run.seconds)],
      ...(run.outcome === "running" && rate ? [["time left", duration((run.steps - run.reached) / rate)]] : []),
      ["recoveries", String(run.recoveries.length)],
    ];
    for (const [term, text, className] of rows) {
      const pair = element("div");
      pair.append(element("dt", term), element("dd", text, { class: className || "" }));
      list.append(pair);
    }
    const name = element("h3");
    name.append(mark(index));
    card.append(...(runs.length > 1 ? [name] : []), list);
    place.append(card);
  }
}

function drawRuns() {
  const place = byId("runs");
  place.replaceChildren();
  place.hidden = runs.length < 2;
  runs.forEach((run, index) => {
    const label = element("label", null, { style: `--run: var(--${runColour(index)})`, title: run.path });
    const box = element("input", null, { type: "checkbox" });
    box.checked = !hidden.has(run.path);
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(run.path); else hidden.add(run.path);
      drawAll();
    });
    label.append(box, mark(index), run.name);
    place.append(label);
  });
}

function drawAll() {
  const when = runs.map((run) => run.started).filter(Boolean);
  const live = dataUrl ? " · live" : "";
  const date = when.length ? ` · begun ${new Date(1000 * Math.min(...when)).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })}` : "";
  byId("summary").textContent = `${runs.length === 1 ? runs[0].name : `${runs.length} runs`}${date}${live}`;
  drawOverview();
  drawLoss();
  drawMetrics();
  drawTime();
  drawTables();
}

byId("differs").checked = runs.length > 1;
const positive = runs.every((run) => run.loss.raw.y.every((value) => value === null || value > 0));
byId("log-y").checked = positive;
for (const id of ["log-y", "log-x", "raw"]) byId(id).addEventListener("change", drawLoss);
byId("differs").addEventListener("change", drawTables);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
byId("over-time").open = runs.length === 1;
byId("over-time").addEventListener("toggle", drawTime);
drawRuns();
drawAll();
async function follow() {
  let everySeconds = 2;
  try {
    const answer = await fetch(dataUrl, { cache: "no-store" });
    if (answer.ok) {
      const found = await answer.json();
      ({ runs, every_s: everySeconds } = found);
      drawAll();
    }
  } catch (error) {
    byId("summary").textContent = "The run has ended, or cannot be reached; this is what it said last.";
  }
  setTimeout(follow, 1000 * everySeconds);
}
if (dataUrl) setTimeout(follow, 1000);
