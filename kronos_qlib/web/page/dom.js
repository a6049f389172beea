// Elements, made of text: nothing that came from elsewhere is ever read as HTML.
export const find = id => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value === "boolean") made[name] = value;
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child !== null && child !== undefined).map(child => child instanceof Node ? child : String(child)));
  return made;
}

export function table(heads, rows) {
  const head = element("tr", {}, ...heads.map(text => text instanceof Node ? text : element("th", {scope: "col"}, text)));
  const body = rows.map(cells => cells instanceof Node ? cells : element("tr", {}, ...cells.map((cell, place) =>
    cell instanceof HTMLTableCellElement ? cell : element(place ? "td" : "th", place ? {} : {scope: "row"}, cell))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

// A part that scrolls by itself, and can be scrolled by the keyboard.
export const region = (label, ...children) => element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": label}, ...children);

// What a browser keeps for this page, where it keeps anything.
export const keep = (name, value) => { try { localStorage.setItem(name, value); } catch { /* no storage */ } };
export const kept = name => { try { return localStorage.getItem(name); } catch { return null; } };

export function sparkline(values) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const low = Math.min(...values), spread = Math.max(...values) - low || 1;
  const points = values.map((value, place) => `${(96 * place / Math.max(values.length - 1, 1)).toFixed(1)},${(22 - 20 * (value - low) / spread).toFixed(1)}`);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  made.setAttribute("class", "spark");
  made.setAttribute("viewBox", "0 0 96 24");
  made.setAttribute("aria-hidden", "true");
  line.setAttribute("points", points.join(" "));
  made.append(line);
  return made;
}

const finite = value => typeof value === "number" && Number.isFinite(value);
export const percent = (value, digits = 1) => finite(value) ? `${(100 * value).toFixed(digits)} %`.replace("-", "−") : "–";
export const signed = (value, digits = 2) => finite(value) ? `${value >= 0 ? "+" : "−"}${Math.abs(100 * value).toFixed(digits)} %` : "–";
// So many significant digits, and all of an integer's.
export const number = (value, digits = 6) => finite(value) ? value.toLocaleString(document.documentElement.lang, {maximumSignificantDigits: digits, maximumFractionDigits: 0, roundingPriority: "morePrecision"}).replace("-", "−") : "–";

export function save(name, content, type = "text/csv") {
  const address = URL.createObjectURL(new Blob([content], {type}));
  const link = element("a", {href: address, download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

// A cell that no spreadsheet takes for a formula.
export function csv(rows) {
  const cell = value => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value !== "number" && /^\s*[=+\-@]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map(row => row.map(cell).join(",")).join("\r\n") + "\r\n";
}
