// What HTML cannot do: keep the page in step with the service, by one stream of server-sent events.
"use strict";

const RETRY_MS = 3000;
const dark = matchMedia("(prefers-color-scheme: dark)");
const sources = new Map(); // of the charts, by name
const counts = new Map(); // of the heat maps: after how many observations their newest step was
let events, retry, charts;

// Make a tree like another one, and touch only what differs: focus, selection and scrolling stay.
function morph(old, now) {
  if (old.nodeName !== now.nodeName) return old.replaceWith(now);
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== now.data) old.data = now.data;
    return;
  }
  for (const { name } of [...(old.attributes ?? [])]) if (!now.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of now.attributes ?? []) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const children = [...now.childNodes]; // which move over to `old` where it has none
  children.forEach((child, n) => (old.childNodes[n] ? morph(old.childNodes[n], child) : old.append(child)));
  while (old.childNodes.length > children.length) old.lastChild.remove();
}

function showText(id, html) {
  const old = document.getElementById(id);
  const now = old.cloneNode(false);
  now.innerHTML = html; // the service has escaped all that is not its own
  const focused = old.contains(document.activeElement) && document.activeElement.getAttribute("href");
  morph(old, now);
  if (focused) [...old.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus({ preventScroll: true });
}

function showColumns(name, columns) {
  if (!sources.has(name)) return;
  const data = Object.entries(columns).map(([column, values]) => [column, values.map((value) => value ?? NaN)]);
  sources.get(name).data = Object.fromEntries(data);
}

// Move a heat map one step to the left, and put the newest step on its right.
function addStep(name, values, count) {
  const source = sources.get(name);
  if (!source || counts.get(name) === count) return;
  counts.set(name, count);
  const [image] = source.data.image; // units by steps, row after row
  const steps = image.length / values.length;
  image.copyWithin(0, 1);
  values.forEach((value, unit) => (image[(unit + 1) * steps - 1] = value));
  source.change.emit();
}

async function embed(elements) {
  const url = document.body.dataset.charts + (dark.matches ? "dark" : "light");
  charts ??= fetch(url).then((answer) => (answer.ok ? answer.json() : Promise.reject(answer.status)));
  const items = await charts.catch(() => (charts = null));
  if (!items) return; // the next event tries again
  Bokeh.set_log_level("error"); // that a chart has no data yet is nothing to warn of
  for (const element of elements.filter(({ id }) => !sources.has(`#${id}`))) {
    sources.set(`#${element.id}`, null);
    const views = await Bokeh.embed.embed_item(items[element.id], element.id);
    for (const view of views) view.model.document.all_models?.forEach?.((model) => model.name && sources.set(model.name, model));
  }
}

function say(text) {
  const banner = document.getElementById("connection");
  banner.textContent = text;
  banner.hidden = !text;
}

async function show({ html = {}, charts = {}, inside = {} }) {
  for (const [id, text] of Object.entries(html)) showText(id, text);
  const seen = document.getElementById("seen");
  if (html.facts && seen.hidden) seen.hidden = false;
  if (Object.keys(charts).length) await embed([document.getElementById("forecast")]);
  for (const [name, columns] of Object.entries(charts)) showColumns(name, columns);
  for (const [name, values] of Object.entries(inside.step?.maps ?? {})) addStep(name, values, inside.step.count);
}

function connect() {
  events?.close();
  clearTimeout(retry);
  const inside = document.querySelector("details.inside[open]") ? "&inside=1" : "";
  const url = document.body.dataset.events + inside;
  let shown = Promise.resolve(); // one event after another
  events = new EventSource(url);
  events.onopen = () => say("");
  events.onmessage = ({ data }) => (shown = shown.then(() => show(JSON.parse(data))));
  events.onerror = async () => {
    say("Connection lost; reconnecting …");
    if (events.readyState !== EventSource.CLOSED) return; // it tries again by itself
    retry = setTimeout(connect, RETRY_MS);
    const answer = await fetch(url).catch(() => null);
    if (answer?.ok) answer.body.cancel();
    else if (answer) say(`${(await answer.json()).detail}; trying again …`);
  };
}

function search(field) {
  const url = new URL(location);
  url.searchParams.delete("after");
  field.value ? url.searchParams.set("q", field.value) : url.searchParams.delete("q");
  history.replaceState(null, "", url);
  for (const link of document.querySelectorAll(".orders a")) {
    const other = new URL(link.href);
    field.value ? other.searchParams.set("q", field.value) : other.searchParams.delete("q");
    link.href = other;
  }
  document.body.dataset.events = `/page/events?${url.searchParams}`;
  connect();
}

// Up and down go from stream to stream.
function step(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const links = [...document.querySelectorAll(".streams tbody a")];
  const at = links.indexOf(document.activeElement);
  const next = at < 0 && by > 0 && document.activeElement.id === "q" ? 0 : at < 0 ? -1 : at + by;
  if (!by || !links[next]) return;
  links[next].focus();
  event.preventDefault();
}

if (document.body.dataset.charts) dark.addEventListener("change", () => location.reload());
for (const details of document.querySelectorAll("details.inside")) {
  details.addEventListener("toggle", async () => {
    if (details.open) await embed([...details.querySelectorAll(".heat")]);
    connect();
  });
}
document.getElementById("search")?.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("q")?.addEventListener("input", (event) => search(event.target));
document.addEventListener("keydown", step);
document.addEventListener("visibilitychange", () => (document.hidden ? events?.close() : connect())); // nobody looks
addEventListener("pagehide", () => events?.close());
addEventListener("pageshow", (event) => event.persisted && connect());
if (document.body.dataset.events) connect();
