"use strict";
// What all the other parts use: the data, elements, numbers and times as people read them, and what is selected.

const byId = (id) => document.getElementById(id);

// Text only ever becomes text: nothing here makes elements of what came from a store.
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function unpack(columns) {
  const names = Object.keys(columns);
  const count = names.length ? columns[names[0]].length : 0;
  return Array.from({ length: count }, (_, place) => {
    const row = { place };
    for (const name of names) row[name] = columns[name][place];
    return row;
  });
}

const report = JSON.parse(byId("data").textContent);
const saves = unpack(report.saves);
const placeOf = new Map(saves.map((save) => [save.id, save.place]));
const writers = new Map(report.writers.map((writer) => [writer.number, writer]));
for (const save of saves) {
  save.time = save.created === null ? null : Date.parse(save.created);
  save.label = save.id.slice(0, save.id.lastIndexOf("-"));
}

const isThere = (save) => save.status === "there";
const isKnown = (save) => save.status === "there" || save.status === "deleted";
// Records hold what is no finite number as text.
const finite = (value) => (typeof value === "number" ? value : null);
// Names of metrics are anybody's; "constructor" is no metric of a save that has none.
const metricOf = (save, name) => (Object.hasOwn(save.metrics, name) ? save.metrics[name] : null);

const whole = new Intl.NumberFormat("en-US");
const count = (number) => (number === null ? "–" : whole.format(number));
const plural = (number, noun) => `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

function bytes(number) {
  if (number === null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let value = number;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return unit === 0 ? `${number} B` : `${value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0)} ${units[unit]}`;
}

function figure(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(3) : String(Number(value.toPrecision(6)));
}

function seconds(value) {
  if (value === null) return "–";
  if (value < 0.9995) return `${Number((value * 1000).toPrecision(3))} ms`;
  if (value < 90) return `${Number(value.toPrecision(3))} s`;
  if (value < 5400) return `${Number((value / 60).toPrecision(3))} min`;
  return value < 172800 ? `${Number((value / 3600).toPrecision(3))} h` : `${Number((value / 86400).toPrecision(3))} days`;
}

const clock = (time) => (time === null ? "–" : new Date(time).toISOString().slice(0, 19).replace("T", " "));

function age(text, since = Date.now()) {
  const ago = (since - Date.parse(text)) / 1000;
  return Number.isNaN(ago) ? text : ago < 1 ? "just now" : `${seconds(Math.round(ago))} ago`;
}

// Plotly takes some HTML in the texts of a chart.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const clipped = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

// -- what is selected --------------------------------------------------------------------------------------

const selection = { place: null, watchers: [] };

function select(place) {
  selection.place = place;
  for (const watcher of selection.watchers) watcher(place);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A browser that gives no clipboard to a file; the old way needs a field.
    const field = make("textarea", { class: "hidden" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  say(`copied ${text}`);
}

function say(text) { byId("said").textContent = text; }

// -- light and dark ----------------------------------------------------------------------------------------

const themes = { watchers: [], system: matchMedia("(prefers-color-scheme: dark)") };

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : themes.system.matches;
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const button = byId("theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"}`);
  for (const watcher of themes.watchers) watcher();
}

// A browser may keep nothing for files.
function remembered() { try { return localStorage.getItem("ckptstore-theme"); } catch { return null; } }
function remember(theme) { try { localStorage.setItem("ckptstore-theme", theme); } catch { /* then not */ } }

function colours() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  return {
    ink: colour("ink"), muted: colour("muted"), line: colour("line"), grid: colour("grid"), card: colour("card"),
    accent: colour("accent"), bad: colour("bad"), good: colour("good"),
    writers: Array.from({ length: 8 }, (_, number) => colour(`w${number}`)),
  };
}
