// The tab Ledger: what was forecast, what came, and what the record is worth.
import {get, jobs} from "./api.js";
import {element, find, number, percent, region, signed, table} from "./dom.js";
import {told} from "./main.js";
import {text} from "./strings.js";

let ledger = null, judged = {}; // with paper portfolios, which the ledger alone has not
const work = jobs(find("record-progress"));

async function openSet(id) {
  const found = await get(`ledger/${id}`);
  const heads = [text("instrument"), text("inMarket"), text("ownScore"), text("probUp"), text("median"), "5 %", "95 %", text("whatCame")];
  find("set").replaceChildren(element("h2", {}, `${found.experiment}, ${found.date}`), region(found.experiment, table(heads, found.rows.map(row =>
    [row.instrument, number(row.rank), number(row.score, 4), percent(row.prob_up, 0), signed(row.q50), signed(row.q05), signed(row.q95), signed(row.came)]))));
  find("set").scrollIntoView({block: "nearest"});
}

export function show() {
  if (!ledger) return;
  find("ledger-state").textContent = ledger.sets.length ? ledger.name : text("emptyLedger");
  find("verdicts").replaceChildren(...ledger.judgements.flatMap(each => each.sentences).map(sentence => element("li", {}, sentence)));
  const heads = [text("experiment"), text("kind"), text("dates"), text("days"), text("rankIc"), "50 %", "90 %", text("crps"), text("paperExcess"), text("paperCost")];
  find("judgements").replaceChildren(table(heads, ledger.judgements.map(each =>
    [each.experiment, text(each.kind), number(each.dates), number(each.days), number(each.rank_ic, 3), percent(each.coverage_50, 0), percent(each.coverage_90, 0), percent(each.crps, 2), signed(each.paper_excess), percent(each.paper_cost, 2)])));
  find("sets").replaceChildren(table([text("date"), text("experiment"), text("kind"), text("made"), text("horizon"), text("instruments"), text("arrived"), text("openSet")], ledger.sets.map(set =>
    [set.date, set.experiment, text(set.live ? "live" : "simulated"), set.made_at, number(set.horizon ?? NaN), number(set.instruments), number(set.came),
      element("td", {}, element("button", {type: "button", class: "plain", "aria-label": `${text("openSet")} ${set.experiment} ${set.date}`, onclick: told(() => openSet(set.id))}, text("openSet")))])));
}

// What came is filled in, and the record judged with its paper portfolios.
async function update() {
  find("record").disabled = true;
  try {
    const found = await work.ask("records", {});
    if (!found) return;
    judged = {judgements: found.judgements};
    ledger = {...await get("ledger"), ...judged};
    show();
    find("ledger-state").textContent = text("filled", found.updated.labels + found.updated.returns, found.updated.waiting);
  } finally { find("record").disabled = false; }
}

export function start() {
  find("record").addEventListener("click", told(update));
}

export async function open() {
  if (find("record").disabled) return; // it is being judged
  ledger = {...await get("ledger"), ...judged};
  show();
}
