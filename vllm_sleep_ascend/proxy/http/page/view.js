// SPDX-License-Identifier: Apache-2.0
// Draws what the proxy says. All of it is text: nothing here, and nothing that the policy of the
// page allows, makes markup of it.

import { bytes, clock, perSecond, say, seconds, word } from "./words.js";

const SPANS = [3, 6, 15, 30, 60]; // minutes that the timeline may show
const BRIEF = 0.02; // seconds of a state that are not drawn: a server begins as unknown
const HUES = 6;
const TAGS = ["weights", "kv_cache"]; // the others have one shade
const STATES = ["awake", "asleep", "starting", "stopping", "stopped", "unknown", "stuck"];

const rows = new Map(); // of the table of models, by the server's id

export function make(tag, classes = "", ...content) {
  const element = document.createElement(tag);
  element.className = classes;
  element.append(...content);
  return element;
}

const $ = (id) => document.getElementById(id);
const line = (text) => make("p", "dim small", text);
const called = (server) => (server.name === server.url && server.models[0]) || server.name;

// `act` is called with an action and a server when its button is pressed.
export function drawModels(servers, busy, act) {
  for (const [id, row] of rows) {
    if (!servers.some((server) => server.id === id)) {
      row.element.remove();
      rows.delete(id);
    }
  }
  for (const server of servers) {
    if (!rows.has(server.id)) rows.set(server.id, newRow(server.id, act));
    const row = rows.get(server.id);
    $("models").tBodies[0].append(...(row.element.isConnected ? [] : [row.element]));
    fill(row, server, busy.has(server.id));
  }
}

function newRow(id, act) {
  const cells = Object.fromEntries(
    ["state", "queue", "memory", "last", "actions"].map((name) => [name, make("td", name)]),
  );
  const head = make("th");
  head.scope = "row";
  const row = { element: make("tr", "", head, ...Object.values(cells)), head, cells, buttons: {} };
  const holder = make("div");
  for (const action of ["wake", "sleep", "stop", "log"]) {
    const button = make("button");
    button.type = "button";
    button.addEventListener("click", () => act(action, row.server));
    row.buttons[action] = button;
    holder.append(button);
  }
  cells.actions.append(holder);
  row.element.dataset.id = id;
  // On a narrow screen these are blocks, which by themselves would be no table to a screen reader.
  row.element.setAttribute("role", "row");
  head.setAttribute("role", "rowheader");
  for (const cell of Object.values(cells)) cell.setAttribute("role", "cell");
  return row;
}

function fill(row, server, isBusy) {
  row.server = server;
  row.element.dataset.state = server.state;
  const others = server.models.filter((name) => name !== called(server));
  row.head.replaceChildren(
    make("span", "name", called(server)),
    ...(others.length ? [line(others.join(", "))] : []),
    ...(server.closing ? [line(say("closing"))] : []),
    ...(server.retiring ? [line(say("retiring"))] : []),
    ...(server.error ? [make("p", "bad small", server.error)] : []),
  );
  const { state, queue, memory, last } = row.cells;
  for (const name of ["state", "queue", "memory", "last"]) {
    row.cells[name].dataset.label = say(name);
  }
  const level = server.level ? [line(say("level", { level: server.level }))] : [];
  state.replaceChildren(
    make("div", "", make("span", `dot ${server.state}`, word("state", server.state)), ...level),
  );
  queue.replaceChildren(make("div", "", ...queued(server)));
  memory.replaceChildren(make("div", "", ...held(server)));
  last.replaceChildren(make("div", "", ...switched(server.last_operation)));
  const can = {
    wake: ["asleep", "stopped", "unknown"].includes(server.state),
    sleep: ["awake", "unknown"].includes(server.state) && !server.closing,
    stop: "log" in server && !["stopped", "stopping", "stuck"].includes(server.state),
    log: "log" in server,
  };
  for (const [action, button] of Object.entries(row.buttons)) {
    button.textContent = say(action);
    button.setAttribute("aria-label", say("act_on", { action: say(action), model: called(server) }));
    button.hidden = action !== "wake" && action !== "sleep" && !("log" in server);
    button.disabled = !can[action] || (action !== "log" && (isBusy || server.retiring));
  }
}

function queued(server) {
  const parts = [];
  if (server.queued) parts.push(make("p", "", say("waiting", { n: server.queued })));
  if (server.in_flight) parts.push(make("p", "", say("running", { n: server.in_flight })));
  return parts.length ? parts : [make("span", "dim", say("nobody"))];
}

function held({ memory }) {
  if (!memory) return [make("span", "dim", say("not_told"))];
  const places = ["device", "host", "disk"].filter((place) => memory[place] || place === "device");
  return places.map((place) => make("p", "", say(`on_${place}`, { size: bytes(memory[place]) })));
}

function switched(last) {
  if (!last) return [make("span", "dim", say("none"))];
  const parts = [make("p", "", word("op", last.operation).replace("{seconds}", seconds(last.seconds)))];
  if (last.copied_bytes && last.copy_seconds) {
    const speed = perSecond(last.copied_bytes / 1e9 / last.copy_seconds);
    parts.push(line(say("speed", { size: bytes(last.copied_bytes), speed })));
    if (last.link_share) {
      parts.push(line(say("link_share", { percent: Math.round(100 * last.link_share) })));
    }
  }
  parts.push(line(clock(last.ended)));
  return parts;
}

export function drawDevices(devices, servers) {
  const cards = devices.map((device) => card(device, servers));
  $("devices").replaceChildren(...(cards.length ? cards : [line(say("no_devices"))]));
}

function card(device, servers) {
  const used = device.total - device.free;
  const held = [...device.held].sort((a, b) => a.server - b.server || shade(a.tag) - shade(b.tag));
  const told = held.reduce((sum, each) => sum + each.bytes, 0);
  const parts = held.map(({ server, tag, bytes: size }) => {
    const at = servers.findIndex((each) => each.id === server);
    const model = called(servers[at]);
    const text = say("tag", { model, tag: word("tag", tag) });
    return { classes: `hue-${at % HUES} shade-${shade(tag)}`, text, size };
  });
  if (used > told) parts.push({ classes: "others", text: say("of_others"), size: used - told });
  const title = make("h3", "", say("device", { device: device.device }));
  const sizes = { used: bytes(used), total: bytes(device.total), free: bytes(device.free) };
  const bar = make("div", "bar", ...parts.map((part) => piece(part, device.total)));
  bar.setAttribute("aria-hidden", "true"); // the table says it
  const table = make("table", "", make("tbody", "", ...parts.map(entry)));
  return make("div", "card", title, make("p", "dim", say("in_use", sizes)), bar, table);
}

function shade(tag) {
  const at = TAGS.indexOf(tag);
  return at < 0 ? TAGS.length : at;
}

function piece({ classes, size }, total) {
  const element = make("span", classes);
  element.style.width = `${(100 * size) / total}%`;
  return element;
}

function entry({ classes, text, size }) {
  const head = make("th", `swatch ${classes}`, text);
  head.scope = "row";
  return make("tr", "", head, make("td", "", bytes(size)));
}

// `history` has for each server's id its states as [since, state], in their order.
export function drawHour(servers, history, now) {
  const begun = Math.min(now, ...[...history.values()].map((states) => states[0][0]));
  const span = SPANS.find((minutes) => now - begun <= 60 * minutes) ?? SPANS.at(-1);
  const lanes = servers.map((server) => lane(server, history.get(server.id) ?? [], now, 60 * span));
  const marks = [3, 2, 1, 0].map((third) => {
    const n = (span * third) / 3;
    return make("span", "", n ? say("minutes_ago", { n }) : say("now"));
  });
  const axis = make("div", "lane axis", make("span"), make("div", "dim", ...marks));
  axis.setAttribute("aria-hidden", "true");
  $("hour").replaceChildren(...lanes, axis);
  const names = STATES.filter((state) => $("hour").querySelector(`.states > .${state}`));
  $("states").replaceChildren(
    ...names.map((state) => make("li", `dot ${state}`, word("state", state))),
  );
}

function lane(server, states, now, length) {
  const bar = make("div", "states");
  const spent = new Map();
  states.forEach(([since, state], at) => {
    const from = Math.max(since, now - length);
    const to = Math.min(states[at + 1]?.[0] ?? now, now);
    if (to - from < BRIEF) return;
    const element = make("span", state);
    element.style.left = `${(100 * (from - now + length)) / length}%`;
    element.style.width = `${(100 * (to - from)) / length}%`;
    element.title = say("span", { state: word("state", state), from: clock(from), to: clock(to) });
    bar.append(element);
    spent.set(state, (spent.get(state) ?? 0) + to - from);
  });
  const shares = [...spent].map(([state, time]) =>
    say("share", { state: word("state", state), minutes: Math.round(time / 60) }),
  );
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", say("shares", { model: called(server), shares: shares.join(", ") }));
  return make("div", "lane", make("span", "name", called(server)), bar);
}

export { called };
