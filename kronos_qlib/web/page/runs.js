// The tab Runs: finished runs, and the report of those that are chosen, in a frame that may do nothing but show it.
import {follow, get, post} from "./api.js";
import {element, find, number, table} from "./dom.js";
import {told} from "./main.js";
import {text} from "./strings.js";

let runs = null;

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
  const given = await post("comparisons", {names}), bar = find("runs-progress");
  try {
    await follow("comparisons", given.id, status => {
      bar.hidden = !["queued", "running"].includes(status.state);
      bar.value = status.progress;
      find("runs-state").textContent = bar.hidden ? "" : status.state === "queued" ? text("queued", status.place ?? 0) : "…";
    });
    const address = `/api/comparisons/${given.id}/report`;
    find("report").replaceChildren(
      element("p", {}, element("a", {href: address, target: "_blank", rel: "noopener"}, text("openReport"))),
      element("iframe", {src: address, sandbox: "allow-scripts", title: text("report")}));
  } finally { bar.hidden = true; find("runs-state").textContent = ""; }
}

export async function open() {
  runs = await get("runs");
  await show();
}

export function start() {
  find("runs-form").addEventListener("submit", told(async event => { event.preventDefault(); await compare(); }));
}
