// Keeps the parts of a page that change: the server sends those that did, and only what differs in them is touched.
import { tellTimes } from "./times.js";

const title = document.title;

/** Make `old` look like `fresh`, keeping what is focused, ticked, opened or scrolled. */
function morph(old, fresh) {
  const staying = new Set([...fresh.children].map((child) => child.id));
  // What is gone goes first: then the rest need not move, and keeps the focus.
  for (const child of [...old.children]) if (child.id && !staying.has(child.id)) child.remove();
  const known = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    const match = next.id ? known.get(next.id) : at && !at.id && at.nodeName === next.nodeName ? at : null;
    if (!match) {
      old.insertBefore(next, at);
      continue;
    }
    while (at && at !== match && !at.id) { // the space around what is gone
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
    if (match !== at) old.insertBefore(match, at);
    at = match.nextSibling;
    if (match.nodeType !== Node.ELEMENT_NODE) {
      if (match.nodeValue !== next.nodeValue) match.nodeValue = next.nodeValue;
    } else if (match.nodeName === "TIME" && match.dateTime === next.dateTime) {
      continue;
    } else if (!match.isEqualNode(next)) {
      for (const { name } of [...match.attributes]) if (!next.hasAttribute(name) && name !== "open" && name !== "class") match.removeAttribute(name);
      for (const { name, value } of next.attributes) if (match.getAttribute(name) !== value && name !== "open") match.setAttribute(name, value);
      morph(match, next);
    }
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

function show(parts) {
  for (const [name, html] of Object.entries(parts)) {
    const place = document.querySelector(`[data-part="${name}"]`);
    if (!place) continue;
    const scroller = place.closest("[data-end]");
    const isAtEnd = scroller && scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40;
    const made = document.createElement("template");
    made.innerHTML = html;
    morph(place, made.content);
    if (isAtEnd) scroller.scrollTop = scroller.scrollHeight;
  }
  tellTimes();
  document.dispatchEvent(new Event("tower:changed"));
}

const watched = new Set(JSON.parse(localStorage.getItem("tower:watched") || "[]"));

/** Tell, outside the page too, when a task that somebody watches has ended. */
function installWatch() {
  const head = document.querySelector("[data-watch]");
  if (!head) return;
  const id = head.dataset.watch;
  const tell = () => {
    const state = head.querySelector("[data-status]");
    const button = head.querySelector("[data-watch-toggle]");
    const isFinal = "final" in state.dataset;
    if (button) {
      button.hidden = isFinal;
      button.textContent = watched.has(id) ? "Do not notify me" : "Notify me";
    }
    if (isFinal && watched.delete(id)) {
      localStorage.setItem("tower:watched", JSON.stringify([...watched]));
      document.title = `(${state.dataset.status}) ${title}`;
      if (window.Notification?.permission === "granted") new Notification(head.dataset.watchName, { body: state.textContent.trim(), tag: id });
    }
  };
  head.addEventListener("click", async (event) => {
    if (!event.target.closest("[data-watch-toggle]")) return;
    if (!watched.delete(id)) {
      watched.add(id);
      if (window.Notification?.permission === "default") await Notification.requestPermission();
    }
    localStorage.setItem("tower:watched", JSON.stringify([...watched]));
    tell();
  });
  document.addEventListener("tower:changed", tell);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) document.title = title; });
  tell();
}

/** Follow this page until it is left; after an outage the server sends all that changed meanwhile. */
export function follow() {
  installWatch();
  if (!document.querySelector("[data-part]")) return;
  let known = document.body.dataset.live;
  let source, later;
  const state = document.querySelector("[data-state]");
  const quiet = state.textContent;
  const isWatching = () => watched.has(document.querySelector("[data-watch]")?.dataset.watch);
  const isWanted = () => !document.hidden || isWatching();
  const open = () => {
    clearTimeout(later);
    if (!isWanted()) return; // it is opened when somebody looks again
    source?.close();
    const place = new URL(location.href);
    place.searchParams.set("live", known);
    source = new EventSource(place);
    source.addEventListener("open", () => { state.textContent = quiet; state.classList.remove("lost"); document.documentElement.dataset.connected = "yes"; });
    source.addEventListener("parts", (event) => { known = event.lastEventId; show(JSON.parse(event.data)); });
    source.addEventListener("gone", () => { source.close(); location.reload(); });
    source.addEventListener("error", () => {
      state.textContent = "The tower does not answer; trying again …";
      state.classList.add("lost");
      document.documentElement.dataset.connected = "no";
      if (source.readyState === EventSource.CLOSED) later = setTimeout(open, 2000);
    });
  };
  // Nobody looks at a hidden tab, except for what is watched in it.
  document.addEventListener("visibilitychange", () => {
    if (!isWanted()) source?.close();
    else if (!source || source.readyState === EventSource.CLOSED) open();
  });
  window.addEventListener("pagehide", () => { clearTimeout(later); source?.close(); });
  open();
}
