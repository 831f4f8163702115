// SPDX-License-Identifier: Apache-2.0
// The page's connection to the proxy, its buttons and its dialogs.

import * as view from "./view.js";
import { otherLanguage, say, setLanguage, translate, word } from "./words.js";

const KEY = "vllm-sleep-key";
const QUIET_MS = 30000; // without an event; the proxy sends one every 10 s
const LOG_MS = 2000; // between two looks at an open log
const LINES = 500;
const HOUR_S = 3600; // that the timeline shows at most
// Colours and other commands to a terminal (CSI), and titles of its window (OSC).
const FOR_TERMINALS = /\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])/g;

const $ = (id) => document.getElementById(id);

let status = null; // the last event
let ahead = 0; // seconds by which the proxy's clock is ahead of ours
let kind = ""; // of connection; "" while a key is needed
let logs = 0; // that were opened
const history = new Map();
const busy = new Set(); // ids of servers with an action under way

class NeedsKey extends Error {}

// EventSource cannot send the key, so all calls are fetch.
async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "X-Vllm-Sleep": "1", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) throw new NeedsKey();
  return answer;
}

async function refused(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `${answer.status} ${answer.statusText}`;
  }
}

// Calls of the connection.

async function follow() {
  const abort = new AbortController();
  let watch;
  const alive = () => {
    clearTimeout(watch);
    watch = setTimeout(() => abort.abort(), QUIET_MS);
  };
  alive();
  try {
    const answer = await call("events", { signal: abort.signal });
    if (!answer.ok) throw Object.assign(new Error(), { refusal: await refused(answer) });
    $("forget").hidden = !sessionStorage.getItem(KEY);
    show("overview");
    const texts = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    let first = true;
    for (;;) {
      const { value, done } = await texts.read();
      if (done) return;
      alive();
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        take(JSON.parse(event.slice("data: ".length)), first);
        first = false;
      }
    }
  } finally {
    clearTimeout(watch);
    abort.abort();
  }
}

async function connect() {
  for (let pause = 500; ; pause = Math.min(1.5 * pause, 3000)) {
    const before = status;
    let reason = "";
    try {
      await follow();
    } catch (error) {
      reason = error.refusal ?? "";
      if (error instanceof NeedsKey) {
        askForKey();
        return;
      }
    }
    if (status !== before) pause = 500; // it was there
    connection("lost", reason);
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

// `reason`: why the proxy does not let us in, if it is there.
function connection(name, reason = "") {
  kind = name;
  $("connection").dataset.kind = name === "live" ? "live" : "wait";
  $("connection").textContent = [name && say(name), reason].filter(Boolean).join(": ");
}

function take(event, first) {
  if (first) history.clear();
  for (const [id, ...since] of event.history) {
    if (!history.has(id)) history.set(id, []);
    history.get(id).push(since);
  }
  const known = new Set(event.servers.map((server) => server.id));
  for (const [id, states] of history) {
    if (!known.has(id)) history.delete(id);
    const begun = states.findLastIndex(([since]) => since <= event.now - HOUR_S);
    if (begun > 0) states.splice(0, begun);
  }
  announce(first ? [] : event.servers);
  status = event;
  ahead = event.now - Date.now() / 1000;
  connection("live");
  draw();
}

// For readers who do not see the table change.
function announce(servers) {
  const before = new Map(status?.servers.map((server) => [server.id, server.state]));
  const changed = servers.filter(({ id, state }) => before.get(id) !== state);
  if (changed.length) {
    const texts = changed.map((server) =>
      say("is_now", { model: view.called(server), state: word("state", server.state) }),
    );
    $("said").textContent = texts.join("; ");
  }
}

function draw() {
  if (!status) return;
  view.drawModels(status.servers, busy, act);
  view.drawDevices(status.devices, status.servers);
  drawHour();
}

function drawHour() {
  if (status) view.drawHour(status.servers, history, Date.now() / 1000 + ahead);
}

function show(id) {
  for (const main of document.querySelectorAll("main")) main.hidden = main.id !== id;
}

// The key.

function askForKey() {
  const given = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  $("forget").hidden = true;
  $("login-error").textContent = given ? say("wrong_key") : "";
  connection("");
  show("login");
  $("key").value = "";
  $("key").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  connect();
});

$("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

// Actions.

function act(action, server) {
  if (action === "log") showLog(server);
  else confirm(action, server);
}

function confirm(action, server) {
  const model = view.called(server);
  const dialog = $("confirm");
  $("confirm-title").textContent = say(`ask_${action}`, { model });
  $("confirm-text").textContent = say(`why_${action}`);
  $("confirm-yes").textContent = say(action);
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue === "yes") perform(action, server);
  };
  dialog.showModal();
}

async function perform(action, server) {
  const model = view.called(server);
  busy.add(server.id);
  notice("");
  $("said").textContent = say("asked", { model, action: say(action) });
  draw();
  try {
    const path = `${action}?model=${encodeURIComponent(server.name)}`;
    const answer = await call(path, { method: "POST" });
    if (!answer.ok) throw new Error(await refused(answer));
  } catch (error) {
    if (error instanceof NeedsKey) askForKey();
    else notice(say("failed", { model, action: say(action), reason: error.message }));
  } finally {
    busy.delete(server.id);
    draw();
  }
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// The log of a server, read again while it is open.

async function showLog(server) {
  const dialog = $("log");
  const text = $("log-text");
  $("log-title").textContent = say("log_of", { model: view.called(server) });
  text.textContent = "";
  dialog.showModal();
  const number = ++logs;
  for (let first = true; dialog.open && number === logs; first = false) {
    const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
    const read = await readLog(server.name);
    if (read !== text.textContent) text.textContent = read;
    if (first || atEnd) text.scrollTop = text.scrollHeight;
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, LOG_MS);
      dialog.onclose = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

async function readLog(name) {
  try {
    const answer = await call(`log?model=${encodeURIComponent(name)}&lines=${LINES}`);
    if (!answer.ok) return await refused(answer);
    return plain(await answer.text()) || say("log_empty");
  } catch (error) {
    return error instanceof NeedsKey ? say("wrong_key") : error.message;
  }
}

// Text for a terminal as it stands there: of a line that was written over, the last text.
function plain(written) {
  const lines = written.replace(FOR_TERMINALS, "").split("\n");
  const left = lines.map((line) => {
    let end = line.length;
    while (line[end - 1] === "\r") end -= 1;
    return line.slice(line.lastIndexOf("\r", end - 1) + 1, end);
  });
  return left.join("\n");
}

$("language").addEventListener("click", () => {
  setLanguage(otherLanguage());
  translate();
  connection(kind);
  draw();
});

translate();
connection("connecting");
setInterval(drawHour, 10000);
connect();
