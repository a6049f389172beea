// The tab Forecast: a question, its progress, and the answer.
import {get, jobs, send} from "./api.js";
import {drawForecast, savePng} from "./chart.js";
import {csv, element, find, keep, kept, number, percent, save, signed, table} from "./dom.js";
import {alertOf, sources, told} from "./main.js";
import {text} from "./strings.js";

const NUMBERS = ["lookback", "horizon", "samples", "seed", "temperature", "top_p", "top_k"];
const NARROW = matchMedia("(max-width: 800px)");
const SHOWN = {paths: "show-paths", sma: "show-sma", bollinger: "show-bollinger", rsi: "show-rsi", redUp: "red-up"};
let answer = null, last = null;

function question() {
  const asked = {source: find("source").value, model: find("model").value || null, instrument: find("instrument").value.trim() || null, at: find("at").value.trim() || null};
  for (const name of NUMBERS) asked[name] = Number(find(name).value);
  return asked;
}

function fill(asked) {
  for (const name of ["source", "instrument", "at", "model", ...NUMBERS]) if (asked[name] !== null && asked[name] !== undefined) find(name).value = asked[name];
  if (asked.at === null) find("at").value = "";
}

const work = jobs(find("progress"), status => {
  state(status);
  if (status.id && !find("panel-forecast").hidden) history.replaceState(null, "", `#forecast/${status.id}`);
  if (status.partial) drawForecast({...status.partial, came: null}, choices()).catch(() => { /* the whole answer follows */ });
});

function state(status) {
  last = status;
  find("cancel").disabled = !["queued", "running"].includes(status?.state);
  if (!status) find("state").textContent = "";
  else if (status.state === "queued") find("state").textContent = text("queued", status.place ?? 0);
  else if (status.state === "done") find("state").textContent = !status.seconds ? text("known") : text("done", status.seconds.toFixed(1));
  else find("state").textContent = text(status.state);
}

async function take(found) {
  if (!found) return;
  answer = found;
  await show();
  if (NARROW.matches) find("figures").scrollIntoView();
}

export async function ask(more = {}) {
  fill(more);
  if (!find("forecast-form").reportValidity()) return;
  await take(await work.ask("forecasts", question()));
}

function card(name, value, note) {
  return element("dl", {class: "card"}, element("dt", {}, name), element("dd", {}, value), note ? element("dd", {class: "note"}, note) : null);
}

function cards() {
  const figures = answer.figures, steps = answer.times.length, pair = range => range ? range.map(value => signed(value, 1).replace(" ", "\u00A0")).join(" … ") : "–";
  const made = [
    card(text("probUp"), percent(figures.prob_up, 0), text("probUpNote", steps)),
    card(text("expected"), signed(figures.median_return), text("expectedNote", steps)),
    card(text("range50"), pair(figures.range_50), text("rangeNote", steps)),
    card(text("range90"), pair(figures.range_90), text("rangeNote", steps)),
  ];
  if (figures.error !== undefined) made.push(
    card(text("came"), signed(figures.came_return), text("cameNote", figures.came)),
    card(text("error"), percent(figures.error, 2), text("errorNote", percent(figures.error_last_value, 2))),
    card(text("coverage"), `${percent(figures.coverage_50, 0)} / ${percent(figures.coverage_90, 0)}`, text("coverageNote", `${percent(figures.coverage_50_volatility, 0)} / ${percent(figures.coverage_90_volatility, 0)}`)),
    card(text("crps"), percent(figures.crps, 2), text("crpsNote", percent(figures.crps_last_value, 2), percent(figures.crps_volatility, 2))));
  return made;
}

const rows = () => answer.times.map((time, step) => [time, ...["q50", "q25", "q75", "q05", "q95"].map(name => answer.quantiles[name][step]), answer.prob_up[step], answer.low[step], answer.high[step],
  answer.came ? answer.came.close[answer.came.time.indexOf(time)] ?? null : null]);

export async function show() {
  if (last) state(last);
  if (!answer) return;
  find("figures").replaceChildren(...cards());
  for (const id of ["downloads", "table-details", "snippet-details"]) find(id).hidden = false;
  find("snippet").textContent = answer.snippet;
  if (answer.ledger) find("state").textContent += ` ${text("kept", answer.ledger.set, text(answer.ledger.live ? "live" : "simulated"))}`;
  find("notes").replaceChildren(...answer.notes.map(note => element("li", {}, note)));
  const heads = [text("time"), text("median"), "25 %", "75 %", "5 %", "95 %", text("up"), text("low"), text("high"), text("whatCame")];
  find("table").replaceChildren(table(heads, rows().map(row => row.map((value, place) => place === 0 ? value : place === 6 ? percent(value, 0) : number(value)))));
  await draw();
}

const choices = () => Object.fromEntries(Object.entries(SHOWN).map(([name, id]) => [name, find(id).checked]));

async function draw() {
  if (!answer) return;
  const drawn = answer;
  await drawForecast(drawn, choices());
  find("chart").dataset.digest = drawn.digest;
}

async function search() {
  const name = find("source").value;
  if (!name) return;
  const found = await get(`instruments?source=${encodeURIComponent(name)}&query=${encodeURIComponent(find("instrument").value.trim())}&limit=50`);
  find("instruments").replaceChildren(...found.instruments.map(instrument => element("option", {value: instrument})));
  return found;
}

async function choose() {
  find("instrument").value = "";
  const found = await search();
  find("instrument").value = found?.instruments[0] ?? "";
  await search();
}

export async function upload(file, most) {
  if (file.size > most) throw new Error(text("tooBig", Math.floor(most / 2 ** 20)));
  return send(file);
}

export function takeFiles(zone, input, take) {
  zone.addEventListener("dragover", event => { event.preventDefault(); zone.classList.add("over"); });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", event => { event.preventDefault(); zone.classList.remove("over"); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
  input.addEventListener("change", () => { if (input.files[0]) take(input.files[0]); });
}

export async function start(health) {
  find("red-up").checked = kept("redUp") === "true";
  find("forecast-form").addEventListener("submit", told(async event => { event.preventDefault(); await ask(); }));
  find("cancel").addEventListener("click", told(work.cancel));
  find("source").addEventListener("change", told(choose));
  let timer = null;
  find("instrument").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(told(search), 150); });
  for (const id of Object.values(SHOWN)) find(id).addEventListener("change", told(async () => {
    if (id === "red-up") keep("redUp", find(id).checked);
    await draw();
  }));
  find("csv").addEventListener("click", () => save(`${answer.instrument}-forecast.csv`, csv([["time", "q50", "q25", "q75", "q05", "q95", "prob_up", "low", "high", "came"], ...rows()])));
  find("png").addEventListener("click", told(() => savePng(`${answer.instrument}-forecast`)));
  find("copy").addEventListener("click", told(async () => {
    try { await navigator.clipboard.writeText(answer.snippet); find("state").textContent = text("copied"); }
    catch { find("snippet-details").open = true; getSelection().selectAllChildren(find("snippet")); }
  }));
  NARROW.addEventListener("change", told(draw));
  find("drop").hidden = !health.uploads;
  takeFiles(find("drop"), find("file"), told(async file => {
    find("state").textContent = text("uploading");
    try {
      const found = await upload(file, health.limits.upload_bytes);
      await sources();
      find("source").value = found.id;
      await choose();
      find("state").textContent = text("uploaded", found.name, found.bars, found.instruments.length);
    } catch (error) { find("state").textContent = ""; throw error; }
    await ask();
  }));
  await choose();
  const id = /^#forecast\/([\w-]+)$/.exec(location.hash)?.[1];
  if (id) {
    try {
      const found = await get(`forecasts/${id}`);
      fill(found.question);
      await take(await work.watch("forecasts", found));
    } catch (error) { history.replaceState(null, "", "#forecast"); alertOf(error); }
  }
}

export const redraw = draw;
