// Charts that are drawn when they come into view, and again with just the points that can be told apart.

const TELLING = 400; // So few points have a dot each.
const charts = [];

// Of the points of each column of pixels the first, the lowest, the highest and the last: the line looks the same.
function thinned(points, range, width) {
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
  if (all.length <= TELLING) return all;
  const columns = new Map();
  const scale = width / (high - low || 1);
  for (const point of all) {
    const column = Math.floor((point.x - low) * scale);
    const found = columns.get(column);
    if (found === undefined) columns.set(column, { first: point, lowest: point, highest: point, last: point });
    else {
      if (point.y < found.lowest.y) found.lowest = point;
      if (point.y > found.highest.y) found.highest = point;
      found.last = point;
    }
  }
  const kept = new Set();
  for (const found of columns.values()) for (const point of Object.values(found)) kept.add(point);
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

function extent(points) {
  let low = Infinity;
  let high = -Infinity;
  for (const point of points) { if (point.x < low) low = point.x; if (point.x > high) high = point.x; }
  if (low > high) return [0, 1];
  const margin = high > low ? (high - low) * 0.03 : high === 0 ? 1 : Math.abs(high) * 1e-4 || 1;
  return [low - margin, high + margin];
}

// Lines as one trace: with a gap after each.
function joined(lines, range, width) {
  const points = [];
  for (const line of lines) {
    if (points.length) points.push(null);
    points.push(...thinned(line, range, width));
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

function ring(place, points, colour) {
  const found = points.filter((point) => point.place === place);
  return trace(found, { mode: "markers", marker: { size: 14, color: "rgba(0,0,0,0)", line: { width: 2.5, color: colour } } });
}

function layoutOf(look, more) {
  const axis = {
    gridcolor: look.grid, linecolor: look.line, zeroline: false, tickfont: { color: look.muted, size: 11 },
    automargin: true, fixedrange: false,
  };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", color: look.ink, size: 12 },
    margin: { l: 8, r: 10, t: 8, b: 8 }, hovermode: "closest", dragmode: "zoom", showlegend: false, uirevision: "same",
    hoverlabel: { bgcolor: look.card, bordercolor: look.line, font: { color: look.ink, size: 12 }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: look.muted, size: 11 } },
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis, fixedrange: true },
  };
}

class Chart {
  // `draw(chart, range, width, look)` gives {traces, layout}; `points` all points, of which the range along x is made.
  constructor(id, points, draw, { axis = () => "linear", height = 240 } = {}) {
    Object.assign(this, { id, points, draw, axis, height, shown: null, drawn: false });
    this.element = byId(id);
    charts.push(this);
    this.observer = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) this.begin();
    }, { rootMargin: "300px" });
    this.observer.observe(this.element);
  }

  begin() {
    this.observer.disconnect();
    if (this.drawn) return;
    this.drawn = true;
    this.element.style.minHeight = `${this.height}px`;
    this.redraw();
    this.element.on("plotly_relayout", (change) => this.moved(change));
    this.element.on("plotly_click", (event) => {
      const place = event.points[0].customdata;
      if (place !== null && place !== undefined) select(place);
    });
    selection.watchers.push(() => this.redraw());
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

  redraw() {
    if (!this.drawn) return;
    const look = colours();
    const range = this.shown ?? extent(this.points());
    const width = Math.max(this.element.clientWidth - 60, 100);
    const { traces, layout } = this.draw(range, width, look);
    const full = layoutOf(look, { height: this.height, ...layout, xaxis: { type: this.axis(), range, ...layout.xaxis } });
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

themes.watchers.push(() => { for (const chart of charts) chart.redraw(); });
