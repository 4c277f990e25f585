// The timeline: a row for each role and each kind of reason, a dot for each checkpoint; and its details.

function told(save) {
  const lines = [`<b>${plain(save.label)}</b>`, `step ${count(save.step)}${save.epoch === null ? "" : `, epoch ${count(save.epoch)}`}`];
  if (save.time !== null) lines.push(`${clock(save.time)} UTC`);
  const values = Object.entries(save.metrics).slice(0, 6).map(([name, value]) => `${name} ${figure(value)}`);
  if (values.length) lines.push(plain(clipped(values.join(", "), 80)));
  for (const text of [...save.roles, ...save.holds.map((name) => `held: ${name}`)].slice(0, 6)) lines.push(plain(clipped(text, 80)));
  for (const reason of save.reasons.slice(0, 5)) lines.push(plain(clipped(reason, 80)));
  if (save.stored_bytes !== null) lines.push(bytes(save.stored_bytes));
  if (save.status !== "there") lines.push(save.status === "gone" ? "gone" : save.status);
  return lines.join("<br>");
}

const timeline = { byTime: true, lane: 0, points: [] };

function placeTimeline() {
  timeline.points = [];
  report.lanes.forEach((lane, y) => {
    for (const place of lane.saves) {
      const save = saves[place];
      timeline.points.push({ x: timeline.byTime ? save.time : save.step, y, place });
    }
  });
}

function drawTimeline(range, width, look) {
  const live = timeline.points.filter((point) => isThere(saves[point.place]));
  const dead = timeline.points.filter((point) => !isThere(saves[point.place]));
  const colour = (points) => points.map((point) => look.writers[saves[point.place].writer % 8]);
  const text = (point) => told(saves[point.place]);
  const shown = spaced(live, range, width);
  const faint = spaced(dead, range, width);
  const names = report.lanes.map((lane) => {
    const name = plain(clipped(lane.name, width < 500 ? 16 : 30));
    return lane.kind === "role" ? `<b>${name}</b>` : name;
  });
  const roles = report.lanes.filter((lane) => lane.kind === "role").length;
  return {
    traces: [
      trace(faint, { mode: "markers", marker: { size: 7, color: colour(faint), opacity: 0.28 } }, text),
      trace(shown, { mode: "markers", marker: { size: 8, color: colour(shown), opacity: 0.95, line: { width: 1, color: look.card } } }, text),
    ],
    layout: {
      // Between what each is now and why it was saved.
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: roles - 0.5, y1: roles - 0.5, line: { color: look.line, width: 1 } }],
      xaxis: { title: timeline.byTime ? undefined : { text: "step", font: { size: 11, color: look.muted } } },
      yaxis: {
        range: [report.lanes.length - 0.5, -0.5], tickmode: "array", tickvals: names.map((_, y) => y), ticktext: names,
        showgrid: true, tickfont: { size: 12, color: look.ink },
      },
    },
  };
}

function beginTimeline() {
  if (!report.lanes.length) {
    nothing("timeline", "Nothing has been saved yet.");
    return;
  }
  placeTimeline();
  const height = Math.max(150, 56 + 26 * report.lanes.length);
  const chart = new Chart("timeline", () => timeline.points, drawTimeline, { axis: () => (timeline.byTime ? "date" : "linear"), height });
  byId("timeline-axis").addEventListener("change", (event) => {
    timeline.byTime = event.target.value === "time";
    placeTimeline();
    chart.reset();
  });
  byId("timeline").addEventListener("keydown", walkTimeline);
  const parts = report.lanes.map((lane) => `${lane.name}: ${lane.saves.length}`);
  const span = saves.filter((save) => isKnown(save));
  const steps = span.map((save) => save.step);
  const least = steps.reduce((a, b) => Math.min(a, b));
  const most = steps.reduce((a, b) => Math.max(a, b));
  alternative("timeline", `${plural(span.length, "save")} from step ${count(least)} to step ${count(most)}. ${clipped(parts.join("; "), 600)}.`);
}

function walkTimeline(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const lanes = report.lanes;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    timeline.lane = Math.min(Math.max(timeline.lane + (event.key === "ArrowDown" ? 1 : -1), 0), lanes.length - 1);
    const lane = lanes[timeline.lane].saves;
    const here = selection.place ?? lane[lane.length - 1];
    // The nearest one of that row.
    select(lane.reduce((best, place) => (Math.abs(place - here) < Math.abs(best - here) ? place : best), lane[0]));
    say(`row ${lanes[timeline.lane].name}: ${inWords(saves[selection.place])}`);
  } else {
    const lane = lanes[timeline.lane].saves.includes(selection.place) ? lanes[timeline.lane].saves : allKnown();
    const at = selection.place === null ? (event.key === "ArrowRight" ? -1 : lane.length) : lane.indexOf(selection.place);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: lane.length - 1 }[event.key];
    if (next === undefined) return;
    select(lane[Math.min(Math.max(next, 0), lane.length - 1)]);
    say(inWords(saves[selection.place]));
  }
  event.preventDefault();
}

const inWords = (save) => [`step ${count(save.step)}`, ...save.roles, ...save.reasons, save.status === "there" ? save.label : `${save.label}, ${save.status}`].join(", ");

function allKnown() { return saves.filter(isKnown).map((save) => save.place); }

// -- details -----------------------------------------------------------------------------------------------

function showDetails(place) {
  const panel = byId("details");
  if (place === null) return;
  const save = saves[place];
  const tags = make("div", { class: "row" });
  for (const role of save.roles) tags.append(make("span", { class: "tag role" }, role));
  for (const name of save.holds) tags.append(make("span", { class: "tag role" }, `held: ${name}`));
  if (save.status !== "there") tags.append(make("span", { class: "tag off" }, save.status));
  if (save.abandoned && save.status === "there") tags.append(make("span", { class: "tag" }, "left behind by a roll-back"));
  for (const reason of save.reasons) tags.append(make("span", { class: "tag", title: reason }, reason));
  const list = make("dl");
  const add = (name, value) => { if (value !== null && value !== "–") list.append(make("dt", {}, name), make("dd", {}, value)); };
  const writer = writers.get(save.writer);
  add("id", save.id);
  add("step", count(save.step));
  add("epoch", save.epoch === null ? null : count(save.epoch));
  add("saved", save.time === null ? null : `${clock(save.time)} UTC`);
  for (const [name, value] of Object.entries(save.metrics)) add(name, figure(value));
  add("stored", save.stored_bytes === null ? null : bytes(save.stored_bytes));
  if (save.borrowed_bytes) add("borrowed", `${bytes(save.borrowed_bytes)} from ${save.lenders.join(", ")}`);
  add("in memory", save.raw_bytes === null ? null : bytes(save.raw_bytes));
  add("holds", save.tensors === null ? null : `${plural(save.tensors, "tensor")} in ${plural(save.files, "file")}`);
  add("parameters", save.parameters ? count(save.parameters) : null);
  add("ranks", save.world_size > 1 ? count(save.world_size) : null);
  add("speed before", save.steps_per_s === null ? null : `${figure(save.steps_per_s)} steps/s`);
  add("save took", save.save_s === null ? null : `${seconds(save.save_s)}, ${bytes(Math.round(save.bytes_per_s ?? 0))}/s`);
  add("training waited", save.stall_s === null ? null : seconds(save.stall_s));
  add("writer", writer && writer.host ? `${save.writer}: ${writer.host}, process ${writer.pid}` : String(save.writer));
  add("continues", save.parent === null ? null : saves[save.parent].label);
  add("lies only in", save.only_in);
  if (save.deleted) add("deleted", `${clock(Date.parse(save.deleted.created) || 0)} UTC, ${save.deleted.reason}`);
  if (save.verdict) add(save.verdict.stays ? "would stay" : "would go", save.verdict.why);
  const buttons = make("div", { class: "row" },
    make("button", { type: "button", class: "slim", onclick: () => copy(save.id) }, "Copy id"),
    isKnown(save) ? make("button", { type: "button", class: "slim", onclick: () => showInTable(place) }, "Show in the table") : null);
  panel.replaceChildren(make("h3", {}, save.label), tags, buttons, list);
}

selection.watchers.push(showDetails);
