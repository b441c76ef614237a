// Tables that sort, fold and export as CSV, and charts whose points show their figures. Without this script the page
// shows every row of every table, and the browser shows the title of a point below the pointer.
"use strict";

const ROWS_SHOWN = 10;
const FOLDS_FROM = 13; // a table with fewer rows is short enough

// Tables

function textOf(cell) {
  const copy = cell.cloneNode(true);
  for (const line of copy.querySelectorAll("br")) line.replaceWith("; ");
  return copy.textContent.replace(/\s+/g, " ").trim();
}

function figureOf(cell) {
  return cell.querySelector("data");
}

function valueOf(cell) {
  const figure = figureOf(cell);
  const text = figure ? figure.value : textOf(cell);
  if (text === "–" || text === "unavailable" || text === "") return null;
  return Number.isNaN(Number(text)) ? text : Number(text);
}

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  if (typeof one === "number") return -1;
  if (typeof other === "number") return 1;
  return one.localeCompare(other, undefined, { numeric: true });
}

function sorted(rows, column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  const keyed = rows.map((row) => [valueOf(row.cells[column]), row]);
  const known = keyed.filter(([key]) => key !== null).sort(([one], [other]) => sign * compare(one, other));
  return [...known, ...keyed.filter(([key]) => key === null)].map(([, row]) => row); // without a value: last
}

function sortOnClick(table) {
  const [body] = table.tBodies;
  const rows = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const next = { ascending: "descending", descending: null };
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const direction = before ? next[before] : "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      if (direction) heading.setAttribute("aria-sort", direction);
      body.append(...(direction ? sorted(rows, column, direction) : rows));
    });
  });
}

function makeButton(words, label) {
  const button = document.createElement("button");
  button.textContent = words;
  if (label) button.setAttribute("aria-label", label);
  return button;
}

function foldButton(table) {
  const all = `Show all ${table.tBodies[0].rows.length} rows`;
  const button = makeButton(all);
  table.classList.add("folded");
  button.setAttribute("aria-controls", table.id);
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => {
    const folded = table.classList.toggle("folded");
    button.setAttribute("aria-expanded", String(!folded));
    button.textContent = folded ? all : `Show the first ${ROWS_SHOWN} rows`;
  });
  return button;
}

// CSV by RFC 4180. A text that a spreadsheet would take for a formula is quoted with an apostrophe.
function quoted(content) {
  const text = /^[=+\-@]/.test(content) && Number.isNaN(Number(content)) ? `'${content}` : content;
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function columnsOf(title, cells) {
  const figures = cells.map(figureOf);
  const columns = [[title, ...cells.map((cell, row) => (figures[row] ? figures[row].value : textOf(cell)))]];
  for (const end of ["low", "high"]) {
    if (figures.some((figure) => figure?.dataset[end])) {
      columns.push([`${title}, ${end}`, ...figures.map((figure) => figure?.dataset[end] ?? "")]);
    }
  }
  if (figures.some((figure) => figure?.textContent.startsWith("~"))) {
    const marks = figures.map((figure) => (figure ? (figure.textContent.startsWith("~") ? "yes" : "no") : ""));
    columns.push([`${title}, estimated`, ...marks]);
  }
  return columns;
}

function csvOf(table) {
  const rows = [...table.tBodies[0].rows, ...(table.tFoot?.rows ?? [])];
  const columns = [...table.tHead.rows[0].cells].flatMap((heading, column) =>
    columnsOf(textOf(heading), rows.map((row) => row.cells[column])),
  );
  const lines = columns[0].map((_, line) => columns.map((column) => quoted(column[line])).join(","));
  return lines.map((line) => `${line}\r\n`).join("");
}

function exportButton(table) {
  const caption = textOf(table.caption);
  const button = makeButton("Download CSV", `Download CSV: ${caption}`);
  button.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(["\ufeff", csvOf(table)], { type: "text/csv" }));
    link.download = `${caption.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "")}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  return button;
}

document.querySelectorAll("main table").forEach((table, number) => {
  table.id ||= `table-${number + 1}`;
  sortOnClick(table);
  const tools = document.createElement("div");
  tools.className = "tools";
  if (table.tBodies[0].rows.length >= FOLDS_FROM) tools.append(foldButton(table));
  tools.append(exportButton(table));
  table.closest(".scroll").after(tools);
});

// Charts: one stop of the keyboard each, arrow keys go from point to point

const bubble = document.createElement("div");
bubble.className = "bubble";
bubble.hidden = true;
bubble.setAttribute("aria-hidden", "true"); // a screen reader has the label of the point
document.body.append(bubble);

function show(point) {
  const box = point.getBoundingClientRect();
  bubble.textContent = point.getAttribute("aria-label");
  bubble.hidden = false;
  const left = box.left + box.width / 2 - bubble.offsetWidth / 2;
  bubble.style.left = `${scrollX + Math.max(8, Math.min(left, document.documentElement.clientWidth - bubble.offsetWidth - 8))}px`;
  bubble.style.top = `${scrollY + (box.top > bubble.offsetHeight + 12 ? box.top - bubble.offsetHeight - 6 : box.bottom + 6)}px`;
}

function hide() {
  bubble.hidden = true;
}

function step(points, from, key) {
  const last = points.length - 1;
  const places = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1, Home: 0, End: last };
  return key in places ? Math.max(0, Math.min(places[key], last)) : null;
}

// A chart may have a wide form and one for phones; each has its own points.
for (const chart of document.querySelectorAll("figure svg")) {
  const points = [...chart.querySelectorAll(".point")];
  points.forEach((point, number) => {
    point.querySelector("title")?.remove(); // the bubble replaces it
    point.setAttribute("tabindex", number ? "-1" : "0");
    point.addEventListener("pointerenter", () => show(point));
    point.addEventListener("pointerleave", hide);
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
    point.addEventListener("keydown", (event) => {
      const place = step(points, number, event.key);
      if (place === null) return;
      event.preventDefault();
      point.setAttribute("tabindex", "-1");
      points[place].setAttribute("tabindex", "0");
      points[place].focus();
    });
  });
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
});
