// Shortcuts, and a palette that finds pages and tasks by a few letters.
const GO = { t: "/ui/tasks", h: "/", n: "/ui/new", f: "/ui/fleet", k: "/ui/keys", a: "/ui/audit", s: "/ui/settings" };
const HELP = [["/", "search"], ["Ctrl K", "find a page or a task"], ["g h", "tower"], ["g t", "tasks"], ["g n", "new task"], ["g f", "fleet"], ["j k", "next, previous task"], ["Enter, o", "open it"], ["x", "tick it"], ["?", "these keys"], ["Esc", "close"]];

const isTyping = (target) => target.closest("input, textarea, select, [contenteditable]");

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function dialog(label) {
  const made = element("dialog");
  made.setAttribute("aria-label", label);
  document.body.append(made);
  made.addEventListener("click", (event) => { if (event.target === made) made.close(); });
  made.addEventListener("close", () => made.remove());
  return made;
}

function help() {
  const shown = dialog("Shortcuts");
  shown.append(element("h2", { textContent: "Shortcuts" }), element("dl", {}, ...HELP.flatMap(([key, what]) => [element("dt", {}, element("kbd", { textContent: key })), element("dd", { textContent: what })])));
  shown.append(element("form", { method: "dialog" }, element("button", { textContent: "Close" })));
  shown.showModal();
}

function palette() {
  const shown = dialog("Find");
  const input = element("input", { type: "search", placeholder: "A page, or a task's title, type or id" });
  input.setAttribute("aria-label", "Find a page or a task");
  const list = element("ul");
  const pages = [...document.querySelectorAll("header nav a")].map((link) => ({ text: link.textContent, place: link.getAttribute("href") }));
  let found = [], at = 0, asked = 0;
  const render = () => {
    list.replaceChildren(...found.map((item, index) => {
      const link = element("a", { href: item.place, textContent: item.text });
      link.setAttribute("aria-selected", String(index === at));
      return element("li", {}, link);
    }));
  };
  let shownFor = "";
  const look = async () => {
    shownFor = input.value;
    const wanted = input.value.trim().toLowerCase();
    found = pages.filter((page) => page.text.toLowerCase().includes(wanted));
    at = 0;
    if (wanted) found.push({ text: `Search tasks for “${input.value.trim()}”`, place: `/ui/tasks?text=${encodeURIComponent(input.value.trim())}` });
    render();
    const number = ++asked;
    if (wanted.length < 2) return;
    const answer = await fetch(`/ui/find?text=${encodeURIComponent(wanted)}`);
    if (!answer.ok || number !== asked) return;
    const tasks = await answer.json();
    found.push(...tasks.map((task) => ({ text: `${task.name} · ${task.status} · ${task.id.slice(0, 13)}`, place: `/ui/tasks/${task.id}` })));
    render();
  };
  let pause;
  input.addEventListener("input", () => { clearTimeout(pause); pause = setTimeout(look, 150); });
  shown.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      at = (at + (event.key === "ArrowDown" ? 1 : found.length - 1)) % Math.max(1, found.length);
      render();
      list.children[at]?.scrollIntoView({ block: "nearest" });
      event.preventDefault();
    } else if (event.key === "Enter" && event.target === input) { // on a link, Enter follows that
      event.preventDefault();
      if (input.value !== shownFor) look();
      if (found[at]) location.href = found[at].place;
    } else if (event.key === "Escape") {
      shown.close();
    }
  });
  shown.append(input, list);
  shown.showModal();
  look();
}

const rows = () => [...document.querySelectorAll("[data-row]")];

function move(step) {
  const all = rows();
  const now = all.findIndex((row) => row.classList.contains("at"));
  const next = all[Math.min(all.length - 1, Math.max(0, now + step))];
  if (!next) return;
  all[now]?.classList.remove("at");
  next.classList.add("at");
  next.querySelector("[data-open]").focus({ preventScroll: true });
  next.scrollIntoView({ block: "nearest" });
}

export function installKeys() {
  let isGoing = false;
  for (const [name, act] of [["[data-palette]", palette], ["[data-help]", help]]) {
    const button = document.querySelector(name);
    button.hidden = false;
    button.addEventListener("click", act);
  }
  document.querySelector("[data-hint]").hidden = false;
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "k") {
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) palette();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target) || document.querySelector("dialog[open]")) return;
    if (isGoing) {
      isGoing = false;
      if (GO[event.key]) location.href = GO[event.key];
      return;
    }
    const current = document.querySelector("[data-row].at");
    const keys = {
      g: () => { isGoing = true; setTimeout(() => { isGoing = false; }, 1500); },
      "/": () => { const search = document.querySelector("[data-search]"); if (search) search.focus(); else palette(); },
      "?": help,
      j: () => move(1),
      k: () => move(-1),
      o: () => current?.querySelector("[data-open]").click(),
      x: () => current?.querySelector("input[name=id]")?.click(),
    };
    if (keys[event.key]) {
      event.preventDefault();
      keys[event.key]();
    }
  });
}
