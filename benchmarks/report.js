// follows page.js

const byId = new Map(data.rows.map((row) => [row.id, row]));
const metrics = Object.keys(data.metrics);
const MINUS = "\u2212";
const FULL_COLOUR = 10; // points of difference that get the strongest colour

// text ----------------------------------------------------------------------------------------------------------------

const fixed = (value, digits = 2) => (value === null || value === undefined ? "" : value.toFixed(digits).replace("-", MINUS));
const signed = (value) => (value > 0 ? "+" : "") + fixed(value);
const short = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(4)).toLocaleString("en").replace("-", MINUS));
const collator = new Intl.Collator("en", { numeric: true });

function meanText(metric) {
  if (!metric) return null;
  const spread = metric.std === null ? null : h("span", { class: "std" }, ` ± ${fixed(metric.std)}`);
  return [fixed(metric.mean), spread];
}

function colour(difference) {
  const strength = 0.08 + 0.47 * Math.min(1, Math.abs(difference) / FULL_COLOUR);
  return difference === 0 ? "transparent" : `rgba(var(--${difference > 0 ? "better" : "worse"}), ${strength.toFixed(3)})`;
}

const methodName = (row) => row.method + (row.fidelity === "released" ? " (released)" : "");

// state, kept in the hash ---------------------------------------------------------------------------------------------

const FILTERS = ["paper", "profile", "dataset", "method", "origin"];
const DEFAULTS = { q: "", paper: "", profile: "", dataset: "", method: "", origin: "", metric: "last", missing: "", sort: "", dir: "", open: "" };
let state = { ...DEFAULTS };

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...DEFAULTS };
  for (const name of Object.keys(DEFAULTS)) if (given.has(name)) state[name] = given.get(name);
  if (!metrics.includes(state.metric)) state.metric = DEFAULTS.metric;
  if (!columns.some((column) => column.key === state.sort)) state.sort = state.dir = "";
  if (state.sort && !["ascending", "descending"].includes(state.dir)) state.dir = "ascending";
  if (!state.sort) state.dir = "";
}

function writeHash() {
  const kept = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
  history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
}

function change(values) {
  Object.assign(state, values);
  writeHash();
  render();
}

const openRows = () => new Set(state.open.split(",").filter(Boolean));

// columns -------------------------------------------------------------------------------------------------------------

const against = (row) => row.against?.metrics[state.metric] ?? null;

function againstCell(row) {
  const found = against(row);
  if (!found) return row.method === "CE" && row.runs.length ? h("span", { class: "small" }, "baseline") : null;
  const sure = found.low !== null && (found.low > 0 || found.high < 0);
  const interval = found.low === null ? null : h("span", { class: "sub" }, `[${signed(found.low)}, ${signed(found.high)}]`);
  return [h("span", { class: `diff${sure ? " sure" : ""}`, style: { background: colour(found.difference) } }, signed(found.difference)), interval];
}

const shown = (row) => (row.published.shown === null ? null : data.figures[row.published.shown]);

function publishedCell(row) {
  const figure = shown(row);
  if (!figure) return null;
  const spread = figure.std ? h("span", { class: "std" }, ` ± ${figure.std}`) : null;
  return [figure.value, spread, h("span", { class: "sub" }, h("span", { class: `badge ${figure.status}` }, figure.status))];
}

function publishedDifference(row) {
  const found = row.published;
  if (found.difference === null) return found.why && row.runs.length ? h("span", { class: "sub why" }, found.why) : null;
  const text = signed(found.difference);
  const value = found.comparable
    ? h("span", { class: "diff", style: { background: colour(found.difference) } }, text)
    : h("span", { class: "diff grey" }, text);
  const against = `against our ${data.metrics[found.ours]}${found.why ? `; ${found.why}` : ""}`;
  return [value, h("span", { class: "sub why" }, against)];
}

const number = (text) => (text === "" || Number.isNaN(Number(text)) ? null : Number(text));

const columns = [
  { key: "method", label: "method", value: methodName, cell: methodCell, full: true },
  { key: "setting", label: "setting", value: (row) => `${row.cell} ${row.paper} ${row.table}`, full: true,
    cell: (row) => [row.cell || "(no name)", state.sort ? h("span", { class: "sub" }, [row.paper, row.table].filter(Boolean).join(" / ")) : null] },
  { key: "noise", label: "noise", value: (row) => row.noise, full: true },
  { key: "profile", label: "profile", value: (row) => row.profile, full: true,
    cell: (row) => [row.profile.split("+")[0], ...row.profile.split("+").slice(1).map((part) => h("span", { class: "sub" }, `+${part}`))] },
  { key: "epochs", label: "epochs", numeric: true, value: (row) => number(row.epochs) },
  { key: "seeds", label: "seeds", numeric: true, value: (row) => row.runs.length || null },
  ...metrics.map((name) => ({
    key: name, label: data.metrics[name], numeric: true, full: true, value: (row) => row.metrics[name]?.mean ?? null, cell: (row) => meanText(row.metrics[name]),
  })),
  { key: "vs_ce", label: "vs CE", numeric: true, full: true, value: (row) => against(row)?.difference ?? null, cell: againstCell },
  { key: "published", label: "published", numeric: true, full: true, value: (row) => (shown(row) ? Number(shown(row).value) : null), cell: publishedCell },
  { key: "vs_published", label: "vs published", numeric: true, full: true, value: (row) => row.published.difference, cell: publishedDifference },
];

function methodCell(row) {
  const open = openRows().has(row.id);
  const badges = [];
  if (row.origin === "this machine") badges.push(h("span", { class: "badge own" }, row.origin));
  if (row.fidelity === "released") badges.push(h("span", { class: "badge" }, "as released"));
  if (!row.runs.length) badges.push(h("span", { class: "badge" }, "not measured"));
  if (row.runs.some((run) => run.log !== null)) badges.push(h("span", { class: "badge" }, "curves"));
  return [
    h("button", { class: "toggle", type: "button", "aria-expanded": String(open), "aria-controls": open ? `details-${row.id}` : null, "data-toggle": row.id, onclick: () => toggle(row) }, row.method || "(no name)"),
    h("span", { class: "sub" }, badges.flatMap((badge) => [badge, " "])),
  ];
}

function toggle(row) {
  const open = openRows();
  open.has(row.id) ? open.delete(row.id) : open.add(row.id);
  change({ open: [...open].join(",") });
  document.querySelector(`[data-toggle="${row.id}"]`)?.focus();
}

// filters and order ---------------------------------------------------------------------------------------------------

const searchText = new Map(data.rows.map((row) => [row.id, [row.paper, row.table, row.cell, methodName(row), row.dataset, row.noise, row.profile, row.file].join(" ").toLowerCase()]));

function visibleRows() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  return data.rows.filter((row) =>
    (state.missing || row.runs.length) &&
    FILTERS.every((name) => !state[name] || row[name] === state[name]) &&
    words.every((word) => searchText.get(row.id).includes(word)));
}

function compareValues(a, b, numeric, direction) {
  const noA = a === null || a === "", noB = b === null || b === "";
  if (noA || noB) return noA - noB; // what is missing comes last either way
  return direction * (numeric ? a - b : collator.compare(a, b));
}

function sorted(rows) {
  const column = columns.find((one) => one.key === state.sort);
  if (!column) return rows;
  const direction = state.dir === "descending" ? -1 : 1;
  return [...rows].sort((a, b) => compareValues(column.value(a), column.value(b), column.numeric, direction));
}

function nextSort(column) {
  const first = column.numeric ? "descending" : "ascending";
  const second = column.numeric ? "ascending" : "descending";
  if (state.sort !== column.key) return { sort: column.key, dir: first };
  return state.dir === first ? { sort: column.key, dir: second } : { sort: "", dir: "" };
}

// the controls --------------------------------------------------------------------------------------------------------

function sortBy(key) {
  const column = columns.find((one) => one.key === key);
  return column ? nextSort(column) : { sort: "", dir: "" };
}

function select(label, name, options, extra = {}, changes = (value) => ({ [name]: value })) {
  const control = h("select", { id: `f-${name}`, onchange: (event) => change(changes(event.target.value)) }, options.map(([value, text]) => h("option", { value }, text)));
  return h("label", extra, label, control);
}

function buildControls() {
  const distinct = (name) => [...new Set(data.rows.map((row) => row[name]).filter(Boolean))].sort(collator.compare);
  const missing = data.rows.filter((row) => !row.runs.length).length;
  const filters = FILTERS.filter((name) => name !== "origin" || distinct("origin").length > 1);
  const labels = { dataset: "data set", origin: "measured on" };
  at("controls").append(
    h("label", { class: "search" }, "search", h("input", { type: "search", id: "f-q", placeholder: "method, setting, noise …", oninput: (event) => change({ q: event.target.value }) })),
    ...filters.map((name) => select(labels[name] ?? name, name, [["", "all"], ...distinct(name).map((value) => [value, value])])),
    select("compare by", "metric", metrics.map((name) => [name, data.metrics[name]])),
    select("sort by", "sort", [["", "paper and table"], ...columns.map((column) => [column.key, column.label])], { class: "narrow" }, sortBy),
    select("order", "dir", [["", "–"], ["ascending", "ascending"], ["descending", "descending"]], { class: "narrow" }),
    h("div", { class: "stack" },
      h("div", {}, h("output", { class: "count", id: "count", "aria-live": "polite" }), h("button", { type: "button", class: "link", id: "reset", onclick: () => change({ ...DEFAULTS }) }, "reset")),
      h("label", { class: "check" }, h("input", { type: "checkbox", id: "f-missing", onchange: (event) => change({ missing: event.target.checked ? "1" : "" }) }), `not measured (${missing})`)),
  );
  at("controls").addEventListener("submit", (event) => event.preventDefault());
}

function showState() {
  for (const name of Object.keys(DEFAULTS)) {
    const control = at(`f-${name}`);
    if (!control) continue;
    if (control.type === "checkbox") control.checked = state[name] === "1";
    else if (control.value !== state[name]) control.value = state[name];
  }
}

// columns in which no row shown has anything only take room
const columnsOf = (rows) => columns.filter((column) => column.key === state.sort || rows.some((row) => ![null, ""].includes(column.value(row))));

// the main table ------------------------------------------------------------------------------------------------------

function heading(used) {
  const cells = used.map((column) =>
    h("th", { scope: "col", role: "columnheader", class: column.numeric ? "num" : null, "aria-sort": state.sort === column.key ? state.dir : "none" },
      h("button", { type: "button", "data-sort": column.key, onclick: () => { change(nextSort(column)); document.querySelector(`[data-sort="${column.key}"]`).focus(); } }, column.label)));
  return h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, cells));
}

function tableRow(row, open, used) {
  const cells = used.map((column) => {
    const content = column.cell ? column.cell(row) : column.value(row);
    const children = [content ?? ""].flat().map((part) => (typeof part === "number" ? String(part) : part));
    const empty = content === null || content === "" || content === undefined;
    return h("td", { role: "cell", class: column.numeric ? "num" : null, "data-label": column.label, "data-empty": empty, "data-full": column.full }, h("div", {}, children));
  });
  return h("tr", { role: "row", class: `row${open ? " open" : ""}${row.runs.length ? "" : " missing"}`, "data-id": row.id }, cells);
}

function renderTable(rows) {
  const open = openRows();
  const used = columnsOf(rows);
  const bodies = [];
  let body = null, group = null;
  for (const row of sorted(rows)) {
    const name = state.sort ? "" : JSON.stringify([row.paper, row.table]);
    if (!body || name !== group) {
      body = h("tbody", { role: "rowgroup" });
      bodies.push(body);
      group = name;
      const text = [data.papers[row.paper], row.table || "runs outside of the tables"].join(" · ");
      if (!state.sort) body.append(h("tr", { class: "group", role: "row" }, h("th", { colspan: used.length || 1, scope: "rowgroup", role: "rowheader" }, text)));
    }
    body.append(tableRow(row, open.has(row.id), used));
    if (open.has(row.id)) body.append(h("tr", { class: "details", role: "row", id: `details-${row.id}` }, h("td", { colspan: used.length || 1, role: "cell" }, detailsOf(row))));
  }
  if (!rows.length) bodies.push(h("tbody", {}, h("tr", {}, h("td", { colspan: used.length || 1, class: "empty" }, "No row fits these filters."))));
  at("no-published").hidden = used.some((column) => column.key === "published") || !data.figures.length;
  const table = at("table");
  const place = at("table-scroll").scrollLeft;
  table.replaceChildren(heading(used), ...bodies);
  at("table-scroll").scrollLeft = place;
  drawCharts();
}

// details of a row ----------------------------------------------------------------------------------------------------

const built = new Map(); // so that an open log stays open while another row is opened

function detailsOf(row) {
  if (!built.has(row.id)) built.set(row.id, h("div", { class: "inner" }, row.runs.length ? measuredDetails(row) : missingDetails(row)));
  return built.get(row.id);
}

function missingDetails(row) {
  return [h("div", { class: "wide" }, h("h3", {}, "Command"), command(row.command), h("p", { class: "small" }, "Runs seeds 1, 2 and 3 by the published protocol; it wants the data under ./data.")),
    publishedTable(row)];
}

function measuredDetails(row) {
  const source = `${row.origin}, ${row.file}`;
  return [
    h("div", {}, h("h3", {}, "By seed"), seedTable(row), h("p", { class: "small" }, `From ${source}.`, row.against ? ` Compared with CE of ${row.against.file}.` : "")),
    curves(row),
    h("div", { class: "wide" }, h("h3", {}, row.runs.length > 1 ? "Commands" : "Command"),
      row.runs.map((run) => command(run.command, row.runs.length > 1 ? `seed ${run.seed}` : ""))),
    logs(row),
    publishedTable(row),
  ];
}

const FACTS = [
  ["seconds", "seconds", short], ["images_per_second", "images per second", short], ["peak_memory_mb", "peak memory (MB)", short], ["device", "device", String],
  ["precision", "precision", String], ["torch", "torch", String], ["git", "commit", String], ["realised_rate", "realised noise rate", (value) => fixed(value, 4)],
  ["best_epoch", "epoch of the best", String],
];
const absent = (value) => value === null || value === undefined || value === "";

function seedTable(row) {
  const { runs } = row;
  const several = runs.length > 1;
  const line = (label, all, each) => h("tr", {}, h("th", { scope: "row" }, label), several ? h("td", { class: "num" }, all) : null, each.map((text) => h("td", { class: "num" }, text)));
  const measured = (name, label, text) => {
    const { mean, std, values } = row.metrics[name];
    return line(label, [text(mean), std === null ? null : h("span", { class: "std" }, ` ± ${text(std)}`)], runs.map((run) => text(values[run.seed] ?? null)));
  };
  const fact = ([name, label, text]) => {
    const texts = runs.map((run) => (absent(run[name]) ? "" : text(run[name])));
    const same = several && typeof runs[0][name] === "string" && new Set(texts).size === 1;
    return line(label, same ? texts[0] : null, same ? texts.map(() => null) : texts);
  };
  const names = Object.keys(row.metrics);
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "values by seed" }, h("table", {},
    h("thead", {}, h("tr", {}, h("td", {}), several ? h("th", { scope: "col", class: "num" }, "all seeds") : null, runs.map((run) => h("th", { scope: "col", class: "num" }, `seed ${run.seed || "(blank)"}`)))),
    h("tbody", {},
      metrics.filter((name) => names.includes(name)).map((name) => measured(name, data.metrics[name], fixed)),
      names.filter((name) => !metrics.includes(name)).map((name) => measured(name, name.replaceAll("_", " "), short)),
      FACTS.filter(([name]) => runs.some((run) => !absent(run[name]))).map(fact))));
}

function command(text, label = "") {
  const button = h("button", { type: "button", class: "plain copy", "aria-label": `copy the command${label ? ` of ${label}` : ""}`, onclick: () => copy(text, button) }, "copy");
  return h("div", { class: "command" }, label ? h("span", { class: "small" }, label) : null, h("code", {}, text), button);
}

async function copy(text, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    done = copySelected(text); // a page without the right to the clipboard
  }
  button.textContent = done ? "copied" : "select and copy";
  setTimeout(() => { button.textContent = "copy"; }, 1600);
}

function copySelected(text) {
  const area = h("textarea", { style: { position: "fixed", opacity: "0" } }, text);
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function publishedTable(row) {
  const figures = row.published.figures.map((place) => data.figures[place]);
  if (!figures.length) return null;
  const names = ["method", "metric", "figure", "status", "table", "source"];
  return h("div", { class: "wide" }, h("h3", {}, "Published for this setting"),
    h("p", { class: "small" }, "confirmed: read in the paper's own table; secondary: read in another publication's table; unconfirmed: found in no source that could be read, never compared."),
    h("div", { class: "scroll", tabindex: 0 }, h("table", {},
      h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, figures.map((figure) => h("tr", {},
        h("td", {}, figure.method), h("td", {}, figure.metric), h("td", { class: "num" }, figure.value + (figure.std ? ` ± ${figure.std}` : "")),
        h("td", {}, h("span", { class: `badge ${figure.status}` }, figure.status)), h("td", {}, figure.table), h("td", {}, figure.source)))))));
}

// logs and curves -----------------------------------------------------------------------------------------------------

function logs(row) {
  const with_log = row.runs.filter((run) => run.log !== null);
  if (!with_log.length) return null;
  return h("div", { class: "wide" }, h("h3", {}, "Logs"), with_log.map((run) => {
    const log = data.logs[run.log];
    const box = h("div", { class: "log-box", tabindex: 0, role: "region", "aria-label": `log of seed ${run.seed}` });
    const fill = () => { if (!box.childElementCount) box.append(logTable(log)); };
    return h("details", { class: "log", ontoggle: fill }, h("summary", {}, `seed ${run.seed}: ${log.rows.length} epochs, `, h("code", {}, run.folder)), box);
  }));
}

const logTable = (log) => h("table", {},
  h("thead", {}, h("tr", {}, log.columns.map((name) => h("th", { scope: "col" }, name)))),
  h("tbody", {}, log.rows.map((line) => h("tr", {}, line.map((value) => h("td", {}, value === null ? "" : String(value)))))));

function column(log, name) {
  const place = log.columns.indexOf(name), epoch = log.columns.indexOf("epoch");
  if (place < 0) return [];
  return log.rows.map((line, i) => [epoch < 0 ? i + 1 : line[epoch], line[place]]).filter((point) => typeof point[1] === "number");
}

function meanOf(curves) {
  const sums = new Map();
  for (const points of curves) for (const [x, y] of points) sums.set(x, [...(sums.get(x) ?? []), y]);
  // an epoch that only some seeds have is not averaged: the mean would jump there
  return [...sums].filter(([, values]) => values.length === curves.length).map(([x, values]) => [x, values.reduce((a, b) => a + b) / values.length]).sort((a, b) => a[0] - b[0]);
}

const logsOf = (row) => row.runs.filter((run) => run.log !== null).map((run) => ({ seed: run.seed, log: data.logs[run.log] }));

function accuracySeries(row) {
  const own = logsOf(row);
  const name = data.accuracies.find((one) => own[0].log.columns.includes(one));
  if (!name) return null;
  const curves = own.map(({ log }) => column(log, name));
  const series = [];
  if (own.length > 1) own.forEach(({ seed }, i) => series.push({ name: `seed ${seed}`, points: curves[i], color: "--c0", width: 1.1, opacity: 0.65 }));
  series.push({ name: own.length > 1 ? "mean" : `seed ${own[0].seed}`, points: meanOf(curves), color: "--c0", width: 2.4 });
  const validation = meanOf(own.map(({ log }) => column(log, "validation_accuracy")));
  if (validation.length) series.push({ name: "validation", points: validation, color: "--c2", width: 1.6, dash: "2 3" });
  const baseline = row.against && byId.get(row.against.row);
  if (baseline && logsOf(baseline).length) series.push({ name: "CE, mean", points: meanOf(logsOf(baseline).map(({ log }) => column(log, name))), color: "--soft", width: 1.6, dash: "6 4" });
  const drawn = series.filter((one) => one.points.length);
  return drawn.length ? { title: `${name.replaceAll("_", " ")} by epoch (%)`, series: drawn } : null;
}

// what a log says of the selection: shares and areas under curves, and counts
function selectionSeries(row) {
  const own = logsOf(row);
  const pattern = /(precision|recall|auc|auroc|_selected|labelled|removed|_size|_share|_ood|right_selected_min|attention_right|attention_wrong)$/;
  let names = own[0].log.columns.filter((name) => pattern.test(name) && !name.startsWith("net2_"));
  if (names.length > 8) names = names.filter((name) => !/(many|medium|few)_/.test(name));
  const series = names.map((name) => ({ name: name.replaceAll("_", " "), points: meanOf(own.map(({ log }) => column(log, name))) })).filter((one) => one.points.length);
  const isShare = (one) => one.points.every(([, y]) => y >= 0 && y <= 1);
  const dashes = ["", "6 3", "2 3", "8 3 2 3"];
  const styled = (list) => list.map((one, i) => ({ ...one, color: `--c${i % 6}`, width: 1.8, dash: dashes[i % 4] }));
  const nets = own[0].log.columns.some((name) => name.startsWith("net2_")) ? ", network 1 of 2" : "";
  const what = names.every((name) => name.startsWith("attention")) ? "attention to right and wrong labels" : "quality of the selection";
  return [
    { title: `${what} by epoch${nets}, mean over seeds`, series: styled(series.filter(isShare)), range: [0, 1] },
    { title: `size of the selection by epoch${nets}, mean over seeds`, series: styled(series.filter((one) => !isShare(one))) },
  ].filter((one) => one.series.length);
}

function curves(row) {
  const box = h("div", {}, h("h3", {}, "Curves"));
  if (!logsOf(row).length) {
    const where = data.runs === null ? "No folder of run directories was given" : `No run directory below ${data.runs} has these figures`;
    box.append(h("p", { class: "empty" }, `${where}, so there is no log and no curve here. The command below makes one; then write this page again.`));
    return box;
  }
  const shown = [accuracySeries(row), ...selectionSeries(row)].filter(Boolean);
  box.append(...shown.map((one) => h("figure", { class: "chart" }, h("figcaption", {}, one.title))));
  [...box.querySelectorAll("figure")].forEach((figure, i) => { figure.chart = shown[i]; });
  return box;
}

function ticks(low, high, wanted, whole) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough * 0.999);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || 1) * 0.06;
  return [low - room, high + room];
}

function drawCharts() {
  for (const figure of document.querySelectorAll("figure.chart")) {
    const width = Math.max(260, Math.min(680, Math.floor(figure.clientWidth)));
    if (figure.drawn === width || !figure.clientWidth) continue;
    figure.drawn = width;
    figure.replaceChildren(figure.firstElementChild, ...chart(figure.chart, width));
  }
}

function path(points, x, y) {
  if (points.length === 1) return `M${x(points[0][0]) - 3},${y(points[0][1])}h6`;
  return points.map(([a, b], i) => `${i ? "L" : "M"}${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("");
}

function chart({ title, series, range: given }, width) {
  const height = Math.round(Math.min(260, 120 + width * 0.22)), left = 44, right = 10, top = 8, bottom = 30;
  const all = series.flatMap((one) => one.points);
  const [x0, x1] = [Math.min(...all.map((p) => p[0])), Math.max(...all.map((p) => p[0]))];
  const [y0, y1] = given ?? range(all.map((p) => p[1]));
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  const style = (one) => ({ fill: "none", "stroke-width": one.width, "stroke-dasharray": one.dash, "stroke-linejoin": "round", style: { stroke: `var(${one.color})`, opacity: one.opacity ?? 1 } });
  const cursor = s("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const svg = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${series.map((one) => `${one.name} ends at ${short(one.points.at(-1)?.[1])}`).join(", ")}` },
    ticks(y0, y1, 5).map((value) => [s("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }), s("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value))]),
    ticks(x0, x1, Math.min(10, width / 60), true).map((value) => s("text", { x: x(value), y: height - bottom + 15, "text-anchor": "middle" }, String(value))),
    s("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, "epoch"),
    series.map((one) => s("path", { d: path(one.points, x, y), ...style(one) })), cursor);
  const readout = h("div", { class: "readout", "aria-hidden": "true" });
  svg.addEventListener("pointermove", (event) => {
    const place = svg.getBoundingClientRect();
    const wanted = x0 + (((event.clientX - place.left) / place.width) * width - left) / (width - left - right) * (x1 - x0);
    const nearest = all.reduce((best, [a]) => (Math.abs(a - wanted) < Math.abs(best - wanted) ? a : best), all[0][0]);
    cursor.setAttribute("x1", x(nearest));
    cursor.setAttribute("x2", x(nearest));
    cursor.setAttribute("visibility", "visible");
    const values = series.map((one) => [one.name, one.points.find(([a]) => a === nearest)]).filter(([, point]) => point);
    readout.textContent = `epoch ${nearest}: ${values.map(([name, point]) => `${name} ${short(point[1])}`).join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  const keys = h("ul", { class: "keys" }, series.map((one) => h("li", {}, s("svg", { width: 26, height: 8, "aria-hidden": "true" }, s("path", { d: "M1,4h24", ...style(one) })), one.name)));
  return [svg, keys, readout];
}

// panels: at a glance, wall times -------------------------------------------------------------------------------------

function byPanel(rows, of) {
  const panels = new Map();
  for (const row of rows.filter((one) => one.runs.length)) {
    const key = of(row);
    panels.set(key, [...(panels.get(key) ?? []), row]);
  }
  return [...panels.values()];
}

function panelHead(row, more) {
  const facts = [row.noise, row.profile, row.epochs ? `${row.epochs} epochs` : "", row.origin, more];
  return [h("h3", { class: "panel-title" }, `${row.table === "cross" ? "Side by side" : data.papers[row.paper]}: ${row.cell || "(no name)"}`), h("p", { class: "panel-sub" }, facts.filter(Boolean).join(" · "))];
}

function renderGlance(rows) {
  const usable = rows.filter((row) => state.metric in row.metrics);
  const groups = byPanel(usable, (row) => row.panel).filter((group) => group.length > 1);
  at("panels").replaceChildren(...groups.map(glancePanel));
  if (!groups.length) at("panels").append(h("p", { class: "empty" }, `No setting among the rows shown has two methods with "${data.metrics[state.metric]}".`));
}

function glancePanel(group) {
  const value = (row) => row.metrics[state.metric];
  const [low, high] = range(group.flatMap((row) => Object.values(value(row).values)));
  const left = (number) => `${((number - low) / (high - low)) * 100}%`;
  const baseline = group.find((row) => row.method === "CE");
  // the same runs may stand in two files, as those of a baseline
  const text = (row) => JSON.stringify([methodName(row), value(row).values]);
  const once = [...new Map(group.map((row) => [text(row), row])).values()];
  const lines = once.sort((a, b) => value(b).mean - value(a).mean).map((row) =>
    h("div", { class: "strip" },
      h("button", { type: "button", class: "link name", title: "show its row", onclick: () => reveal(row) }, methodName(row)),
      h("div", { class: `track${row.method === "CE" ? " ce" : ""}` },
        baseline ? h("i", { class: "base", style: { left: left(value(baseline).mean) } }) : null,
        Object.values(value(row).values).map((one) => h("i", { class: "seed", style: { left: left(one) } })),
        h("i", { class: "mean", style: { left: left(value(row).mean) } })),
      h("span", { class: "value" }, fixed(value(row).mean))));
  const axis = h("div", { class: "strip", "aria-hidden": "true" }, h("span", {}), h("div", { class: "axis" }, ticks(low, high, 5).map((one) => h("span", { style: { left: left(one) } }, short(one)))), h("span", {}));
  return h("div", { class: "panel" }, panelHead(group[0], data.metrics[state.metric]), lines, axis);
}

function reveal(row) {
  const open = openRows();
  open.add(row.id);
  change({ open: [...open].join(",") });
  const button = document.querySelector(`[data-toggle="${row.id}"]`);
  button.scrollIntoView({ block: "center" });
  button.focus({ preventScroll: true });
}

function renderTimes(rows) {
  const timed = rows.filter((row) => row.seconds !== null || row.images_per_second !== null).map((row) => ({ ...row, device: row.runs[0].device }));
  const groups = byPanel(timed, (row) => `${row.panel} ${row.device}`);
  at("time-panels").replaceChildren(...groups.map((group) => {
    const bar = (row, name) => {
      const longest = Math.max(...group.map((one) => one[name] ?? 0));
      return h("div", { class: "bar" }, row[name] === null ? null : [h("i", { style: { width: `${longest ? (row[name] / longest) * 100 : 0}%` } }), h("b", {}, short(row[name]))]);
    };
    return h("div", { class: "panel" }, panelHead(group[0], group[0].device), h("div", { class: "bars" },
      h("span", {}), h("span", { class: "head" }, "seconds per run"), h("span", { class: "head" }, "images per second"),
      group.map((row) => [h("span", {}, methodName(row)), bar(row, "seconds"), bar(row, "images_per_second")])));
  }));
  if (!groups.length) at("time-panels").append(h("p", { class: "empty" }, "No row shown has a time."));
}

// further tables ------------------------------------------------------------------------------------------------------

function simpleTable(names, rows, label) {
  let order = null, direction = 1;
  const table = h("table", { "aria-label": label });
  const isNumber = names.map((_, i) => rows.some((row) => typeof row[i] === "number") && rows.every((row) => row[i] === null || typeof row[i] === "number"));
  const draw = () => {
    const list = order === null ? rows : [...rows].sort((a, b) => compareValues(a[order], b[order], isNumber[order], direction));
    table.replaceChildren(
      h("thead", {}, h("tr", {}, names.map((name, i) => h("th", { scope: "col", class: isNumber[i] ? "num" : null, "aria-sort": order === i ? (direction > 0 ? "ascending" : "descending") : "none" },
        h("button", { type: "button", onclick: () => { direction = order === i ? -direction : 1; order = i; draw(); table.querySelectorAll("thead button")[i].focus(); } }, name.replaceAll("_", " ")))))),
      h("tbody", {}, list.map((row) => h("tr", {}, row.map((value, i) => h("td", { class: isNumber[i] ? "num" : String(value ?? "").length > 40 ? "long" : null }, value === null ? "" : typeof value === "number" ? value.toLocaleString("en", { maximumFractionDigits: 3 }) : value))))));
  };
  draw();
  return h("div", { class: "scroll simple", tabindex: 0, role: "region", "aria-label": label }, table);
}

function renderCross() {
  const { columns: methods, lines } = data.cross;
  at("cross").hidden = !lines.length;
  if (!lines.length) return;
  const fidelity = (method) => (method.fidelity === "released" ? " (released)" : "");
  at("cross-table").replaceChildren(
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "setting"), methods.map((method) => h("th", { scope: "col", class: "num" }, method.method + fidelity(method), h("span", { class: "sub" }, method.paper))))),
    h("tbody", {}, lines.map((line) => h("tr", {},
      h("th", { scope: "row" }, line.cell || "(no name)", h("span", { class: "sub" }, [line.dataset, line.noise, line.profile, line.epochs ? `${line.epochs} epochs` : "", line.origin, line.file].filter(Boolean).join(" · "))),
      methods.map((_, i) => {
        const metric = byId.get(line.cells[i])?.metrics[state.metric];
        return h("td", { class: `num${line.best[state.metric] === i ? " best" : ""}` }, metric ? meanText(metric) : h("span", { class: "small" }, "–"));
      })))));
}

function renderClaims() {
  at("claims").hidden = !data.claims.length;
  const numeric = new Set(["compared with", "method", "difference", "95 % interval"]);
  at("claims-tables").replaceChildren(...data.claims.flatMap((file) => [
    h("p", { class: "small" }, `${file.name} (${file.origin})`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `claims of ${file.name}` }, h("table", { "aria-label": `claims of ${file.name}` },
      h("thead", {}, h("tr", {}, data.claims_heading.map((name) => h("th", { scope: "col", class: numeric.has(name) ? "num" : null }, name)))),
      h("tbody", {}, file.claims.flatMap((claim) => claim.lines.map(([sentence, ...rest], i) => h("tr", {},
        i ? null : h("th", { scope: "rowgroup", rowspan: claim.lines.length, class: "claim" }, sentence, h("span", { class: "sub" }, `${claim.paper === "all" ? "All methods" : data.papers[claim.paper] ?? claim.paper}; source: ${claim.source}`)),
        rest.slice(0, -1).map((text, j) => h("td", { class: numeric.has(data.claims_heading[j + 1]) ? "num" : null }, text)),
        h("td", {}, h("span", { class: `verdict ${rest.at(-1).replace(" ", "-")}` }, rest.at(-1))))))))),
  ]));
}

function renderStatic() {
  const measured = data.rows.filter((row) => row.runs.length);
  const own = measured.filter((row) => row.origin === "this machine").length;
  const seeds = measured.reduce((sum, row) => sum + row.runs.length, 0);
  at("lede").textContent = `${measured.length} measured rows of ${seeds} runs, ${measured.length - own} of the project's reference and ${own} of this machine; `
    + `${data.rows.length - measured.length} cells of the published protocols are not measured. Test accuracy in percent.`;
  const ramp = [-10, -5, -1, 0, 1, 5, 10].map((value) => h("span", { style: { background: colour(value) } }, value === 0 ? "0" : signed(value).replace(".00", "")));
  at("legend").replaceChildren(h("span", {}, "difference in points:"), h("span", { class: "ramp" }, ramp), h("span", {}, "orange is lower, blue is higher; "), h("span", { class: "diff grey" }, "grey"), h("span", {}, "not comparable"));
  at("speed").hidden = !data.speed.length;
  const sections = [...document.querySelectorAll("main section")].filter((section) => !section.hidden);
  at("nav").replaceChildren(...sections.map((section) => h("a", { href: `#${section.id}`, onclick: (event) => { event.preventDefault(); goTo(section); } }, section.querySelector("h2").textContent)));
  at("speed-tables").replaceChildren(...data.speed.flatMap((table) => [h("h3", {}, table.name), simpleTable(table.columns, table.rows, table.name)]));
  const names = ["origin", "device", "precision", "torch", "git", "runs"];
  at("environment-tables").replaceChildren(
    simpleTable(names.map((name) => (name === "git" ? "commit" : name)), data.environment.map((row) => names.map((name) => row[name])), "environment"),
    h("h3", {}, "Files"), list(data.files.map((file) => `${file.name} (${file.origin})`)),
    ...(data.unfinished.length ? [h("h3", {}, "Runs that have not finished"), list(data.unfinished.map((run) => `${run.folder}: ${run.epochs} epochs so far`))] : []),
    ...(data.notes.length ? [h("h3", {}, "Left out"), list(data.notes)] : []));
}

// not by the address: its hash holds the state
function goTo(section) {
  section.tabIndex = -1;
  section.focus({ preventScroll: true });
  section.scrollIntoView();
}

const list = (lines) => h("ul", { class: "plain" }, lines.map((line) => h("li", {}, line)));

// all of it -----------------------------------------------------------------------------------------------------------

function render() {
  const rows = visibleRows();
  const candidates = data.rows.filter((row) => state.missing || row.runs.length).length;
  showState();
  at("count").textContent = `${rows.length} of ${candidates} rows`;
  renderTable(rows);
  renderGlance(rows);
  renderTimes(rows);
  renderCross();
}

document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); goTo(at("results")); });
buildControls();
readHash();
renderCross();
renderClaims();
renderStatic();
render();
addEventListener("hashchange", () => { readHash(); render(); });
addEventListener("resize", drawCharts);
