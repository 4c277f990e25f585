// Charts that are drawn when they come into view, and again with just the points that can be told apart.

const TELLING = 400; // So few points have a dot each.
const MOST = 6000; // So many points may the lines of one kind have together.
const charts = [];
// A finger that is drawn over a chart scrolls the page.
const touched = matchMedia("(hover: none)").matches;

// Of the points of each column the first, the lowest, the highest and the last: the line looks the same.
function thinned(points, range, columns) {
  const [low, high] = range;
  const margin = (high - low) * 0.02;
  const shown = [];
  let before = null;
  let after = null;
  for (const point of points) {
    if (point.x < low - margin) before = point;
    else if (point.x > high + margin) { if (after === null) after = point; }
    else shown.push(point);
  }
  // One more on either side, to which the line leads.
  const all = [before, ...shown, after].filter((point) => point !== null);
  if (all.length <= 4 * columns) return all;
  const found = new Map();
  const scale = columns / (high - low || 1);
  for (const point of all) {
    const column = Math.floor((point.x - low) * scale);
    const those = found.get(column);
    if (those === undefined) found.set(column, { first: point, lowest: point, highest: point, last: point });
    else {
      if (point.y < those.lowest.y) those.lowest = point;
      if (point.y > those.highest.y) those.highest = point;
      those.last = point;
    }
  }
  const kept = new Set();
  for (const those of found.values()) for (const point of Object.values(those)) kept.add(point);
  return all.filter((point) => kept.has(point));
}

// Of the dots of a row that lie closer than a few pixels, the last one.
function spaced(points, range, width) {
  const [low, high] = range;
  const inside = points.filter((point) => point.x >= low && point.x <= high);
  if (inside.length <= TELLING) return inside;
  const scale = width / (high - low || 1) / 3;
  const kept = new Map();
  for (const point of inside) kept.set(`${point.y}/${Math.floor((point.x - low) * scale)}`, point);
  return [...kept.values()];
}

function extent(points, least = 1) {
  let low = Infinity;
  let high = -Infinity;
  for (const point of points) { if (point.x < low) low = point.x; if (point.x > high) high = point.x; }
  if (low > high) return [0, 1];
  const margin = high > low ? (high - low) * 0.03 : least;
  return [low - margin, high + margin];
}

// Lines as one trace: with a gap after each. Many share the points that there may be.
function joined(lines, range, width) {
  const inside = lines.filter((line) => line[line.length - 1].x >= range[0] && line[0].x <= range[1]);
  const columns = Math.max(Math.floor(Math.min(width, MOST / 4 / inside.length)), 4);
  const points = [];
  for (const line of inside) {
    if (points.length) points.push(null);
    points.push(...thinned(line, range, columns));
  }
  return points;
}

function trace(points, more, text = null) {
  return {
    type: "scatter",
    x: points.map((point) => (point === null ? null : point.x)),
    y: points.map((point) => (point === null ? null : point.y)),
    customdata: points.map((point) => (point === null ? null : point.place)),
    hoverinfo: text === null ? "skip" : "text",
    hovertext: text === null ? undefined : points.map((point) => (point === null ? "" : text(point))),
    showlegend: false,
    ...more,
  };
}

function ring(points, colour) {
  const found = points.filter((point) => point.place === selection.place);
  return trace(found, { mode: "markers", marker: { size: 15, color: "rgba(0,0,0,0)", line: { width: 2.5, color: colour } } });
}

// A ring around what is selected: a shape, which is drawn without the rest.
function rings(points, colour) {
  return points.filter((point) => point.place === selection.place && point.y !== null).map((point) => ({
    type: "circle", xref: "x", yref: "y", xsizemode: "pixel", ysizemode: "pixel", xanchor: point.x, yanchor: point.y,
    x0: -8, x1: 8, y0: -8, y1: 8, line: { color: colour, width: 2.5 }, name: "selected",
  }));
}

function layoutOf(look, more) {
  const axis = {
    gridcolor: look.grid, linecolor: look.line, zeroline: false, tickfont: { color: look.muted, size: 11 },
    automargin: true, fixedrange: false, tickangle: 0,
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", color: look.ink, size: 12 },
    margin: { l: 8, r: 10, t: 8, b: 8 }, hovermode: "closest", dragmode: touched ? false : "zoom", showlegend: false, uirevision: "same",
    hoverlabel: { bgcolor: look.card, bordercolor: look.line, font: { color: look.ink, size: 12 }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: look.muted, size: 11 } },
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis, fixedrange: true },
  };
}

class Chart {
  // `draw(chart, range, width, look)` gives {traces, layout}; `points` all points, of which the range along x is made.
  constructor(id, points, draw, { axis = () => "linear", log = () => false, height = 240 } = {}) {
    Object.assign(this, { points, draw, axis, log, height, shown: null, drawn: false });
    this.element = byId(id);
    charts.push(this);
    this.element.style.minHeight = `${height}px`;
    this.observer = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) soon(this);
    }, { rootMargin: "300px" });
  }

  begin() {
    this.observer.disconnect();
    this.drawn = true;
    this.redraw();
    this.element.on("plotly_relayout", (change) => this.moved(change));
    this.element.on("plotly_click", (event) => {
      const place = event.points[0].customdata;
      if (place !== null && place !== undefined) select(place);
    });
    selection.watchers.push(() => this.mark());
  }

  moved(change) {
    if ("xaxis.autorange" in change) this.shown = null;
    else if ("xaxis.range[0]" in change) {
      this.shown = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map((end) => this.number(end));
    } else return;
    this.redraw();
  }

  number(end) {
    return typeof end === "string" && this.axis() === "date" ? Date.parse(`${end.replace(" ", "T")}Z`) : Number(end);
  }

  reset() { this.shown = null; if (this.drawn) this.redraw(); }

  mark() {
    // Where it has to be drawn with the rest, see there.
    if (this.log()) this.redraw();
    else Plotly.relayout(this.element, { shapes: [...this.shapes, ...rings(this.points(), colours().accent)] });
  }

  redraw() {
    if (!this.drawn) { this.begin(); return; }
    const look = colours();
    const range = this.shown ?? extent(this.points(), this.axis() === "date" ? 3.6e6 : 1);
    const width = Math.max(this.element.clientWidth - 60, 100);
    const { traces, layout } = this.draw(range, width, look);
    // Saves and steps are whole numbers; between two of them there is nothing to be named.
    const room = Math.max(Math.round(width / 75), 4);
    const nticks = this.axis() === "date" ? room : Math.min(room, Math.ceil(range[1] - range[0]) + 1);
    const full = layoutOf(look, { height: this.height, ...layout, xaxis: { type: this.axis(), range, nticks, ...layout.xaxis } });
    this.shapes = full.shapes ?? [];
    // Plotly draws a shape that is measured in pixels flat where the axis is logarithmic.
    if (this.log()) traces.push(ring(this.points(), look.accent));
    else full.shapes = [...this.shapes, ...rings(this.points(), look.accent)];
    // The range is ours, and no gesture of its own is to be kept.
    full.uirevision = String(range);
    Plotly.react(this.element, traces, full, { displayModeBar: false, responsive: true, doubleClick: "autosize", scrollZoom: false });
    this.element.dataset.points = String(traces.reduce((sum, one) => sum + one.x.length, 0));
  }
}

function nothing(id, text) {
  const element = byId(id);
  element.classList.add("none");
  element.textContent = text;
}

// The text that stands for a chart, for whoever doesn't see it.
function alternative(id, text) {
  byId(`${id}-text`).textContent = text;
  const chart = byId(id);
  if (chart.getAttribute("role") === "img") chart.setAttribute("aria-label", text);
}

themes.watchers.push(redrawn);

function redrawn() { for (const chart of charts) if (chart.drawn) soon(chart); }

// Only once all the rest is there to be used: to read Plotly takes longer than that.
function beginCharts() {
  const held = byId("plotly");
  if (held.type !== "text/plain" || !charts.length) return;
  const script = make("script", { id: "plotly" });
  script.textContent = held.textContent;
  held.replaceWith(script);
  for (const chart of charts) chart.observer.observe(chart.element);
}

// One at a time, so that the page answers in between.
const waiting = new Set();

function soon(chart) {
  if (!waiting.size) setTimeout(work);
  waiting.add(chart);
}

function work() {
  const [chart] = waiting;
  chart.redraw();
  waiting.delete(chart);
  if (waiting.size) setTimeout(work);
}
