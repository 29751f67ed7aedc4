"use strict";

const WORST = 3; // bars that are marked
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// --- Light and dark ---

const theme = byId("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function showTheme(isDark) {
  document.documentElement.style.colorScheme = isDark ? "dark" : "light";
  theme.setAttribute("aria-pressed", String(isDark));
}

theme.addEventListener("click", () => showTheme(theme.getAttribute("aria-pressed") !== "true"));
prefersDark.addEventListener("change", () => showTheme(prefersDark.matches));
showTheme(prefersDark.matches);

// --- Code to paste ---

async function copy(button) {
  const code = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = "Copied";
  } catch { // a browser that keeps the clipboard from pages opened as files
    getSelection().selectAllChildren(code);
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
}

for (const button of all(".copy")) button.addEventListener("click", () => copy(button));

// --- Filter and order ---

const ORDERS = {
  largest: (a, b) => b.dataset.value - a.dataset.value,
  smallest: (a, b) => a.dataset.value - b.dataset.value,
  model: (a, b) => a.dataset.order - b.dataset.order,
  name: (a, b) => a.dataset.module.localeCompare(b.dataset.module, "en", { numeric: true }),
};
const filters = { module: byId("filter-module"), kind: byId("filter-kind"), operand: byId("filter-operand") };
const order = byId("order");
const charts = all(".chart");
const filtered = new Set(all("#filter ~ section .chart"));
const tableRows = all("#table tbody tr");

function matches({ module, kind, operand }) {
  return module.toLowerCase().includes(filters.module.value.trim().toLowerCase())
    && (!filters.kind.value || kind === filters.kind.value)
    && (!filters.operand.value || operand === undefined || operand === filters.operand.value);
}

function updateChart(chart) {
  const list = chart.querySelector(".rows");
  const rows = [...list.children];
  if (filtered.has(chart)) rows.sort(ORDERS[order.value]);
  const matching = filtered.has(chart) ? rows.filter((row) => matches(row.dataset)) : rows;
  const first = Number(chart.dataset.first); // rows that are shown at first
  const shown = new Set(chart.dataset.all ? matching : matching.slice(0, first));
  for (const row of rows) row.hidden = !shown.has(row);
  list.append(...rows);
  chart.querySelector(".none").hidden = matching.length > 0;
  chart.querySelector(".axes").hidden = matching.length === 0;
  const more = chart.querySelector(".more");
  more.hidden = matching.length <= first;
  more.textContent = chart.dataset.all ? `Show ${first} only` : `Show all ${matching.length}`;
}

function update() {
  charts.forEach(updateChart);
  for (const row of tableRows) row.hidden = !matches(row.dataset);
  const count = tableRows.filter((row) => !row.hidden).length;
  byId("count").textContent = `${count} of ${tableRows.length} operands`;
}

for (const control of [...Object.values(filters), order]) control.addEventListener("input", update);
byId("filter").addEventListener("submit", (event) => event.preventDefault());
for (const chart of charts) {
  all(".row", chart).slice(0, WORST).forEach((row) => row.classList.add("worst"));
  chart.querySelector(".more").addEventListener("click", () => {
    chart.dataset.all = chart.dataset.all ? "" : "yes";
    updateChart(chart);
  });
}
update();

// --- Order of the table ---

function key(row, column, isNumber) {
  const cell = row.cells[column];
  if (!isNumber) return cell.textContent;
  const value = Number((cell.dataset.sort ?? cell.textContent).replace("inf", "Infinity"));
  return Number.isNaN(value) ? null : value; // null: was not measured, and comes last
}

function sortTable(header) {
  const isNumber = header.classList.contains("number");
  const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const compare = (a, b) => isNumber ? sign * (a - b) : sign * a.localeCompare(b, "en", { numeric: true });
  const keyed = tableRows.map((row) => [key(row, header.cellIndex, isNumber), row]);
  keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : compare(a, b));
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  byId("table").tBodies[0].append(...keyed.map(([, row]) => row));
}

for (const button of all("#table thead button")) {
  button.addEventListener("click", () => sortTable(button.parentElement));
}

// --- Histogram ---

const MOST_LEVELS = 40; // that are drawn from bottom to top; more would hide the bars
const histograms = JSON.parse(byId("data").textContent);
const choice = byId("choice");

function shape(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
  return element;
}

const line = (kind, x1, y1, x2, y2) => shape("line", { class: kind, x1, y1, x2, y2 });

function label(text, at, side = "") {
  const element = document.createElement("span");
  element.textContent = text;
  element.style.setProperty("--at", at);
  element.className = side;
  return element;
}

function ticks(low, high, most) {
  const power = 10 ** Math.floor(Math.log10((high - low) / most));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => (high - low) / each <= most);
  const found = [];
  for (let tick = Math.ceil(low / step); tick * step <= high; tick += 1) found.push(Number((tick * step).toPrecision(12)));
  return found;
}

function draw() {
  const { ends, counts, tails, levels, clip, caption } = histograms[choice.value];
  const [first, last] = [Math.min(ends[0], clip[0]), Math.max(ends[1], clip[1])];
  const margin = 0.05 * (last - first); // where the tails are
  const [low, high] = [first - margin, last + margin];
  const x = (value) => 100 * (value - low) / (high - low);
  const highest = Math.log10(Math.max(...counts, ...tails, 1));
  const y = (count) => 100 - 96 * (Math.log10(count) + 0.3) / (highest + 0.3); // 0.3: one value is a bar too
  const isClipped = (value) => value < clip[0] || value > clip[1];

  const bar = (count, left, right, kind) => shape("rect", {
    class: `bin ${kind}`, x: left, width: 0.92 * (right - left), y: y(count), height: 100 - y(count),
  });
  const width = (ends[1] - ends[0]) / counts.length;
  const left = (bin) => ends[0] + bin * width;
  const bars = counts.map((count, bin) => count > 0
    && bar(count, x(left(bin)), x(left(bin + 1)), isClipped(left(bin + 0.5)) ? "beyond" : "inside"));
  const tailBars = [tails[0] > 0 && bar(tails[0], 0, 3, "tail"), tails[1] > 0 && bar(tails[1], 97, 100, "tail")];
  const powers = [...Array(Math.floor(highest) + 1).keys()].map((power) => 10 ** power);
  const top = levels.length > MOST_LEVELS ? 94 : 0;
  byId("drawing").replaceChildren(
    ...powers.map((count) => line("grid", 0, y(count), 100, y(count))),
    ...[...bars, ...tailBars].filter(Boolean),
    ...levels.map((level) => line("level", x(level), top, x(level), 100)),
    ...clip.map((end) => line("clip", x(end), 0, x(end), 100)),
  );
  document.querySelector(".counts").replaceChildren(
    ...powers.map((count) => label(count.toLocaleString("en", { notation: "compact" }), 1 - y(count) / 100)),
  );
  document.querySelector(".values").replaceChildren(
    ...ticks(first, last, innerWidth < 760 ? 5 : 9).map((tick) => label(String(tick), x(tick) / 100)),
  );
  document.querySelector(".marks").replaceChildren(
    label(`clip ${Number(clip[1].toPrecision(3))}`, x(clip[1]) / 100, x(clip[1]) > 60 ? "left" : ""),
  );
  byId("caption").textContent = caption;
}

if (choice) {
  histograms.forEach(({ module, operand }, number) => choice.add(new Option(`${module} · ${operand}`, number)));
  choice.addEventListener("input", draw);
  addEventListener("resize", draw);
  draw();
  for (const button of all("[data-show]")) {
    const { module, operand } = button.closest("tr").dataset;
    button.addEventListener("click", () => {
      choice.value = histograms.findIndex((each) => each.module === module && each.operand === operand);
      draw();
      byId("histogram").scrollIntoView();
      choice.focus({ preventScroll: true });
    });
  }
}
