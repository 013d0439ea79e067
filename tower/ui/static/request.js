// Shows beside the form of a new task the request that it means, as it is typed.
const NUMBERS = ["priority", "timeout_s", "silence_s", "max_attempts", "concurrency_limit"];
const TEXTS = ["title", "concurrency_key", "idempotency_key"];
const TIMES = ["not_before", "expires_at"];

function value(kind, text) {
  if (kind === "number") return Number(text);
  if (kind === "numbers") return text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (kind === "lines") return text.split("\n").filter(Boolean);
  if (kind === "json") return JSON.parse(text);
  return text;
}

function body(form) {
  const told = { type: form.elements.type.value };
  for (const name of TEXTS) if (form.elements[name].value.trim()) told[name] = form.elements[name].value.trim();
  for (const name of NUMBERS) if (form.elements[name].value.trim()) told[name] = Number(form.elements[name].value);
  for (const name of TIMES) {
    const text = form.elements[name].value.trim();
    if (text) told[name] = /[Zz+]/.test(text) ? text : text.split(":").length === 2 ? `${text}:00Z` : `${text}Z`;
  }
  if (form.elements.rate_key.value.trim()) {
    told.rate = { key: form.elements.rate_key.value.trim(), limit: Number(form.elements.rate_limit.value), per_s: Number(form.elements.rate_per_s.value) };
  }
  const labels = form.elements.labels.value.split("\n").filter((line) => line.includes(":"));
  if (labels.length) told.labels = Object.fromEntries(labels.map((line) => [line.slice(0, line.indexOf(":")).trim(), line.slice(line.indexOf(":") + 1).trim()]));
  told.payload = {};
  for (const field of form.querySelectorAll("[data-kind]")) {
    const name = field.name.replace(/^payload\./, ""), { kind } = field.dataset;
    if (field.name === "payload") told.payload = value("json", field.value || "{}");
    else if (kind === "switch") told.payload[name] = field.checked;
    else if (field.value.trim()) told.payload[name] = value(kind, field.value);
  }
  return told;
}

const quoted = (text) => `'${text.replaceAll("'", `'"'"'`)}'`;

export function installRequest() {
  const form = document.querySelector("[data-request]");
  if (!form) return;
  const shown = document.getElementById(form.dataset.request);
  form.addEventListener("input", () => {
    let told;
    try {
      told = JSON.stringify(body(form));
    } catch {
      return; // no JSON yet
    }
    shown.textContent = `${shown.dataset.begin} \\\n  -d ${quoted(told)}`;
  });
}
