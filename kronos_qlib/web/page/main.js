// The page: its tabs, theme and language, and what every tab needs.
import {get} from "./api.js";
import {element, find, keep} from "./dom.js";
import * as data from "./data.js";
import * as forecast from "./forecast.js";
import * as ledger from "./ledger.js";
import * as market from "./market.js";
import * as runs from "./runs.js";
import {language, text, writeTexts} from "./strings.js";

const TABS = ["forecast", "market", "runs", "ledger", "data"];
let stores = [], uploads = false, started = false;

export function alertOf(error) {
  const place = find("alert");
  place.textContent = error ? error.message : "";
  place.hidden = !error;
}

// Wrap a handler: its error is shown above the page.
export const told = handler => async event => {
  alertOf(null);
  try { await handler(event); } catch (error) { alertOf(error); }
};

export async function sources() {
  const files = uploads ? await get("uploads") : [], chosen = find("source").value;
  find("source").replaceChildren(...stores.map(store => element("option", {value: store.name}, store.name)), ...files.map(file => element("option", {value: file.id}, file.name)));
  if ([...find("source").options].some(option => option.value === chosen)) find("source").value = chosen;
}

export function openTab(name) {
  for (const each of TABS) {
    const tab = find(`tab-${each}`), chosen = each === name;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    find(`panel-${each}`).hidden = !chosen;
  }
  if (!location.hash.startsWith(`#${name}`)) history.replaceState(null, "", `#${name}`);
  const opens = {market, runs, ledger, data}[name];
  if (opens && started) told(opens.open)();
  if (name === "forecast") window.dispatchEvent(new Event("resize"));
}

function keys(event) {
  const own = TABS.findIndex(name => find(`tab-${name}`) === document.activeElement), shown = TABS.filter(name => !find(`tab-${name}`).hidden);
  const place = shown.indexOf(TABS[own]), to = {ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: shown.length - 1}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const name = shown[(to + shown.length) % shown.length];
  openTab(name);
  find(`tab-${name}`).focus();
}

function choices() {
  const root = document.documentElement;
  find("theme").value = root.dataset.chosen;
  find("theme").addEventListener("change", told(async () => {
    root.dataset.chosen = find("theme").value;
    root.dispatchEvent(new Event("themechange"));
    keep("theme", find("theme").value);
    await forecast.redraw();
  }));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", told(forecast.redraw));
  find("language").value = language();
  find("language").addEventListener("change", told(async () => {
    root.lang = find("language").value;
    keep("language", find("language").value);
    writeTexts();
    for (const each of [market, runs, ledger, data]) await each.show();
    await forecast.show();
  }));
}

async function begin() {
  writeTexts();
  choices();
  for (const name of TABS) find(`tab-${name}`).addEventListener("click", () => openTab(name));
  find("tabs").addEventListener("keydown", keys);
  const wanted = location.hash.slice(1).split("/")[0];
  const hash = location.hash;
  openTab(wanted === "market" ? wanted : "forecast");
  const health = await get("health");
  uploads = health.uploads;
  find("tab-runs").hidden = !health.runs;
  find("tab-ledger").hidden = !health.ledger;
  const models = await get("models");
  stores = await get("stores");
  for (const id of ["model", "market-model"]) find(id).replaceChildren(...models.map(model => element("option", {value: model.name}, model.name)));
  find("lookback").max = health.limits.lookback;
  find("horizon").max = health.limits.horizon;
  find("samples").max = health.limits.samples;
  await sources();
  market.start(stores, health);
  runs.start();
  ledger.start();
  data.start(stores, health);
  started = true;
  if (TABS.includes(wanted) && !find(`tab-${wanted}`).hidden) openTab(wanted);
  if (hash.startsWith("#forecast/")) history.replaceState(null, "", hash);
  document.documentElement.dataset.ready = "true";
  await forecast.start(health);
}

told(begin)();
