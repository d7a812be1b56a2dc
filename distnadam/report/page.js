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

function number(value, digits = 4) {
  if (value === null || value === undefined) return "-";
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
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") } },
    ...more,
    xaxis: { ...axis, title: { text: "step", standoff: 6 }, rangemode: "normal", ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"], displayModeBar: "hover" };
const draw = (id, traces, more) => Plotly.react(id, traces, layout(more), CONFIG);

function line(curve, index, more) {
  return { type: "scatter", mode: "lines", x: curve.x, y: curve.y, line: { color: colour(runColour(index)), width: 2 }, ...more };
}

function valueNear(curve, step) {
  let found = null;
  for (let i = 0; i < curve.x.length && curve.x[i] <= Math.max(step, curve.x[0]); i += 1) if (curve.y[i] !== null) found = curve.y[i];
  return found;
}

function drawLoss() {
  const traces = [];
  let recoveries = 0;
  for (const { run, index } of shown()) {
    if (byId("raw").checked) {
      traces.push(line(run.loss.raw, index, { opacity: 0.28, hoverinfo: "skip", line: { color: colour(runColour(index)), width: 1 } }));
    }
    traces.push(line(run.loss.smooth, index, { name: run.name, hovertemplate: "%{y:.5g}" }));
    if (run.recoveries.length) {
      recoveries += run.recoveries.length;
      traces.push({
        type: "scatter",
        mode: "markers",
        name: "recovery",
        x: run.recoveries.map((each) => Math.max(each.step, 1)),
        y: run.recoveries.map((each) => valueNear(run.loss.smooth, each.step)),
        text: run.recoveries.map((each) => `${each.who}: ${each.text}`.slice(0, 110)),
        hovertemplate: "%{text}",
        marker: { symbol: "x", size: 10, color: colour("bad"), line: { color: colour("card"), width: 1 } },
      });
    }
  }
  const axis = (id) => (byId(id).checked ? { type: "log" } : { type: "linear" });
  draw("loss", traces, { xaxis: axis("log-x"), yaxis: { ...axis("log-y"), exponentformat: "power", dtick: byId("log-y").checked ? "D2" : undefined } });
  const cross = recoveries ? " A cross is a fault that the run recovered from." : "";
  byId("loss-note").textContent = `Thick: smoothed over a fiftieth of the run; thin: each step.${cross} Drag to zoom, double-click to go back.`;
}

function plotIn(parent, id, caption) {
  let plot = byId(id);
  if (!plot) {
    const figure = element("figure");
    figure.append(element("figcaption", caption), (plot = element("div", null, { id, class: "plot" })));
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
  byId("phases").style.height = `${Math.max(240, 90 + 34 * there.length)}px`;
  draw("phases", PHASES.map((phase) => ({
    type: "bar",
    orientation: "h",
    name: phase,
    y: there.map(({ run, index }) => `${index + 1}. ${run.name.length > 18 ? `${run.name.slice(0, 17)}…` : run.name}`),
    x: there.map(({ run }) => run.time.mean[phase]),
    marker: { color: colour(phase) },
    hovertemplate: "%{x:.3g} ms",
  })), { barmode: "stack", hovermode: "y unified", xaxis: { title: { text: "ms", standoff: 6 } }, yaxis: { autorange: "reversed" }, bargap: 0.45 });
  draw("throughput", there.map(({ run, index }) => line({ x: run.time.x, y: run.time.steps_per_s }, index, { name: run.name, hovertemplate: "%{y:.4g} steps/s" })), { yaxis: { rangemode: "tozero" } });
  const parent = byId("phases-over-time");
  runs.forEach((run, index) => {
    const plot = plotIn(parent, `phases-${index}`, `${run.name}: milliseconds of a step, over the run`);
    plot.parentElement.hidden = hidden.has(run.path) || run.time.x.length < 2;
  });
  runs.forEach((run, index) => {
    const id = `phases-${index}`;
    if (byId(id).parentElement.hidden) return;
    draw(id, PHASES.map((phase) => ({
      type: "scatter", mode: "lines", stackgroup: "all", name: phase, x: run.time.x, y: run.time[phase],
      line: { width: 0, color: colour(phase) }, fillcolor: colour(phase), hovertemplate: "%{y:.3g} ms",
    })), { yaxis: { rangemode: "tozero" } });
  });
  for (const term of document.querySelectorAll("dl.phases dt")) term.style.setProperty("--phase", `var(--${term.textContent})`);
}

function table(id, headings, rows, none) {
  if (runs.length === 1 && headings[0][0] === "run") { // it would say the same in every row
    headings = headings.slice(1);
    rows = rows.map((row) => ({ ...row, cells: row.cells.slice(1) }));
  }
  const place = byId(id);
  place.replaceChildren();
  if (!rows.length) { place.append(element("p", none, { class: "quiet" })); return; }
  const made = element("table");
  const head = element("tr");
  for (const [heading, kind] of headings) head.append(element("th", heading, { class: kind || "" }));
  const header = element("thead");
  header.append(head);
  const body = element("tbody");
  for (const { cells, index, className } of rows) {
    const row = element("tr", null, { class: className || "" });
    cells.forEach((cell, column) => {
      const td = element("td", null, { class: headings[column][1] || "", "data-heading": headings[column][0] });
      if (column === 0 && index !== undefined && runs.length > 1) td.append(element("span", null, { class: "dot", style: `--run: var(--${runColour(index)})` }));
      if (cell === "-" || cell === null || cell === undefined) td.classList.add("empty");
      td.append(cell && cell.nodeType ? cell : document.createTextNode(cell === null || cell === undefined ? "-" : cell));
      row.append(td);
    });
    body.append(row);
  }
  made.append(header, body);
  const scroll = element("div", null, { class: "scroll" });
  scroll.append(made);
  place.append(scroll);
}

function drawTables() {
  table("recoveries", [["run"], ["step", "number"], ["who"], ["what"]],
    shown().flatMap(({ run, index }) => run.recoveries.map((each) => ({ index, cells: [run.name, each.step, each.who, each.text] }))),
    "None: nothing died or failed.");
  const verdict = (text) => element("span", text, { class: { verified: "good", complete: "", removed: "quiet" }[text] ?? "bad" });
  table("checkpoints", [["run"], ["step", "number"], ["size", "number"], ["verdict"], ["directory"]],
    shown().flatMap(({ run, index }) => run.checkpoints.map((each) => ({ index, cells: [run.name, each.step, size(each.bytes), verdict(each.verdict), each.path.split("/").pop()] }))),
    "None were written.");
  const share = (load) => (load === null || load === undefined ? "-" : `${Math.round(100 * load)} %`);
  table("hosts", [["run"], ["what"], ["host"], ["standby"], ["size", "number"], ["load", "number"]],
    shown().flatMap(({ run, index }) => !run.hosts ? [] : [
      ...run.hosts.shards.map((each) => ({ index, cells: [run.name, `shard ${each.shard}`, each.host, each.standby, size(each.bytes), share(each.load)] })),
      ...run.hosts.workers.map((each) => ({ index, cells: [run.name, `worker ${each.rank}`, each.host, "-", "-", "-"] })),
    ]), "Not recorded.");
  const present = shown();
  const keys = [...new Set(present.flatMap(({ run }) => Object.keys(run.configuration)))];
  const rows = keys.map((key) => {
    const values = present.map(({ run }) => run.configuration[key]);
    return { className: new Set(values).size > 1 ? "differs" : "", cells: [key, ...values] };
  });
  byId("differs-control").hidden = present.length < 2;
  const only = byId("differs").checked && present.length > 1;
  rows.sort((a, b) => b.className.length - a.className.length); // what differs first
  table("configuration", [["setting", "key"], ...present.map(({ run }) => [run.name])], rows.filter((row) => !only || row.className), only ? "Nothing differs." : "Not recorded.");
}

function drawOverview() {
  const place = byId("overview");
  place.replaceChildren();
  for (const { run, index } of shown()) {
    const card = element("div", null, { class: "card", style: `--run: var(--${runColour(index)})` });
    const good = run.outcome === "finished" || run.outcome.startsWith("stopped");
    const list = element("dl");
    const rate = run.time.steps_per_s.length ? 1000 / PHASES.reduce((sum, phase) => sum + run.time.mean[phase], 0) : null;
    const rows = [
      ["outcome", run.outcome, good ? "good" : run.outcome.startsWith("failed") ? "bad" : ""],
      ["steps", run.steps ? `${number(run.reached, 9)} of ${number(run.steps, 9)}` : number(run.reached, 9)],
      ["loss, smoothed", number(run.loss.last)],
      ...Object.entries(run.metrics).map(([name, curve]) => [name, number(curve.y[curve.y.length - 1])]),
      ["steps per second", number(rate, 3)],
      ["trained for", duration(run.seconds)],
      ["recoveries", String(run.recoveries.length)],
    ];
    for (const [term, text, className] of rows) list.append(element("dt", term), element("dd", text, { class: className || "" }));
    card.append(element("h3", run.name), element("p", run.task, { class: "quiet" }), list);
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
    label.append(box, element("span", null, { class: "dot", style: "margin: 0" }), document.createTextNode(run.name));
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
