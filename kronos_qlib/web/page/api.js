// The API, which is all that the page uses.
import {find} from "./dom.js";
import {text} from "./strings.js";

let token = null;
try { token = sessionStorage.getItem("token"); } catch { /* no storage: asked for again after a reload */ }

export class Refused extends Error {
  constructor(problem) { super(problem.detail || problem.title || text("noAnswer")); this.status = problem.status; }
}

async function enterToken() {
  const dialog = find("token-dialog");
  if (!dialog.open) dialog.showModal();
  await new Promise(resolve => dialog.addEventListener("close", resolve, {once: true}));
  token = find("token").value;
  try { sessionStorage.setItem("token", token); } catch { /* kept for this page alone */ }
}

export async function call(path, options = {}) {
  for (;;) {
    const headers = {...options.headers, ...(token ? {Authorization: `Bearer ${token}`} : {})};
    let answer;
    try { answer = await fetch(`/api/${path}`, {...options, headers, credentials: "omit"}); }
    catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused({detail: text("noAnswer")});
    }
    if (answer.status === 401) { await enterToken(); continue; }
    if (!answer.ok) {
      let problem = {};
      try { problem = await answer.json(); } catch { /* a proxy's page, not ours */ }
      throw new Refused({detail: text("noAnswer"), ...problem, status: answer.status});
    }
    return answer;
  }
}

export const get = async path => (await call(path)).json();
export const post = async (path, question) => (await call(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(question)})).json();
export const remove = async path => { await call(path, {method: "DELETE"}); };
export const send = async file => (await call(`uploads?name=${encodeURIComponent(file.name)}`, {method: "POST", headers: {"Content-Type": "application/octet-stream"}, body: file})).json();

const ENDED = ["done", "failed", "cancelled"], PAUSE = 1000, MOST_FAILURES = 5, SILENCE = 60000; // milliseconds; the server says sooner that it is there

async function read(place, id, report, signal) {
  const answer = await call(`${place}/${id}/events`, {signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "", last = null;
  for (;;) {
    const silent = setTimeout(() => reader.cancel(), SILENCE);
    const {value, done} = await reader.read().finally(() => clearTimeout(silent));
    if (done) return last;
    kept += value;
    for (let end; (end = kept.indexOf("\n\n")) >= 0; kept = kept.slice(end + 2)) {
      const data = kept.slice(0, end).split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data) report(last = JSON.parse(data));
    }
  }
}

// Follow a job until it has ended, and return its last status. A stream that breaks is opened again: the job goes on.
async function follow(place, id, report, signal) {
  for (let failures = 0; ;) {
    let status = null;
    try { status = await read(place, id, report, signal); }
    catch (error) {
      if (error.name === "AbortError" || error.status === 404) throw error;
    }
    if (!ENDED.includes(status?.state)) {
      await new Promise(resolve => setTimeout(resolve, PAUSE * (failures + 1)));
      signal.throwIfAborted();
      try { report(status = await get(`${place}/${id}`)); failures = 0; }
      catch (error) {
        if (error.status === 404 || ++failures === MOST_FAILURES) throw error;
        continue;
      }
    }
    if (status.state === "failed") throw new Refused(status.problem);
    if (ENDED.includes(status.state)) return status;
  }
}

// The jobs of a tab, one at a time: a newer question takes the place of an older one, which is cancelled. `bar` is shown
// while a job waits or runs, and `report` is told of each change. `ask` and `watch`, of a job that was asked for before,
// return the result, or null if it was cancelled or superseded.
export function jobs(bar, report = () => {}) {
  let current = null, asked = 0;
  const leave = (place, id) => remove(`${place}/${id}`).catch(() => { /* it has ended meanwhile */ });
  async function ask(place, question) {
    const turn = ++asked, given = await post(place, question);
    if (turn === asked) return watch(place, given);
    leave(place, given.id);
    return null;
  }
  async function watch(place, given) {
    const {id} = given, own = {place, id, stop: new AbortController(), ended: false}, before = current;
    current = own;
    before?.stop.abort();
    if (before && !before.ended) leave(before.place, before.id);
    const show = status => {
      if (current !== own) return;
      bar.hidden = ENDED.includes(status.state);
      if (status.progress > 0) bar.value = status.progress; else bar.removeAttribute("value");
      report(status);
    };
    show(given);
    try {
      const last = await follow(place, id, show, own.stop.signal);
      return current === own ? last.result : null;
    } catch (error) {
      if (current !== own) return null;
      report({state: "failed"});
      throw error;
    } finally {
      own.ended = true;
      if (current === own) bar.hidden = true;
    }
  }
  const cancel = async () => { if (current && !current.ended) await remove(`${current.place}/${current.id}`); };
  return {ask, watch, cancel};
}
