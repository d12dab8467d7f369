// Draws a report of GET /kv_policy/requests/{response id}.

const SVG = "http://www.w3.org/2000/svg";
const count = (n) => n.toLocaleString("en-US");

function bytes(n) {
  const units = ["bytes", "kB", "MB", "GB"];
  const power = Math.min(3, Math.floor(Math.log10(Math.max(n, 1)) / 3));
  return `${(n / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

/** Fills `place` with what `report` says; `summary` is the report in a line. */
export function show(place, report, summary) {
  place.replaceChildren();
  if (!report) return place.append(element("p", {}, `${summary}.`));
  const facts = element("dl");
  const fact = (name, field, value, exact = value) => {
    facts.append(element("dt", {}, name), element("dd", { "data-field": field, title: exact }, value));
  };
  const { prompt_tokens: prompt, prefix, kept_bytes: kept, full_bytes: full } = report;
  fact("policy", "policy", report.policy);
  if ("reason" in report) fact("left alone", "reason", report.reason);
  if ("budget" in report) fact("budget", "budget", report.budget);
  fact("prompt tokens", "prompt_tokens", count(prompt));
  fact("of them visual", "visual_tokens", count(report.visual_tokens));
  fact("prefix", "prefix.kind", prefix.kind);
  fact("tokens reused", "prefix.tokens", count(prefix.tokens));
  fact("tokens prefilled", "prefilled", count(prompt - prefix.tokens));
  if (full) {
    fact("bytes kept", "kept_bytes", bytes(kept), count(kept));
    fact("of a full cache's", "full_bytes", bytes(full), count(full));
    fact("bytes freed", "freed_bytes", bytes(full - kept), count(full - kept));
  }
  place.append(facts, chart("Prompt tokens", [
    { name: "reused", value: prefix.tokens, of: prompt },
    { name: "prefilled", value: prompt - prefix.tokens, of: prompt },
  ]));
  if (full) {
    const rows = Object.values(report.kept_per_modality).reduce((sum, n) => sum + n, 0);
    place.append(
      chart(`Rows kept per layer, of ${count(prompt)}`, report.kept_per_layer.map(
        (value, layer) => ({ name: `layer ${layer}`, value, of: prompt }))),
      chart("Rows kept per modality, over layers and heads", Object.entries(report.kept_per_modality).map(
        ([name, value]) => ({ name, value, of: rows }))),
      chart("Bytes of the prompt's KV", [
        { name: "kept", value: kept, of: full, format: bytes },
        { name: "freed", value: full - kept, of: full, format: bytes },
      ]));
  }
  const raw = element("details");
  raw.append(element("summary", {}, "Report as JSON"), element("pre", {}, JSON.stringify(report, null, 1)));
  place.append(raw);
}

/** Horizontal bars; each of {name, value, of, format} fills value / of of its track. */
function chart(title, bars) {
  const grid = element("div", { class: "chart", role: "img" });
  const said = [];
  for (const { name, value, of, format = count } of bars) {
    const svg = document.createElementNS(SVG, "svg");
    svg.append(rect("track", 100), rect("bar", (100 * value) / of));
    grid.append(element("span", {}, name), svg, element("span", {}, format(value)));
    said.push(`${name} ${format(value)}`);
  }
  grid.setAttribute("aria-label", `${title}: ${said.join(", ")}`);
  const figure = element("figure");
  figure.append(element("figcaption", {}, title), grid);
  return figure;
}

function rect(name, percent) {
  const made = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({ class: name, width: `${percent}%`, height: "100%", rx: 2 })) {
    made.setAttribute(key, value);
  }
  return made;
}

export function element(tag, attributes = {}, text = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}
