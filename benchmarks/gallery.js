// follows page.js

const KEEP = "keep", REMOVE = "remove"; // a mark is one of these, or the new label, a number
const SHARP = 48; // a thumbnail with shorter sides is enlarged without smoothing
const key = `gallery/${data.id}`;
const cards = data.cards.map((card) => ({ ...card, at: data.images[card.place], given: data.given[card.place] }));
const named = (label) => (label === null ? "unknown" : data.names[label]);
const places = new Map(data.images.map((image, place) => [image, place]));
const digits = data.names.length <= 10;
const filter = { given: "", predicted: "", open: false };
let marks = new Map(); // by image: its position in the data set
let shown = cards;
let current = 0; // a place in `cards`

// marks, kept in the browser ------------------------------------------------------------------------------------------

const isLabel = (mark) => Number.isInteger(mark) && mark >= 0 && mark < data.names.length;

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(key) ?? "[]");
    marks = new Map(kept.filter(([image, mark]) => places.has(image) && (mark === KEEP || mark === REMOVE || isLabel(mark))));
  } catch (error) {
    say(`Earlier marks cannot be read (${error.name}): export before you close the page.`);
  }
}

function save() {
  try {
    localStorage.setItem(key, JSON.stringify([...marks]));
  } catch (error) {
    say(`The browser does not keep the marks (${error.name}): export before you close the page.`);
  }
}

const kindOf = (mark) => (mark === undefined ? null : isLabel(mark) ? "relabel" : mark);
const wordOf = (mark) => (mark === undefined ? "" : isLabel(mark) ? `→ ${named(mark)}` : mark);

function mark(value) {
  const card = cards[current];
  if (!card || !shown.includes(card)) return;
  const chosen = value === card.given ? KEEP : value;
  if (chosen === null) marks.delete(card.at);
  else marks.set(card.at, chosen);
  say(chosen === null ? `image ${card.at}: no mark` : `image ${card.at}: ${wordOf(chosen)}`);
  save();
  draw(card);
  if (chosen !== null) move(1);
  else render();
}

function relabel() {
  const card = cards[current];
  if (!card) return;
  if (card.predicted === null) say("The run has no prediction for this image.");
  else if (card.predicted === card.given) say("The prediction is the given label.");
  else mark(card.predicted);
}

/** The class of a name or, if no class has it, of a number; -1 for none. */
function labelOf(text) {
  const exact = data.names.indexOf(text);
  return exact >= 0 ? exact : data.names.findIndex((name, label) => text === `${label}: ${name}` || text === String(label));
}

function relabelToOther() {
  const text = at("other").value.trim(), label = labelOf(text);
  if (label < 0) {
    say(`There is no class ${text || "without a name"}.`);
    return;
  }
  at("other").value = "";
  mark(label);
}

// export --------------------------------------------------------------------------------------------------------------

const field = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

function decisions() {
  const lines = data.images.map((image, place) => {
    const mark = marks.get(image);
    const path = data.paths ? field(data.paths[place]) : "";
    return `${image},${path},${data.given[place]},${kindOf(mark) ?? KEEP},${isLabel(mark) ? mark : ""}`;
  });
  return ["index,path,given_label,decision,new_label", ...lines, ""].join("\n");
}

function download() {
  const address = URL.createObjectURL(new Blob([decisions()], { type: "text/csv" }));
  h("a", { href: address, download: "decisions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  say("decisions.csv: unmarked images are written as keep.");
}

// drawing -------------------------------------------------------------------------------------------------------------

const say = (text) => at("say").replaceChildren(text);
const shortly = (value) => (value === null ? "unknown" : value.toFixed(3));
const percent = (value) => (value === null ? "" : ` (${(100 * value).toFixed(0)} %)`);

function picture(card) {
  if (card.image === null) return "not readable";
  const image = h("img", { src: card.image, alt: "", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("up", Math.max(image.naturalWidth, image.naturalHeight) < SHARP));
  return image;
}

function makeCard(card, place) {
  card.markBox = h("span", { class: "mark" });
  card.button = h(
    "button", { type: "button", class: "card", tabindex: "-1", onclick: () => choose(place) },
    h("span", { class: "frame" }, picture(card)),
    h("span", { class: "name", title: `given: ${named(card.given)}` }, named(card.given)),
    h("span", { class: "name", title: `predicted: ${named(card.predicted)}` }, `→ ${named(card.predicted)}${percent(card.probability)}`),
    h("span", { class: "score" }, `score ${shortly(card.score)}`),
    card.markBox,
  );
  card.item = h("li", { "data-image": card.at }, card.button);
  draw(card);
  return card.item;
}

function draw(card) {
  const mark = marks.get(card.at);
  card.markBox.replaceChildren(wordOf(mark));
  card.markBox.hidden = mark === undefined;
  if (mark === undefined) delete card.button.dataset.mark;
  else card.button.dataset.mark = kindOf(mark);
}

function fits(card) {
  return (filter.given === "" || card.given === Number(filter.given))
    && (filter.predicted === "" || card.predicted === Number(filter.predicted))
    && !(filter.open && marks.has(card.at));
}

function render() {
  shown = cards.filter(fits);
  for (const card of cards) card.item.hidden = true;
  for (const card of shown) card.item.hidden = false;
  at("empty").hidden = shown.length > 0;
  at("count").replaceChildren(`${shown.length} of ${cards.length} images`);
  const marked = cards.filter((card) => marks.has(card.at)).length;
  const others = marks.size - marked;
  at("progress").replaceChildren(`${marked} of ${cards.length} marked${others ? `, ${others} not on this page` : ""}`);
  at("f-given").value = filter.given;
  at("f-predicted").value = filter.predicted;
  at("f-open").checked = filter.open;
  for (const button of document.querySelectorAll("#matrix button"))
    button.setAttribute("aria-pressed", String(button.dataset.given === filter.given && button.dataset.predicted === filter.predicted));
  if (!shown.includes(cards[current])) current = shown.length ? cards.indexOf(shown[0]) : current;
  showCurrent();
}

function showCurrent() {
  const card = shown.includes(cards[current]) ? cards[current] : null;
  for (const other of cards) {
    if (other === card) other.button.setAttribute("aria-current", "true");
    else other.button.removeAttribute("aria-current");
    other.button.tabIndex = other === card ? 0 : -1;
  }
  for (const id of ["keep", "relabel", "other", "remove", "undo"]) at(id).disabled = card === null;
  at("large").replaceChildren(card ? picture(card) : "");
  at("to").replaceChildren(card ? named(card.predicted) : "the prediction");
  const facts = !card ? [] : [
    ["given", named(card.given)], ["predicted", `${named(card.predicted)}${percent(card.probability)}`], ["score", shortly(card.score)],
    ...(card.ood === null ? [] : [["OOD score", shortly(card.ood)]]),
    ["mark", wordOf(marks.get(card.at)) || "none"], ["image", String(card.at)],
    ...(data.paths && data.paths[card.place] ? [["path", data.paths[card.place]]] : []),
  ];
  at("facts").replaceChildren(...facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
}

// moving --------------------------------------------------------------------------------------------------------------

function choose(place) {
  current = place;
  showCurrent();
  cards[current].button.focus({ preventScroll: true });
  cards[current].item.scrollIntoView({ block: "nearest" });
}

/** Go `steps` images on, among those that the filters show. */
function move(steps) {
  const before = shown, place = before.indexOf(cards[current]);
  render();
  if (!shown.length) return;
  const after = before.slice(Math.max(place + steps, 0)).find((card) => shown.includes(card));
  choose(cards.indexOf(after ?? (steps > 0 ? shown.at(-1) : shown[0])));
}

function columns() {
  const top = shown[0]?.item.offsetTop;
  const next = shown.findIndex((card) => card.item.offsetTop !== top);
  return next < 0 ? shown.length : next;
}

function up() {
  const place = shown.indexOf(cards[current]);
  if (place >= columns()) move(-columns());
}

function down() {
  if (shown.indexOf(cards[current]) + columns() < shown.length) move(columns());
}

const KEYS = {
  k: () => mark(KEEP), r: relabel, x: () => mark(REMOVE), Delete: () => mark(REMOVE), u: () => mark(null), Backspace: () => mark(null),
  l: () => at("other").focus(), ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: down, ArrowUp: up,
};

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target === at("other")) {
    if (event.key === "Escape") choose(current);
    if (event.key !== "Enter") return;
    event.preventDefault();
    relabelToOther();
    return;
  }
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const label = digits && /^[0-9]$/.test(event.key) ? labelOf(event.key) : -1;
  const action = label < 0 ? KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key] : () => mark(label);
  if (!action) return;
  event.preventDefault();
  action();
}

// filters and the confusion matrix ------------------------------------------------------------------------------------

function change(values) {
  Object.assign(filter, values);
  render();
}

function fill(id, label) {
  const counts = new Map();
  for (const card of cards) if (label(card) !== null) counts.set(label(card), (counts.get(label(card)) ?? 0) + 1);
  const options = [...counts].sort(([a], [b]) => a - b).map(([value, n]) => h("option", { value }, `${named(value)} (${n})`));
  at(id).replaceChildren(h("option", { value: "" }, "all"), ...options);
}

function matrix() {
  const here = new Map(), all = new Map(data.pairs.map(([given, predicted, n]) => [`${given},${predicted}`, n]));
  for (const card of cards) if (card.predicted !== null) here.set(`${card.given},${card.predicted}`, (here.get(`${card.given},${card.predicted}`) ?? 0) + 1);
  const most = Math.max(1, ...here.values());
  const sorted = (labels) => [...new Set(labels)].sort((a, b) => a - b);
  const rows = sorted(cards.map((card) => card.given));
  const heads = sorted(cards.map((card) => card.predicted).filter((label) => label !== null));
  const cell = (given, predicted) => {
    const n = here.get(`${given},${predicted}`), total = all.get(`${given},${predicted}`) ?? 0;
    if (!n) return h("td", { class: given === predicted ? "same" : null }, total ? h("span", { class: "total" }, `/ ${total}`) : "");
    const pressed = () => filter.given === String(given) && filter.predicted === String(predicted);
    const button = h(
      "button", {
        type: "button", "aria-pressed": "false", "data-given": given, "data-predicted": predicted,
        "aria-label": `given ${named(given)}, predicted ${named(predicted)}: ${n} of ${total} images`,
        onclick: () => change(pressed() ? { given: "", predicted: "" } : { given: String(given), predicted: String(predicted) }),
      }, String(n), h("span", { class: "total" }, `/ ${total}`),
    );
    button.style.setProperty("--strength", (0.08 + 0.4 * n / most).toFixed(3));
    return h("td", { class: given === predicted ? "same" : null }, button);
  };
  at("matrix").replaceChildren(
    h("thead", {}, h("tr", {}, h("td", {}), heads.map((label) => h("th", { scope: "col", title: named(label) }, named(label))))),
    h("tbody", {}, rows.map((given) => h("tr", {}, h("th", { scope: "row", title: named(given) }, named(given)), heads.map((label) => cell(given, label))))),
  );
}

// start ---------------------------------------------------------------------------------------------------------------

load();
at("lede").replaceChildren(`${cards.length} of ${data.images.length} training images of ${data.dataset}, by ${data.method}: ${data.run}`);
at("keys").replaceChildren("Arrow keys move.", digits ? " A digit relabels to the class of that name or number." : "", " Enter in the field relabels to the class in it.");
fill("f-given", (card) => card.given);
fill("f-predicted", (card) => card.predicted);
at("names").replaceChildren(...data.names.map((name, label) => h("option", { value: name === String(label) ? name : `${label}: ${name}` })));
at("cards").replaceChildren(...cards.map(makeCard));
matrix();
at("f-given").addEventListener("change", (event) => change({ given: event.target.value }));
at("f-predicted").addEventListener("change", (event) => change({ predicted: event.target.value }));
at("f-open").addEventListener("change", (event) => change({ open: event.target.checked }));
at("reset").addEventListener("click", () => change({ given: "", predicted: "", open: false }));
at("controls").addEventListener("submit", (event) => event.preventDefault());
at("export").addEventListener("click", download);
at("clear").addEventListener("click", () => {
  if (!confirm(`Clear ${marks.size} marks?`)) return;
  marks.clear();
  save();
  cards.forEach(draw);
  render();
});
at("keep").addEventListener("click", () => mark(KEEP));
at("relabel").addEventListener("click", relabel);
at("remove").addEventListener("click", () => mark(REMOVE));
at("undo").addEventListener("click", () => mark(null));
at("other").addEventListener("input", (event) => event.inputType === "insertReplacementText" && relabelToOther()); // chosen from the list
document.addEventListener("keydown", onKey);
render();
