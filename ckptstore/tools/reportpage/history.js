// Charts against the order of saves and against steps: the history, the metrics, sizes and speed.

// Lines along which each save continues the one before; one more wherever a run went back.
function stretches(points, keep) {
  const lines = [];
  const tails = new Map();
  for (const point of points) {
    const save = saves[point.place];
    if (!keep(save)) continue;
    const line = tails.get(save.branch);
    if (line === undefined) { const made = [point]; tails.set(save.branch, made); lines.push(made); }
    else line.push(point);
  }
  return lines;
}

function beginHistory() {
  if (!saves.length) { nothing("history", "Nothing has been saved yet."); return; }
  const points = saves.map((save) => ({ x: save.place + 1, y: save.step, place: save.place }));
  const backs = saves.filter((save) => save.place > 0 && save.parent !== save.place - 1);
  // From the one that was continued, along its step, to the first save of the branch.
  const ways = backs.map((save) => {
    const y = save.parent === null ? save.step : saves[save.parent].step;
    const x = (save.parent ?? save.place - 1) + 1;
    return [{ x, y, place: null }, { x: save.place + 0.6, y, place: null }, points[save.place]];
  });
  const left = (save) => save.abandoned;
  const draw = (range, width, look) => {
    const kept = joined(stretches(points, (save) => !left(save)), range, width);
    // What was left behind begins at what it continued.
    const lost = stretches(points, left).map((line) => {
      const parent = saves[line[0].place].parent;
      return parent === line[0].place - 1 ? [points[parent], ...line] : line;
    });
    const dashed = joined(lost, range, width);
    const text = (point) => told(saves[point.place]);
    const dots = (keep) => spaced(points.filter((point) => keep(saves[point.place])), range, width);
    const inside = points.filter((point) => point.x >= range[0] && point.x <= range[1]);
    const few = inside.length <= TELLING;
    const live = few ? dots(isThere) : dots((save) => isThere(save) && (save.roles.length || save.holds.length));
    const faint = few ? dots((save) => !isThere(save)) : [];
    const forks = ways.filter((way) => way[1].x >= range[0] && way[0].x <= range[1]);
    const marks = thinned(forks.map((way) => way[2]), range, width);
    const colour = (list) => list.map((point) => look.writers[saves[point.place].writer % 8]);
    return {
      traces: [
        trace(forks.slice(-400).flatMap((way, number) => (number ? [null, ...way] : way)), { mode: "lines", line: { color: look.muted, width: 1, dash: "dot" } }),
        trace(dashed, { mode: "lines", line: { color: look.muted, width: 1.5, dash: "dash" } }, (point) => told(saves[point.place])),
        trace(kept, { mode: "lines", line: { color: look.accent, width: 2 } }, text),
        trace(faint, { mode: "markers", marker: { size: 6, color: colour(faint), opacity: 0.35 } }, text),
        trace(live, { mode: "markers", marker: { size: 7, color: colour(live), line: { width: 1, color: look.card } } }, text),
        trace(marks, { mode: "markers", marker: { size: 9, symbol: "diamond", color: look.bad, line: { width: 1, color: look.card } } }, text),
      ],
      layout: {
        xaxis: { title: { text: "saves, in order", font: { size: 11, color: look.muted } }, tickformat: ",d" },
        yaxis: { title: { text: "step", font: { size: 11, color: look.muted } } },
      },
    };
  };
  new Chart("history", () => points, draw, { height: 300 });
  const lost = saves.filter(left).length;
  const where = backs.slice(-5).map((save) => (save.parent === null ? `a new beginning at step ${count(save.step)}` : `back to step ${count(saves[save.parent].step)} before save ${count(save.place + 1)}`));
  alternative("history", backs.length
    ? `${plural(saves.length, "save")}, ${plural(backs.length, "roll-back")}: ${where.join(", ")}${backs.length > 5 ? " and earlier ones" : ""}. ${plural(lost, "save")} left behind.`
    : `${plural(saves.length, "save")}, each continuing the one before: no roll-backs.`);
}

// -- metrics -----------------------------------------------------------------------------------------------

const METRICS = 60;

function beginMetrics() {
  const box = byId("metrics");
  if (box === null) return;
  report.metrics.slice(0, METRICS).forEach((metric, number) => {
    const id = `metric-${number}`;
    const best = metric.best === null ? "no number yet" : `best ${figure(metric.value)} at step ${count(saves[placeOf.get(metric.best)].step)}, ${metric.mode === "min" ? "smaller" : "larger"} is better`;
    const scale = make("button", { type: "button", class: "slim" }, "log");
    box.append(make("figure", { class: "card", id: `${id}-figure` },
      make("figcaption", {}, make("h3", {}, metric.name), make("p", {}, best), scale),
      make("div", { class: "chart", id, role: "img", "aria-label": metric.name }),
      make("p", { class: "alternative", id: `${id}-text` })));
    beginMetric(id, metric, scale);
  });
  if (report.metrics.length > METRICS) {
    box.append(make("p", { class: "card muted" }, `and ${plural(report.metrics.length - METRICS, "metric")} more: ckptstore report --json has them all`));
  }
}

function beginMetric(id, metric, scale) {
  const having = saves.filter((save) => metricOf(save, metric.name) !== null);
  const points = having.map((save) => ({ x: save.step, y: finite(metricOf(save, metric.name)), place: save.place })).filter((point) => point.y !== null);
  const odd = having.length - points.length;
  const oddText = odd ? ` ${plural(odd, "value")} not finite${odd <= 5 ? ` (step ${having.filter((save) => finite(metricOf(save, metric.name)) === null).map((save) => count(save.step)).join(", ")})` : ""}.` : "";
  if (!points.length) {
    nothing(id, `No finite value.${oddText}`);
    scale.remove();
    return;
  }
  const low = points.reduce((least, point) => Math.min(least, point.y), Infinity);
  const high = points.reduce((most, point) => Math.max(most, point.y), -Infinity);
  let log = low > 0 && high / low > 1000;
  const show = () => { scale.textContent = log ? "linear" : "log"; scale.setAttribute("aria-label", `${metric.name}: ${log ? "linear" : "logarithmic"} scale`); };
  show();
  if (low <= 0 || high === low) scale.remove();
  const text = (point) => `${plain(clipped(metric.name, 60))} ${figure(metricOf(saves[point.place], metric.name))}<br>${told(saves[point.place])}`;
  const draw = (range, width, look) => {
    const kept = joined([stretches(points, (save) => !save.abandoned).flat()], range, width);
    const lost = joined(stretches(points, (save) => save.abandoned), range, width);
    const dots = points.filter((point) => point.x >= range[0] && point.x <= range[1]);
    const few = dots.length <= TELLING ? dots : dots.filter((point) => saves[point.place].roles.length || saves[point.place].holds.length);
    const best = points.filter((point) => saves[point.place].id === metric.best);
    return {
      traces: [
        trace(lost, { mode: "lines", line: { color: look.muted, width: 1.3, dash: "dash" } }, text),
        trace(kept, { mode: "lines", line: { color: look.accent, width: 1.8 } }, text),
        trace(few, {
          mode: "markers",
          marker: {
            size: 6, color: few.map((point) => look.writers[saves[point.place].writer % 8]),
            opacity: few.map((point) => (isThere(saves[point.place]) ? 1 : 0.3)), line: { width: 1, color: look.card },
          },
        }, text),
        trace(best, { mode: "markers", marker: { size: 13, symbol: "star", color: look.good, line: { width: 1, color: look.card } } }, text),
      ],
      layout: {
        xaxis: { title: { text: "step", font: { size: 11, color: look.muted } } },
        yaxis: { type: log ? "log" : "linear", exponentformat: "power", autorange: true, nticks: 6 },
      },
    };
  };
  const chart = new Chart(id, () => points, draw, { height: 220, log: () => log });
  scale.addEventListener("click", () => { log = !log; show(); if (chart.drawn) chart.redraw(); });
  const last = points[points.length - 1];
  alternative(id, `${metric.name}: ${plural(points.length, "value")} from ${figure(low)} to ${figure(high)}, ${figure(last.y)} at the last step ${count(last.x)}.${oddText}`);
}

// -- sizes and speed ---------------------------------------------------------------------------------------

function lines(id, series, y, { height = 220, words, hover }) {
  const points = series.flatMap((one) => one.lines.flat());
  if (!points.length) return;
  const draw = (range, width, look) => ({
    traces: [
      ...series.filter((one) => one.lines.length).map((one, number) => {
        const shown = joined(one.lines, range, width);
        const mode = shown.length <= TELLING / 4 ? "lines+markers" : "lines";
        return trace(shown, {
          mode, name: one.name, showlegend: series.length > 1,
          line: { color: one.colour(look), width: 1.8, dash: one.dash, shape: one.shape }, marker: { size: 5 },
        }, (point) => `${plain(hover(point, one))}<br>${told(saves[point.place])}`);
      }),
    ],
    layout: {
      xaxis: { title: { text: "saves, in order", font: { size: 11, color: look.muted } }, tickformat: ",d" },
      yaxis: { rangemode: "tozero", autorange: true, nticks: 6, ...y }, showlegend: series.length > 1,
    },
  });
  new Chart(id, () => points, draw, { height });
  alternative(id, words);
}

const pointsOf = (list, value) => list.map((save) => ({ x: save.place + 1, y: value(save), place: save.place })).filter((point) => point.y !== null);

function sum(list, value) { return list.reduce((total, one) => total + value(one), 0); }

function middle(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
}

const byteAxis = { tickformat: "~s", ticksuffix: "B" };

function beginSizes() {
  const known = saves.filter(isKnown);
  const there = saves.filter(isThere);
  if (!there.length) {
    for (const id of ["sizes", "total"]) nothing(id, "Nothing has been saved yet.");
  } else {
    const borrow = there.some((save) => save.borrowed_bytes > 0);
    lines("sizes", [
      { name: "own", lines: [pointsOf(there, (save) => save.own_bytes)], colour: (look) => look.accent },
      { name: "with borrowed", lines: borrow ? [pointsOf(there, (save) => save.stored_bytes)] : [], colour: (look) => look.writers[2], dash: "dash" },
      { name: "in memory", lines: [pointsOf(there, (save) => save.raw_bytes)], colour: (look) => look.muted, dash: "dot" },
    ], byteAxis, {
      words: `${bytes(middle(there.map((save) => save.own_bytes)))} of its own in the middle, ${bytes(there[there.length - 1].raw_bytes)} in memory for the latest.`,
      hover: (point, one) => `${bytes(point.y)} ${one.name}`,
    });
    let total = 0;
    const grown = there.map((save) => { total += save.own_bytes; return { x: save.place + 1, y: total, place: save.place }; });
    lines("total", [{ name: "together", lines: [grown], colour: (look) => look.accent, shape: "hv" }], byteAxis, {
      words: `${bytes(total)} for ${plural(there.length, "checkpoint")}.`,
      hover: (point) => `${bytes(point.y)} up to here`,
    });
  }
  const fast = known.filter((save) => save.steps_per_s !== null);
  if (!fast.length) nothing("speed", "It takes two saves of one writer to tell.");
  else {
    const runs = new Map();
    for (const point of pointsOf(fast, (save) => save.steps_per_s)) {
      const key = `${saves[point.place].writer}/${saves[point.place].branch}`;
      if (!runs.has(key)) runs.set(key, []);
      runs.get(key).push(point);
    }
    lines("speed", [{ name: "steps/s", lines: [...runs.values()], colour: (look) => look.accent }], {}, {
      words: `${figure(middle(fast.map((save) => save.steps_per_s)))} steps/s in the middle, ${figure(fast[fast.length - 1].steps_per_s)} at last.`,
      hover: (point) => `${figure(point.y)} steps/s`,
    });
  }
  const timed = known.filter((save) => save.save_s !== null);
  if (!timed.length) nothing("stalls", "Not recorded by these saves.");
  else {
    const waited = timed.filter((save) => save.stall_s !== null);
    const rates = timed.map((save) => save.bytes_per_s).filter((rate) => rate !== null);
    lines("stalls", [
      { name: "save", lines: [pointsOf(timed, (save) => save.save_s)], colour: (look) => look.accent },
      { name: "training waits", lines: [pointsOf(waited, (save) => save.stall_s)], colour: (look) => look.writers[1], dash: "dot" },
    ], { ticksuffix: " s" }, {
      words: `${seconds(middle(timed.map((save) => save.save_s)))} in the middle${rates.length ? `, ${bytes(Math.round(middle(rates)))}/s` : ""}; training waited ${waited.length ? `${seconds(sum(waited, (save) => save.stall_s))} in all` : "for how long isn't recorded"}.`,
      hover: (point, one) => `${seconds(point.y)} ${one.name === "save" ? "for the save" : "waited"}`,
    });
  }
}
