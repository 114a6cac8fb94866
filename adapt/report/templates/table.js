"use strict";
// Sorts and filters the tables of the page; without it they are plain tables.

const NUMBER = /^-?[\d,.]+(e[+-]?\d+)?(?=$|[\s–±])/;

function numberOf(cell) {
  const found = NUMBER.exec(cell.textContent.trim());
  return found ? parseFloat(found[0].replaceAll(",", "")) : NaN;
}

function isUnknown(cell) {
  return ["–", ""].includes(cell.textContent.trim());
}

function sortBy(table, header, direction) {
  const body = table.tBodies[0], column = header.cellIndex;
  const rows = [...body.rows], known = rows.filter((row) => !isUnknown(row.cells[column]));
  const isNumeric = column > 0 && known.every((row) => !Number.isNaN(numberOf(row.cells[column])));
  const order = direction || (isNumeric ? "descending" : "ascending");
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => isNumeric
    ? numberOf(a.cells[column]) - numberOf(b.cells[column])
    : a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", { numeric: true });
  known.sort((a, b) => sign * compare(a, b));
  body.append(...known, ...rows.filter((row) => isUnknown(row.cells[column])));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", order);
}

function makeSortable(table) {
  for (const header of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const opposite = { ascending: "descending", descending: "ascending" };
      sortBy(table, header, opposite[header.getAttribute("aria-sort")]);
    });
  }
}

function makeFilterable(filters, table) {
  const text = filters.querySelector("input"), kind = filters.querySelector("select");
  const count = filters.querySelector("output"), rows = [...table.tBodies[0].rows];
  const update = () => {
    const words = text.value.toLowerCase().split(/\s+/), wanted = kind ? kind.value : "";
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word)) || (wanted !== "" && row.dataset.kind !== wanted);
    }
    const n = rows.filter((row) => !row.hidden).length;
    count.textContent = n === rows.length ? "" : `${n} of ${rows.length}`;
  };
  text.addEventListener("input", update);
  if (kind) kind.addEventListener("change", update);
  filters.hidden = false;
}

for (const table of document.querySelectorAll("table.sortable")) {
  makeSortable(table);
  const filters = table.closest(".scroll").previousElementSibling;
  if (filters && filters.classList.contains("filters")) makeFilterable(filters, table);
}
