// A log of any length: lines come as they are scrolled to, go when they are far away, and follow while a task runs.
const PIECE = 150, MOST = 2000;

export function installLog() {
  const log = document.querySelector("[data-log]");
  if (!log) return;
  let first = Number(log.dataset.first), last = Number(log.dataset.last), total = Number(log.dataset.total);
  let isFinal = "final" in log.dataset, isBusy = false, isFollowing = false;
  const follow = document.querySelector("[data-follow]");
  for (const link of document.querySelectorAll("[data-earlier], [data-later]")) link.hidden = true;

  async function ask(from, count) {
    const answer = await fetch(`${log.dataset.log}?first=${from}&count=${count}`);
    if (answer.status === 401 || answer.status === 403) location.reload(); // the page says why
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const told = await answer.json();
    total = told.count;
    isFinal = told.is_final;
    document.querySelector("[data-count]").textContent = total;
    return told;
  }

  async function busy(work) {
    if (isBusy) return;
    isBusy = true;
    try { await work(); } catch { /* the next look asks again */ } finally { isBusy = false; }
  }

  const later = () => busy(async () => {
    const told = await ask(last + 1, PIECE);
    if (told.first !== last + 1 || told.last < told.first) return;
    log.insertAdjacentHTML("beforeend", told.html);
    last = told.last;
    while (last - first >= MOST) {
      const height = log.firstElementChild.offsetHeight;
      log.firstElementChild.remove();
      if (!isFollowing) log.scrollTop -= height;
      first += 1;
    }
    if (isFollowing) log.scrollTop = log.scrollHeight;
  });

  const earlier = () => busy(async () => {
    if (first <= 1) return;
    const from = Math.max(1, first - PIECE);
    const told = await ask(from, first - from);
    const before = log.scrollHeight;
    log.insertAdjacentHTML("afterbegin", told.html);
    log.scrollTop += log.scrollHeight - before;
    first = told.first;
    while (last - first >= MOST) { log.lastElementChild.remove(); last -= 1; }
  });

  const toEnd = () => busy(async () => {
    const told = await ask(Math.max(1, total - PIECE + 1), PIECE);
    log.innerHTML = told.html;
    [first, last] = [told.first, told.last];
    log.scrollTop = log.scrollHeight;
  });

  log.addEventListener("scroll", () => {
    if (log.scrollTop < 600) earlier();
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 600 && last < total) later();
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
    if (isFollowing && !isAtEnd && last >= total) setFollowing(false);
  });

  function setFollowing(on) {
    isFollowing = on;
    follow.setAttribute("aria-pressed", String(on));
    log.setAttribute("aria-live", on ? "polite" : "off");
    if (on && last < total) toEnd();
    else if (on) log.scrollTop = log.scrollHeight;
  }

  async function look() {
    const began = performance.now();
    if (!document.hidden && (isFollowing || last >= total)) await later();
    if (isFollowing && total > last) await toEnd(); // it grows faster than it is read
    // A server that takes long is asked less often, so that any number may look.
    if (!isFinal || last < total) setTimeout(look, Math.max(1000, 5 * (performance.now() - began)));
    else follow.hidden = true;
  }

  const marked = log.querySelector(".marked");
  if (marked) marked.scrollIntoView({ block: "center" });
  else if ("atEnd" in log.dataset) log.scrollTop = log.scrollHeight;
  if (!isFinal) {
    follow.hidden = false;
    follow.addEventListener("click", () => setFollowing(!isFollowing));
    setFollowing("atEnd" in log.dataset);
    look();
  }
}
