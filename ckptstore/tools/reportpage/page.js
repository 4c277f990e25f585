// Puts the page together.

let table = null;

const idColumn = {
  name: "id", id: true, width: 230, of: (save) => save.place, text: (save) => save.id,
  cell: (save) => [
    make("span", { class: `dot w${save.writer % 8}` }), save.label,
    make("button", { type: "button", class: "copy", tabindex: -1, "aria-label": `Copy ${save.id}`, onclick: (event) => { event.stopPropagation(); copy(save.id); } }, "copy"),
  ],
};
const stepColumn = { name: "step", right: true, width: 90, of: (save) => save.step, text: (save) => count(save.step) };

function tagged(save) {
  const tags = save.roles.map((role) => make("span", { class: "tag role" }, role));
  tags.push(...save.holds.map((name) => make("span", { class: "tag role" }, `held: ${name}`)));
  if (save.status === "deleted") tags.push(make("span", { class: "tag off" }, "deleted"));
  return tags.flatMap((tag, number) => (number ? [" ", tag] : [tag]));
}

const marks = (save) => [...save.roles, ...save.holds.map((name) => `held: ${name}`), ...(save.status === "deleted" ? ["deleted"] : [])].join(", ");

function columnsOf(rows) {
  const some = (test) => rows.some(test);
  // On a phone the id, which tells the step, and the size.
  const columns = [idColumn, { ...stepColumn, wide: true }];
  if (some((save) => save.epoch !== null)) columns.push({ name: "epoch", right: true, wide: true, width: 75, of: (save) => save.epoch, text: (save) => (save.epoch === null ? "" : count(save.epoch)) });
  columns.push({ name: "saved (UTC)", wide: true, width: 178, of: (save) => save.time, text: (save) => clock(save.time) });
  columns.push({ name: "size", right: true, width: 85, of: (save) => save.stored_bytes, text: (save) => bytes(save.stored_bytes) });
  for (const { name } of report.metrics.slice(0, 3)) {
    columns.push({ name, right: true, wide: true, width: 100, of: (save) => finite(metricOf(save, name)), text: (save) => (metricOf(save, name) === null ? "" : figure(metricOf(save, name))) });
  }
  columns.push({ name: "roles", wide: true, width: some((save) => save.roles.length || save.holds.length) ? 200 : 90, of: (save) => marks(save) || null, text: marks, cell: tagged });
  columns.push({ name: "reasons", wide: true, of: (save) => save.reasons.join(", ") || null, text: (save) => save.reasons.join(", ") });
  return columns;
}

function beginTable() {
  const rows = saves.filter(isKnown);
  table = new Table(byId("table"), rows, columnsOf(rows), {
    label: "All checkpoints", sortBy: 0, down: true, name: "No checkpoint matches.",
    choose: (save) => { select(save.place); say(`selected ${inWords(save)}`); },
  });
  // Written once: a filter is asked at every key.
  const words = rows.map((save) => {
    const writer = writers.get(save.writer);
    const values = Object.entries(save.metrics).map(([name, value]) => `${name} ${figure(value)}`);
    return [save.id, `step ${save.step}`, save.epoch === null ? "" : `epoch ${save.epoch}`, marks(save), ...save.reasons, ...values, writer ? writer.host : ""].join("\n").toLowerCase();
  });
  const texts = new Map(rows.map((save, number) => [save.place, words[number]]));
  const keep = () => {
    const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = byId("status").value;
    table.keep((save) => (status === "all" || save.status === status) && wanted.every((word) => texts.get(save.place).includes(word)));
    byId("count").textContent = `${count(table.shown.length)} of ${count(rows.length)}`;
  };
  byId("filter").addEventListener("input", keep);
  byId("status").addEventListener("change", keep);
  keep();
  selection.watchers.push(() => table.mark());
}

function showInTable(place) {
  const at = table.shown.findIndex((save) => save.place === place);
  if (at < 0) { byId("filter").value = ""; byId("status").value = "all"; byId("filter").dispatchEvent(new Event("input")); }
  byId("checkpoints").scrollIntoView();
  table.go(at < 0 ? table.shown.findIndex((save) => save.place === place) : at);
}

function beginRetention() {
  const box = byId("retention");
  if (box === null) return;
  const rows = saves.filter((save) => save.verdict !== null);
  const columns = [
    { name: "fate", width: 76, of: (save) => (save.verdict.stays ? 1 : 0), text: (save) => (save.verdict.stays ? "stays" : "goes"), cell: (save) => [make("span", { class: save.verdict.stays ? "muted" : "bad" }, save.verdict.stays ? "stays" : "goes")] },
    { ...idColumn, wide: true }, stepColumn,
    { name: "bytes", right: true, width: 85, wide: true, of: (save) => save.own_bytes, text: (save) => bytes(save.own_bytes) },
    { name: "why", of: (save) => save.verdict.why, text: (save) => save.verdict.why },
  ];
  const made = new Table(box, rows, columns, {
    label: "What goes and what stays", sortBy: 0, down: false, name: "There is nothing to judge.", choose: (save) => select(save.place),
  });
  selection.watchers.push(() => made.mark());
}

// On paper all is light, and there: what nobody has scrolled to, too.
function beginPrinting() {
  const { dataset } = document.documentElement;
  dataset.before = dataset.theme ?? "";
  dataset.theme = "light";
  beginCharts();
  for (const chart of charts) chart.redraw();
  for (const one of tables) one.fill({ all: true });
}

function endPrinting() {
  const { dataset } = document.documentElement;
  if (dataset.before) dataset.theme = dataset.before;
  else delete dataset.theme;
  setTheme(null);
  for (const one of tables) { one.first = -1; one.fill(); }
}

function begin() {
  for (const element of document.querySelectorAll("[data-age]")) element.textContent = age(element.dataset.age);
  beginTable();
  beginTimeline();
  beginHistory();
  beginMetrics();
  beginSizes();
  beginRetention();
  if (report.summary.latest !== null) select(placeOf.get(report.summary.latest));
  setTheme(remembered());
  byId("theme").addEventListener("click", () => { const theme = isDark() ? "light" : "dark"; remember(theme); setTheme(theme); });
  themes.system.addEventListener("change", () => setTheme(null));
  addEventListener("resize", redrawn);
  addEventListener("beforeprint", beginPrinting);
  addEventListener("afterprint", endPrinting);
  document.documentElement.dataset.ready = "yes";
  requestAnimationFrame(() => setTimeout(beginCharts));
}

begin();
