"""The style and the script of the HTML page: two columns where there is room, tables that can be sorted and copied.

Both are written into the page, which needs no other file and no network. Without a script it is the same page, less the
buttons.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 120rem; padding: 0 1rem; color: #222; }
h2 { border-top: 1px solid #ddd; padding-top: 1rem; }
.columns { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 2rem; align-items: start; }
@media (min-width: 75rem) { .columns { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.wide { grid-column: 1 / -1; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td { overflow-wrap: anywhere; min-width: 5rem; }
td:first-child { min-width: 8rem; }
img { max-width: 100%; height: auto; }
h1, h2, p, code, summary { overflow-wrap: anywhere; }
code { background: #f4f4f4; padding: 0 .2rem; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th button { font-weight: bold; text-align: inherit; }
th button::after { content: "\\2195"; color: #767676; padding-left: .3rem; }
th[aria-sort=ascending] button::after { content: "\\2191"; color: #222; }
th[aria-sort=descending] button::after { content: "\\2193"; color: #222; }
button.copy { border: 1px solid #767676; border-radius: .2rem; padding: 0 .5rem; font-size: .85rem; }
button:focus-visible { outline: 2px solid #1f77b4; outline-offset: 2px; }
@media print { button.copy { display: none; } th button::after { content: ""; } }
"""

SCRIPT = r"""
"use strict";
const UNITS = {B: 1, kB: 1e3, MB: 1e6, GB: 1e9, s: 1, min: 60, h: 3600};
const PART = /([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?)\s*(B|kB|MB|GB|s|min|h)?(?=\s|$)/y;

// A cell's number, with what its units stand for; null for another text.
function amount(text) {
  let sum = 0, at = 0;
  for (const whole = text.trim(); at < whole.length;) {
    PART.lastIndex = at;
    const found = PART.exec(whole);
    if (!found) return null;
    sum += Number(found[1].replaceAll(",", "")) * (UNITS[found[2]] ?? 1);
    at = PART.lastIndex + whole.slice(PART.lastIndex).search(/\S|$/);
  }
  return at ? sum : null;
}

// Numbers before texts before nothing, whichever way the column is sorted.
function compare(one, other, sign) {
  const texts = [one, other].map(text => text.trim());
  const empty = texts.map(text => text === "" || text === "-");
  if (empty[0] || empty[1]) return empty[0] - empty[1];
  const [a, b] = texts.map(amount);
  if (a !== null && b !== null) return sign * (a - b);
  if (a !== null || b !== null) return a === null ? 1 : -1;
  return sign * texts[0].localeCompare(texts[1], undefined, {numeric: true});
}

function sort(table, place) {
  const heads = [...table.tHead.rows[0].cells];
  const descending = heads[place].getAttribute("aria-sort") === "ascending";
  heads.forEach(head => head.setAttribute("aria-sort", "none"));
  heads[place].setAttribute("aria-sort", descending ? "descending" : "ascending");
  const sign = descending ? -1 : 1;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => compare(a.cells[place].textContent, b.cells[place].textContent, sign));
  table.tBodies[0].append(...rows);
}

// The table as it is sorted now, as lines of cells with tabs between, which spreadsheets take.
function lines(table) {
  return [...table.rows].map(row => [...row.cells].map(cell => cell.textContent.trim()).join("\t")).join("\n");
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not allowed, or a page that did not come over https
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser does not allow it");
  }
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, place));
    head.setAttribute("aria-sort", "none");
    head.append(button);
  });
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy";
  button.addEventListener("click", async () => {
    try {
      await copy(lines(table));
      button.textContent = "copied";
    } catch (error) {
      button.textContent = `not copied: ${error.message}`;
    }
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  });
  table.after(button);
}
"""
