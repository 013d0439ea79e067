// Times in words, kept true while the page is open; the exact time is in the title.
const UNITS = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]];
const words = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });

function relative(seconds) {
  if (Math.abs(seconds) < 2) return "now";
  const [name, size] = UNITS.find(([, size]) => Math.abs(seconds) >= size);
  return words.format(-Math.trunc(seconds / size), name);
}

function span(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

function tell() {
  const now = Date.now();
  for (const element of document.querySelectorAll("time[data-when], time[data-since]")) {
    const seconds = (now - Date.parse(element.dateTime)) / 1000;
    const text = "since" in element.dataset ? span(seconds) : relative(seconds);
    if (element.textContent !== text) element.textContent = text;
    if (!element.dataset.told) {
      element.dataset.told = "yes";
      element.title = `${new Date(element.dateTime).toLocaleString()} (${element.dateTime})`;
    }
  }
}

export function tellTimes() {
  tell();
  if (!tellTimes.timer) tellTimes.timer = setInterval(tell, 1000);
}
