// A table of which only the rows in view are there.

const ROW = 30;
const SPARE = 8;
const PRINTED = 500; // So many rows go on paper at most.
const tables = [];

class Table {
  // Columns: {name, of(row), text(row), cell(row), right, wide, width}; `of` is what it is sorted by.
  constructor(box, rows, columns, { label, choose, sortBy = null, down = true, name }) {
    Object.assign(this, { rows, columns, choose, sortBy, down, shown: rows, active: 0, first: -1, last: -1 });
    this.body = make("tbody");
    this.heads = columns.map((column, number) => make("th", { scope: "col", class: this.classOf(column) },
      make("button", { type: "button", onclick: () => this.sort(number) }, column.name, make("span", { "aria-hidden": "true" }))));
    const sizes = make("colgroup", {}, ...columns.map((column) => {
      const col = make("col", { class: column.wide ? "wide" : null });
      if (column.width) col.style.width = `${column.width}px`;
      return col;
    }));
    this.table = make("table", { "aria-label": label, "aria-rowcount": rows.length + 1 }, sizes, make("thead", {}, make("tr", {}, ...this.heads)), this.body);
    this.view = make("div", { class: "view" }, this.table);
    this.empty = make("p", { class: "empty", hidden: true }, name);
    box.append(this.view, this.empty);
    this.view.addEventListener("scroll", () => this.fill());
    this.body.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.fill()).observe(this.view);
    this.arrange();
    tables.push(this);
  }

  classOf(column) { return [column.right ? "right" : "", column.wide ? "wide" : "", column.id ? "id" : ""].filter(Boolean).join(" ") || null; }

  keep(test) { this.test = test; this.arrange(); }

  sort(number) {
    this.down = this.sortBy === number ? !this.down : this.columns[number].right === true;
    this.sortBy = number;
    this.arrange();
  }

  arrange() {
    const kept = this.test ? this.rows.filter(this.test) : [...this.rows];
    if (this.sortBy !== null) {
      const { of } = this.columns[this.sortBy];
      const sign = this.down ? -1 : 1;
      const keys = new Map(kept.map((row) => [row, of(row)]));
      kept.sort((a, b) => {
        const [left, right] = [keys.get(a), keys.get(b)];
        // What has no value comes last, whichever way.
        if (left === null || right === null) return (left === null) - (right === null) || a.place - b.place;
        return sign * (typeof left === "string" ? (left < right ? -1 : left > right ? 1 : 0) : left - right) || sign * (a.place - b.place);
      });
    }
    this.shown = kept;
    this.heads.forEach((head, number) => {
      const sorted = number === this.sortBy;
      if (sorted) head.setAttribute("aria-sort", this.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.querySelector("span").textContent = sorted ? (this.down ? "↓" : "↑") : "";
    });
    this.table.setAttribute("aria-rowcount", String(kept.length + 1));
    this.empty.hidden = kept.length > 0;
    this.view.hidden = kept.length === 0;
    this.active = 0;
    this.view.scrollTop = 0;
    this.first = -1;
    this.fill();
  }

  // Where rows lie is known without them, as all are as high.
  fill({ all = false } = {}) {
    const height = this.view.clientHeight || 600;
    const first = all ? 0 : Math.max(Math.floor(this.view.scrollTop / ROW) - SPARE, 0);
    const last = Math.min(all ? PRINTED : Math.ceil((this.view.scrollTop + height) / ROW) + SPARE, this.shown.length);
    if (first === this.first && last === this.last) return;
    const hadFocus = this.body.contains(document.activeElement);
    [this.first, this.last] = [first, last];
    const rows = [];
    for (let at = first; at < last; at += 1) rows.push(this.row(at));
    this.body.replaceChildren(this.space(first), ...rows, this.space(all ? 0 : this.shown.length - last));
    if (hadFocus) this.focus();
  }

  space(count) {
    const row = make("tr", { class: "space", "aria-hidden": "true" }, make("td"));
    row.firstChild.style.height = `${count * ROW}px`;
    row.hidden = count === 0;
    return row;
  }

  row(at) {
    const save = this.shown[at];
    return make("tr", {
      class: isThere(save) ? null : "deleted", "aria-rowindex": at + 2, "data-at": at, tabindex: at === this.active ? 0 : -1,
      "aria-selected": save.place === selection.place ? "true" : "false",
      onclick: () => { this.active = at; this.choose(save); },
    }, ...this.columns.map((column) => {
      const text = column.text(save);
      return make("td", { class: this.classOf(column), title: text.length > 12 ? text : null }, ...(column.cell ? column.cell(save) : [text]));
    }));
  }

  focus() {
    const row = this.body.querySelector(`tr[data-at="${this.active}"]`);
    if (row) row.focus({ preventScroll: true });
  }

  go(at) {
    this.active = Math.min(Math.max(at, 0), this.shown.length - 1);
    const top = this.active * ROW;
    const height = this.view.clientHeight - ROW;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top > this.view.scrollTop + height - ROW) this.view.scrollTop = top - height + ROW;
    this.first = -1;
    this.fill();
    this.focus();
  }

  walk(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !event.target.matches("tr")) return;
    const page = Math.max(Math.floor(this.view.clientHeight / ROW) - 2, 1);
    const to = { ArrowDown: this.active + 1, ArrowUp: this.active - 1, PageDown: this.active + page, PageUp: this.active - page, Home: 0, End: this.shown.length - 1 }[event.key];
    if (to !== undefined) this.go(to);
    else if (event.key === "Enter" || event.key === " ") this.choose(this.shown[this.active]);
    else if (event.key === "c" || event.key === "C") copy(this.shown[this.active].id);
    else return;
    event.preventDefault();
  }

  mark() {
    for (const row of this.body.querySelectorAll("tr[data-at]")) {
      row.setAttribute("aria-selected", this.shown[Number(row.dataset.at)].place === selection.place ? "true" : "false");
    }
  }
}
