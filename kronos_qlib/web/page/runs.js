// The tab Runs: finished runs, and the report of those that are chosen, in a frame that may do nothing but show it.
import {get, jobs} from "./api.js";
import {element, find, number, table} from "./dom.js";
import {told} from "./main.js";
import {text} from "./strings.js";

let runs = null, comparison = null;
const work = jobs(find("runs-progress"), status => {
  comparison = status.id ?? null;
  find("runs-state").textContent = status.state === "queued" ? text("queued", status.place ?? 0) : "";
});

export async function show() {
  if (!runs) return;
  const heads = [text("experiment"), text("started"), text("recorder"), "IC", text("rankIc"), text("choose")];
  const chosen = new Set([...document.querySelectorAll("#runs-table input:checked")].map(each => each.value));
  find("runs-table").replaceChildren(table(heads, runs.map(run => {
    const box = element("input", {type: "checkbox", value: run.id, "aria-label": `${text("choose")} ${run.experiment} ${run.id.slice(0, 8)}`});
    box.checked = chosen.has(run.id);
    return [run.experiment, run.start, run.id.slice(0, 8), number(run.metrics.ic ?? NaN, 3), number(run.metrics.rank_ic ?? NaN, 3), element("td", {}, box)];
  })));
}

async function compare() {
  const names = [...document.querySelectorAll("#runs-table input:checked")].map(each => each.value);
  if (!names.length) throw new Error(text("chooseRuns"));
  if (!await work.ask("comparisons", {names})) return;
  const address = `/api/comparisons/${comparison}/report`;
  find("report").replaceChildren(
    element("p", {}, element("a", {href: address, target: "_blank", rel: "noopener"}, text("openReport"))),
    element("iframe", {src: address, sandbox: "allow-scripts", title: text("report")}));
}

export async function open() {
  runs = await get("runs");
  await show();
}

export function start() {
  find("runs-form").addEventListener("submit", told(async event => { event.preventDefault(); await compare(); }));
}
