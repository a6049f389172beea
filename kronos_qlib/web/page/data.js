// The tab Data: users' files and what was found in them; the health of a store.
import {get, jobs, remove} from "./api.js";
import {drawCoverage} from "./chart.js";
import {element, find, number, region, table} from "./dom.js";
import {ask, takeFiles, upload} from "./forecast.js";
import {openTab, sources, told} from "./main.js";
import {text} from "./strings.js";

let files = null, stores = [], offered = false;
const work = jobs(find("check-progress"));

function describe(file) {
  const parts = [element("ul", {class: "findings"}, ...file.findings.map(each => element("li", {}, each)))];
  if (file.rejected) parts.push(element("p", {class: "bad"}, `${text("rejected")}: ${file.rejected}`), region(text("rejected"), table([text("line"), text("reason")], file.examples.map(each => [each.line, element("td", {class: "text"}, each.reason)]))));
  return element("details", {"data-id": file.id}, element("summary", {}, `${file.name} · ${number(file.bars)} ${text("bars")} · ${file.instruments.slice(0, 5).join(", ")}${file.instruments.length > 5 ? ", …" : ""} · ${file.first.slice(0, 10)} … ${file.last.slice(0, 10)}`), ...parts,
    element("div", {class: "actions"}, element("button", {type: "button", onclick: told(() => check(file.id)), "aria-label": `${text("check")} ${file.name}`}, text("checkFile")), element("button", {type: "button", onclick: told(async () => { openTab("forecast"); await ask({source: file.id, instrument: file.instruments[0], at: null}); })}, text("use")),
      element("button", {type: "button", onclick: told(async () => { await remove(`uploads/${file.id}`); await sources(); await open(); })}, text("remove"))));
}

async function check(name) {
  const found = await work.ask("checks", {source: name}), place = element("div", {});
  if (!found) return;
  find("check-state").textContent = text("checked", found.store, found.errors);
  const ingested = found.ingest ? [element("h3", {}, text("ingested", found.store)), element("ul", {class: "findings"}, ...found.ingest.map(each => element("li", {}, each)))] : [];
  find("check").replaceChildren(...ingested, place, region(text("finding"), table([text("subject"), text("level"), text("finding"), text("examples")], found.findings.map(each =>
    [each.subject, element("td", {class: each.level === "ok" ? "" : "bad"}, each.level), element("td", {class: "text"}, each.text), element("td", {class: "text"}, each.examples.slice(0, 2).join("; "))]))));
  await drawCoverage(place, found.coverage);
}

export function show() {
  const opened = new Set([...document.querySelectorAll("#uploads details[open]")].map(each => each.dataset.id));
  if (files) find("uploads").replaceChildren(...(files.length ? files.map(describe) : [element("p", {class: "quiet"}, text("noUploads"))]));
  for (const each of document.querySelectorAll("#uploads details")) each.open = opened.has(each.dataset.id);
  find("stores").replaceChildren(table([text("store"), text("barsHeld"), text("instruments"), text("universes"), text("firstBar"), text("lastBar"), text("check")], stores.map(store =>
    [store.name, store.freqs.join(", "), number(store.instruments), store.universes.join(", "), store.first, store.last, element("td", {}, element("button", {type: "button", onclick: told(() => check(store.name)), "aria-label": `${text("check")} ${store.name}`}, text("check")))])));
}

export async function open() {
  show();
  if (!offered) return;
  files = await get("uploads");
  show();
}

export function start(given, health) {
  stores = given;
  offered = health.uploads;
  find("data-drop").hidden = !health.uploads;
  takeFiles(find("data-drop"), find("data-file"), told(async file => {
    find("data-state").textContent = text("uploading");
    try {
      const found = await upload(file, health.limits.upload_bytes);
      find("data-state").textContent = text("uploaded", found.name, number(found.bars), found.instruments.length);
      await sources();
      await open();
      find("uploads").querySelector("details").open = true;
    } catch (error) { find("data-state").textContent = ""; throw error; }
  }));
}
