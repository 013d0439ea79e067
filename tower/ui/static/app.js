// What a script adds to pages that work without one: they stay live, times are told in words, and keys reach everything.
import { installRequest } from "./request.js";
import { follow } from "./live.js";
import { installKeys } from "./keys.js";
import { installLog } from "./log.js";
import { tellTimes } from "./times.js";

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
}

document.addEventListener("submit", (event) => {
  const question = event.submitter?.dataset.confirm;
  if (question && !confirm(question)) event.preventDefault();
});

const all = document.querySelector("[data-pick-all]");
if (all) {
  document.querySelector("[data-all]").hidden = false;
  const boxes = () => [...document.querySelectorAll("input[name=id]")];
  const tell = () => {
    const count = boxes().filter((box) => box.checked).length;
    document.querySelector("[data-picked]").textContent = count ? `${count} picked:` : "Tick tasks, then";
  };
  all.addEventListener("change", () => { boxes().forEach((box) => { box.checked = all.checked; }); tell(); });
  document.addEventListener("change", (event) => { if (event.target.name === "id") tell(); });
  tell();
}

for (const end of document.querySelectorAll("[data-end]")) end.scrollTop = end.scrollHeight;

tellTimes();
installKeys();
installLog();
installRequest();
follow();
