// The tab Market: a universe ranked, filtered, sorted; a watchlist; a click leads to the forecast.
import {get, jobs} from "./api.js";
import {csv, element, find, keep, kept, number, percent, save, signed, sparkline} from "./dom.js";
import {openTab, told} from "./main.js";
import {ask} from "./forecast.js";
import {text} from "./strings.js";

const COLUMNS = [["rank", "inMarket"], ["instrument", "instrument"], ["score", "score"], ["prob_up", "probUp"], ["median", "median"], ["range_50", "range50"], ["range_90", "range90"], ["last_close", "lastClose"]];
const WATCHLIST = "*watchlist";
let answer = null, runs = [], offered = false, order = ["rank", 1];
const watched = new Set(JSON.parse(kept("watchlist") || "[]"));

const work = jobs(find("market-progress"), status => {
  find("market-cancel").disabled = !["queued", "running"].includes(status.state);
  find("market-state").textContent = status.state === "queued" ? text("queued", status.place ?? 0) : status.state === "done" ? "" : text(status.state);
});
const value = (row, name) => Array.isArray(row[name]) ? row[name][0] : row[name];

function rows() {
  const wanted = find("filter").value.trim().toUpperCase();
  const found = answer.rows.filter(row => row.instrument.includes(wanted) && (!find("watched").checked || watched.has(row.instrument)));
  const [name, way] = order;
  return found.sort((one, other) => way * (value(one, name) < value(other, name) ? -1 : value(one, name) > value(other, name) ? 1 : 0));
}

function line(row) {
  const pair = range => range ? range.map(each => signed(each, 1)).join(" … ") : "–";
  const star = element("input", {type: "checkbox", "aria-label": text("watch", row.instrument), onchange: event => { event.target.checked ? watched.add(row.instrument) : watched.delete(row.instrument); keep("watchlist", JSON.stringify([...watched])); }});
  star.checked = watched.has(row.instrument);
  const open = element("button", {type: "button", class: "plain", onclick: told(async () => {
    openTab("forecast");
    const {question} = answer; // as it was asked, whatever the form says now
    await ask({source: answer.store, instrument: row.instrument, at: answer.date, ...(answer.run ? {} : {model: answer.model, lookback: answer.seen, horizon: answer.horizon, samples: question.samples})});
  })}, row.instrument);
  return element("tr", row.rank <= answer.top ? {class: "top"} : {}, element("td", {}, row.rank), element("th", {scope: "row", class: "text"}, star, " ", open), element("td", {}, answer.run ? number(row.score, 4) : signed(row.score)), element("td", {}, percent(row.prob_up, 0)),
    element("td", {}, signed(row.median)), element("td", {}, pair(row.range_50)), element("td", {}, pair(row.range_90)), element("td", {}, number(row.last_close)), element("td", {}, sparkline(row.sparkline)));
}

export function show() {
  find("market-model").querySelector("optgroup")?.setAttribute("label", text("finishedRuns"));
  if (!answer) return;
  find("market-state").textContent = [text("ranked", answer.rows.length, answer.date, answer.run ?? answer.model), answer.ledger ? text("kept", answer.ledger.set, text(answer.ledger.live ? "live" : "simulated")) : ""].join(" ");
  find("market-filters").hidden = false;
  const heads = COLUMNS.map(([name, label]) => element("th", {scope: "col", class: name === "instrument" ? "text" : null, "aria-sort": order[0] === name ? (order[1] > 0 ? "ascending" : "descending") : null},
    element("button", {type: "button", id: `sort-${name}`, onclick: () => { order = [name, order[0] === name ? -order[1] : ["rank", "instrument"].includes(name) ? 1 : -1]; show(); find(`sort-${name}`).focus(); }}, text(answer.run && name === "score" ? "ownScore" : label), order[0] === name ? (order[1] > 0 ? " ↑" : " ↓") : "")));
  heads.push(element("th", {scope: "col"}, text("recent")));
  find("market-table").replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows().map(line))));
  find("market-notes").replaceChildren(...answer.notes.map(note => element("li", {}, note)));
  const left = find("left-out");
  left.hidden = !answer.left_out.length;
  left.querySelector("ul").replaceChildren(...answer.left_out.map(each => element("li", {}, each)));
}

// Choose what was chosen before, where it is still there.
function choose(list, value) {
  if ([...list.options].some(option => option.value === value)) list.value = value;
}

const run = () => runs.find(each => each.id === find("market-model").value);

// A finished run ranks its own universe, with its own settings.
function lock() {
  for (const id of ["universe", "market-lookback", "market-horizon", "market-samples"]) find(id).disabled = Boolean(run());
}

async function rank() {
  const question = {store: find("market-store").value, at: find("market-at").value.trim() || null}, top = Number(find("top").value);
  if (run()) question.run = run().id;
  else {
    Object.assign(question, {model: find("market-model").value || null, top});
    if (find("universe").value !== WATCHLIST) question.universe = find("universe").value;
    else if (watched.size) question.instruments = [...watched];
    else throw new Error(text("noWatchlist"));
    for (const name of ["lookback", "horizon", "samples"]) question[name] = Number(find(`market-${name}`).value);
  }
  const found = await work.ask(run() ? "signals" : "market", question);
  if (!found) return;
  answer = {...found, question, top};
  show();
}

export async function open() {
  if (!offered) return;
  runs = await get("runs");
  const chosen = find("market-model").value, group = element("optgroup", {label: text("finishedRuns")}, ...runs.map(each => element("option", {value: each.id}, `${each.experiment} · ${each.start.slice(0, 10)} · ${each.id.slice(0, 8)}`)));
  find("market-model").querySelector("optgroup")?.remove();
  if (runs.length) find("market-model").append(group);
  choose(find("market-model"), chosen);
  lock();
}

export function start(stores, health) {
  offered = health.runs;
  const universes = () => {
    const store = stores.find(each => each.name === find("market-store").value), chosen = find("universe").value;
    find("universe").replaceChildren(...(store?.universes || []).map(name => element("option", {value: name}, name)), element("option", {value: WATCHLIST, "data-text": "ownList"}, text("ownList")));
    choose(find("universe"), chosen);
  };
  find("market-store").replaceChildren(...stores.map(store => element("option", {value: store.name}, store.name)));
  find("market-store").addEventListener("change", universes);
  universes();
  find("market-form").addEventListener("submit", told(async event => { event.preventDefault(); await rank(); }));
  find("market-cancel").addEventListener("click", told(work.cancel));
  for (const id of ["filter", "watched"]) find(id).addEventListener("input", show);
  find("market-csv").addEventListener("click", () => save(`${answer.store}-${answer.date}.csv`, csv([["rank", "instrument", "score", "prob_up", "median", "q25", "q75", "q05", "q95", "last_close"],
    ...rows().map(row => [row.rank, row.instrument, row.score, row.prob_up, row.median, ...(row.range_50 ?? [null, null]), ...(row.range_90 ?? [null, null]), row.last_close])])));
  find("market-model").addEventListener("change", lock);
}
