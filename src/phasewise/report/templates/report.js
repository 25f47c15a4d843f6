"use strict";
// The page is whole without this: it adds tooltips, sorting and a switch of the theme.

const tip = document.getElementById("tip");

function showTip(target, x, y) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? Math.max(8, y - height - 12) : y + 18}px`;
}

document.addEventListener("pointermove", (event) => {
  const target = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
  if (target) showTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  const target = event.target.closest("[data-tip]");
  if (!target) return;
  const box = target.getBoundingClientRect();
  showTip(target, box.left, box.bottom - 12);
});
for (const name of ["focusout", "scroll"]) document.addEventListener(name, () => { tip.hidden = true; }, true);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function sortBy(header) {
  const body = header.closest("table").tBodies[0];
  const column = header.cellIndex;
  const key = (row) => row.cells[column].dataset.sort;
  const isNumber = header.classList.contains("number");
  // Numbers start with the largest, names with the first.
  const descending = header.ariaSort === "none" ? isNumber : header.ariaSort === "ascending";
  const rows = [...body.rows].sort((a, b) => (isNumber ? key(a) - key(b) : key(a).localeCompare(key(b))));
  for (const other of header.parentNode.cells) other.ariaSort = "none";
  header.ariaSort = descending ? "descending" : "ascending";
  body.append(...(descending ? rows.reverse() : rows));
}

for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
