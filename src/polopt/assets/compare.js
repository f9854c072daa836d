"use strict";
// The page reads well without this file; it adds the crosshair, the legend's switches, sorting and filtering.
// Vanilla, because the page is one file that opens without a network and these few things need no library.

const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";

/** Three significant digits, thousands separated; a dash where there is no number. */
const number = (v) => (v === null || v === undefined ? "–" : written(v).replaceAll("-", "−"));

function written(v) {
  const size = Math.abs(v);
  if (size >= 1e7) return v.toExponential(2);
  if (size >= 1000) return Math.round(v).toLocaleString("en-US");
  return size !== 0 && size < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(3)));
}

// ------------------------------------------------------------------------------------------------------ learning curves
const plots = document.querySelector(".plots");
const keys = all(".keys button");
const hidden = new Set();
let axis = "budget"; // the horizontal axis shown
let at = null; // index of the crosshair in the axis' grid; null: none, the end of the curves is shown

/** Linear interpolation of a curve's column at x; null outside of the curve and next to missing numbers. */
function value(curve, column, x) {
  const xs = curve.x;
  const n = xs.length;
  if (!n || x < xs[0] - 1e-9 * Math.abs(x) || x > xs[n - 1] * (1 + 1e-9)) return null;
  let high = xs.findIndex((v) => v >= x);
  if (high < 0) high = n - 1;
  if (xs[high] === x || high === 0) return curve[column][high];
  const [a, b] = [curve[column][high - 1], curve[column][high]];
  if (a === null || b === null) return null;
  return a + ((b - a) * (x - xs[high - 1])) / (xs[high] - xs[high - 1]);
}

const curveOf = (place) => data.curves[axis].find((c) => c.place === place);

function show() {
  const { grid, pictures, label } = data.axes[axis];
  const x = at === null ? null : grid[at];
  const said = [];
  for (const key of keys) {
    const curve = curveOf(Number(key.dataset.place));
    const end = curve && curve.x.length ? curve.x[curve.x.length - 1] : null;
    const where = x === null ? end : x;
    const [mid, low, high] = curve && where !== null ? ["mid", "low", "high"].map((c) => value(curve, c, where)) : [null, null, null];
    key.querySelector(".value").textContent = number(mid);
    key.querySelector(".range").textContent = low === null || high === null ? "" : `[${number(low)}, ${number(high)}]`;
    if (mid !== null && !hidden.has(key.dataset.place)) said.push(`${key.dataset.name} ${number(mid)}`);
  }
  document.querySelector(".at").textContent = x === null ? data.axes[axis].rest : `At ${number(x)} ${label}:`;
  plots.setAttribute("aria-valuenow", String(at === null ? grid.length - 1 : at));
  plots.setAttribute("aria-valuetext", `${x === null ? "end of training" : `${number(x)} ${label}`}: ${said.join(", ") || "no values"}`);
  for (const [name, { box, xlim, ylim }] of Object.entries(pictures)) cross(name, box, xlim, ylim, x);
}

/** Draw the crosshair into one picture: a vertical, and a dot on each curve that is shown. */
function cross(name, [left, top, width, height], [x0, x1], [y0, y1], x) {
  const svg = plots.querySelector(`[data-picture="${name}"] svg`);
  svg.querySelector(".cross")?.remove();
  if (x === null) return;
  const group = svg.appendChild(document.createElementNS(NS, "g"));
  group.setAttribute("class", "cross");
  const px = left + ((x - x0) / (x1 - x0)) * width;
  const add = (tag, attributes) => {
    const element = group.appendChild(document.createElementNS(NS, tag));
    for (const [k, v] of Object.entries(attributes)) element.setAttribute(k, v);
  };
  add("line", { x1: px, x2: px, y1: top, y2: top + height });
  for (const curve of data.curves[axis]) {
    const y = hidden.has(String(curve.place)) ? null : value(curve, "mid", x);
    if (y !== null) add("circle", { cx: px, cy: top + height - ((y - y0) / (y1 - y0)) * height, r: 4, style: `fill:var(--c${(curve.place % 6) + 1})` });
  }
}

/** Move the crosshair to the point of the grid nearest to the pointer. */
function point(event) {
  const holder = event.target.closest("[data-picture]");
  if (!holder) return;
  const svg = holder.querySelector("svg");
  const { box, xlim } = data.axes[axis].pictures[holder.dataset.picture];
  const frame = svg.getBoundingClientRect();
  const unit = (event.clientX - frame.left) * (svg.viewBox.baseVal.width / frame.width);
  const x = xlim[0] + ((unit - box[0]) / box[2]) * (xlim[1] - xlim[0]);
  const { grid } = data.axes[axis];
  at = grid.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(grid[best] - x) ? i : best), 0);
  show();
}

function steer(event) {
  const last = data.axes[axis].grid.length - 1;
  const now = at === null ? last : at;
  const moves = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: last };
  if (event.key === "Escape") at = null;
  else if (event.key in moves) at = Math.min(Math.max(moves[event.key], 0), last);
  else return;
  event.preventDefault();
  show();
}

function curves() {
  if (!plots || !data.axes.budget) return;
  const range = () => plots.setAttribute("aria-valuemax", String(data.axes[axis].grid.length - 1));
  for (const [k, v] of Object.entries({ role: "slider", tabindex: "0", "aria-valuemin": "0", "aria-label": "Crosshair on the learning curves" })) plots.setAttribute(k, v);
  range();
  plots.addEventListener("pointermove", point);
  plots.addEventListener("pointerdown", point);
  plots.addEventListener("pointerleave", (e) => {
    if (e.pointerType === "mouse") { at = null; show(); } // after a tap the crosshair stays
  });
  plots.addEventListener("keydown", steer);
  for (const key of keys) {
    const { place } = key.dataset;
    const dim = (on) => all(".series", plots).forEach((s) => s.classList.toggle("dim", on && !s.classList.contains(`s${place}`)));
    key.addEventListener("click", () => {
      if (!hidden.delete(place)) hidden.add(place);
      key.setAttribute("aria-pressed", String(!hidden.has(place)));
      all(`.series.s${place}`, plots).forEach((s) => s.classList.toggle("off", hidden.has(place)));
      show();
    });
    key.addEventListener("pointerenter", (e) => e.pointerType === "mouse" && !hidden.has(place) && dim(true));
    key.addEventListener("pointerleave", () => dim(false));
  }
  const choices = all(".switch button");
  for (const choice of choices) {
    choice.addEventListener("click", () => {
      axis = choice.dataset.axis;
      at = null;
      for (const c of choices) c.setAttribute("aria-pressed", String(c === choice));
      for (const p of all("[data-axis-of]", plots)) p.hidden = p.dataset.axisOf !== axis;
      range();
      show();
    });
  }
  show();
}

// --------------------------------------------------------------------------------------------------------------- tables
/** What a cell sorts by: its number, its text, or null where nothing is known (always last). */
function sortKey(row, column) {
  const cell = row.cells[column];
  const given = cell.dataset.v;
  if (given === undefined) return cell.textContent.trim().toLowerCase();
  return given === "" ? null : Number(given);
}

function sortable(table) {
  const heads = all("thead th", table);
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button?.addEventListener("click", () => {
      const first = head.dataset.first || "ascending"; // scores start with the best
      const now = head.getAttribute("aria-sort");
      const next = now === first ? (first === "ascending" ? "descending" : "ascending") : first;
      for (const h of heads) h.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => [sortKey(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

/** Inputs and selects with data-for filter the rows of that table; data-key names a row's attribute, otherwise its name. */
function filterable(tools) {
  const table = document.getElementById(tools.dataset.for);
  const rows = [...table.tBodies[0].rows];
  const fields = all("input, select", tools);
  const count = tools.querySelector("output");
  const apply = () => {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !fields.every((field) => {
        const wanted = field.value.trim().toLowerCase();
        const has = (row.dataset[field.dataset.key] || "").toLowerCase();
        return !wanted || (field.tagName === "SELECT" ? has === wanted : has.includes(wanted));
      });
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown === rows.length ? "" : `${shown} of ${rows.length}`;
  };
  for (const field of fields) field.addEventListener("input", apply);
  apply(); // a reloaded page keeps what was typed
}

curves();
all("table.sortable").forEach(sortable);
all(".tools[data-for]").forEach(filterable);
