// The API, which is all that the page uses.
import {find} from "./dom.js";
import {text} from "./strings.js";

let token = null;
try { token = sessionStorage.getItem("token"); } catch { /* no storage: asked for again after a reload */ }

export class Refused extends Error {
  constructor(problem) { super(problem.detail || problem.title || text("noAnswer")); this.problem = problem; }
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

// Follow a job's events until it has ended, and return its last status.
export async function follow(place, id, report, signal) {
  const answer = await call(`${place}/${id}/events`, {signal});
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "", last = null;
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    kept += value;
    for (let end; (end = kept.indexOf("\n\n")) >= 0; kept = kept.slice(end + 2)) {
      const data = kept.slice(0, end).split("\n").filter(line => line.startsWith("data: ")).map(line => line.slice(6)).join("\n");
      if (data) report(last = JSON.parse(data));
    }
  }
  if (last?.state === "failed") throw new Refused(last.problem);
  return last;
}
