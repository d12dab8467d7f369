"use strict";
// Draws the data of this page: which (layer, KV head) kept which position of the prompt.

const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const [layerChoice, headChoice, strength, readout] = ["layer", "head", "strength", "readout"].map(at);
const numLayers = data.kept.length, numHeads = data.kept[0].length, numTokens = data.tokens.length;
const bits = data.kept.map((heads) => heads.map((row) => Uint8Array.from(atob(row), (c) => c.charCodeAt(0))));
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const tokens = (count) => count.toLocaleString("en-US", { maximumFractionDigits: 1 });
const redraws = []; // one for each part of the page
let heat; // share of the chosen (layer, head) pairs that kept each position
let layerHeats; // the same of each layer alone, for the chosen heads
let allHeat; // the same of all layers, for the chosen heads

/** Share of the layer's chosen heads (null for all) that kept each position. */
function heatOf(layer, head) {
  const shares = new Float64Array(numTokens), heads = head === null ? bits[layer] : [bits[layer][head]];
  for (const row of heads) {
    for (let p = 0; p < numTokens; p++) shares[p] += (row[p >> 3] >> (p & 7)) & 1;
  }
  return shares.map((count) => count / heads.length);
}

function mean(heats) {
  const sum = new Float64Array(numTokens);
  for (const one of heats) for (let p = 0; p < numTokens; p++) sum[p] += one[p];
  return sum.map((value) => value / heats.length);
}

const choice = (select) => (select.value === "" ? null : Number(select.value));
const tone = (share) => data.colours[Math.round(share * (data.colours.length - 1))];
const css = (share) => `rgb(${tone(share).join(" ")})`;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** What a person is told about one position. */
function describe(position, place) {
  if (data.alone) return `${place}, position ${position}: kept, as all are`;
  const pairs = (choice(layerChoice) === null ? numLayers : 1) * (choice(headChoice) === null ? numHeads : 1);
  const count = Math.round(heat[position] * pairs);
  return `${place}, position ${position}: kept by ${count} of ${pairs} layer-head pairs (${percent(heat[position])})`;
}

// One picture under its heat

/** The picture as dropped tokens show it, grey and dark. */
function dimmed(picture) {
  const canvas = element("canvas", { width: picture.width, height: picture.height });
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height), values = pixels.data;
  for (let i = 0; i < values.length; i += 4) {
    const grey = data.dim * (0.299 * values[i] + 0.587 * values[i + 1] + 0.114 * values[i + 2]);
    values[i] = values[i + 1] = values[i + 2] = grey;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** Draws one frame; `first` is where its tokens begin among the visual's. */
function paint(canvas, frame, visual, first, shares) {
  const { width, height } = canvas, context = canvas.getContext("2d");
  const [, rows, columns] = visual.grid, force = strength.value / 100;
  context.globalAlpha = 1;
  context.drawImage(frame.picture, 0, 0, width, height);
  context.globalAlpha = force;
  context.drawImage(frame.dark, 0, 0, width, height);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const share = shares[visual.positions[first + row * columns + column]];
      if (share > 0) paintCell(context, frame, share, force, [
        Math.ceil((column * width) / columns), Math.ceil((row * height) / rows),
        Math.ceil(((column + 1) * width) / columns), Math.ceil(((row + 1) * height) / rows),
      ]);
    }
  }
}

function paintCell(context, { picture }, share, force, [left, top, right, bottom]) {
  const { width, height } = context.canvas, across = right - left, down = bottom - top;
  const [x, y] = [picture.width / width, picture.height / height];
  context.globalAlpha = Math.sqrt(share);
  context.drawImage(picture, left * x, top * y, across * x, down * y, left, top, across, down);
  context.fillStyle = css(share);
  context.globalAlpha = force * data.tint;
  context.fillRect(left, top, across, down);
  const thick = [Math.floor(across / data.frame), Math.floor(down / data.frame)];
  context.globalAlpha = force;
  context.fillRect(left, top, across, thick[1]);
  context.fillRect(left, bottom - thick[1], across, thick[1]);
  context.fillRect(left, top, thick[0], down);
  context.fillRect(right - thick[0], top, thick[0], down);
}

async function load(source, [, rows, columns]) {
  const plain = element("canvas", { width: columns * 16, height: rows * 16 });
  if (!source) {
    const context = plain.getContext("2d");
    context.fillStyle = "#b0b0b0";
    context.fillRect(0, 0, plain.width, plain.height);
    return { picture: plain, dark: dimmed(plain) };
  }
  const picture = new Image();
  picture.src = source;
  await picture.decode();
  return { picture, dark: dimmed(picture) };
}

/** A canvas to draw a picture of this size on, `width` pixels wide. */
function canvasFor({ picture }, width, properties) {
  return element("canvas", { width, height: Math.round((width * picture.height) / picture.width), ...properties });
}

// The parts of the page

async function addVisual(visual) {
  const title = element("h2"), section = element("section", {}, title);
  at("visuals").append(section);
  title.id = `title-${visual.name.replace(" ", "-")}`;
  section.setAttribute("aria-labelledby", title.id);
  const total = visual.positions.length;
  redraws.push(() => {
    const count = visual.positions.reduce((sum, position) => sum + heat[position], 0);
    title.textContent = `${visual.name}: keeps ${tokens(count)} of ${total.toLocaleString("en-US")} tokens`;
  });
  if (!visual.grid) {
    section.append(
      element("p", { className: "soft" }, "The model does not state how these tokens lie in the picture."),
      band(visual.positions, visual.name));
    return;
  }
  const [times, rows, columns] = visual.grid;
  const frames = [];
  for (let time = 0; time < times; time++) frames.push(await load(visual.pictures[time], visual.grid));
  const large = element("div", { className: "frames" });
  large.style.setProperty("--frame", times > 12 ? "180px" : times > 2 ? "280px" : times > 1 ? "400px" : "100%");
  for (let time = 0; time < times; time++) large.append(frameOf(visual, frames[time], time));
  if (data.alone) {
    section.append(element("div", { className: "parts wide" }, large));
    return;
  }
  const layers = element("div", { className: "layers" });
  for (let layer = 0; layer < numLayers; layer++) {
    layers.append(times > 1 ? barsOf(visual, layer) : thumbOf(visual, frames[0], layer));
  }
  if (times > 1) layers.prepend(barsOf(visual, null));
  layers.style.setProperty("--layer", numLayers > 4 || times > 1 ? "165px" : "200px");
  const wide = times > 1 || columns > 1.6 * rows || numLayers > 12;
  section.append(element("div", { className: wide ? "parts wide" : "parts" }, large, layers));
}

/** One frame, large; the pointer or the arrow keys go from token to token. */
function frameOf(visual, frame, time) {
  const [times, rows, columns] = visual.grid, first = time * rows * columns;
  const canvas = canvasFor(frame, times > 16 ? 320 : times > 1 ? 640 : 1024, { className: "heat", tabIndex: 0 });
  canvas.setAttribute("role", "img");
  const name = times > 1 ? `${visual.name}, frame ${time}` : visual.name;
  const caption = element("figcaption");
  const cursor = { row: 0, column: 0, shown: false };
  const redraw = () => {
    paint(canvas, frame, visual, first, heat);
    const own = visual.positions.slice(first, first + rows * columns).map((position) => heat[position]);
    const count = tokens(own.reduce((sum, share) => sum + share, 0));
    canvas.setAttribute("aria-label",
      `${name}: heat map of the kept tokens, ${count} of ${own.length}. Arrow keys go from token to token.`);
    caption.textContent = times > 1 ? `frame ${time}: ${count} tokens` : "";
    if (cursor.shown) outline(canvas, rows, columns, cursor);
  };
  const tell = () => {
    const position = visual.positions[first + cursor.row * columns + cursor.column];
    readout.value = describe(position, `${name}, row ${cursor.row}, column ${cursor.column}`);
    redraw();
  };
  const leave = () => { cursor.shown = false; redraw(); };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const column = clamp(Math.floor((event.offsetX / box.width) * columns), columns);
    const row = clamp(Math.floor((event.offsetY / box.height) * rows), rows);
    if (cursor.shown && column === cursor.column && row === cursor.row) return;
    Object.assign(cursor, { column, row, shown: true });
    tell();
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("focus", () => { cursor.shown = true; tell(); });
  canvas.addEventListener("blur", leave);
  canvas.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    cursor.column = clamp(cursor.column + step[0], columns);
    cursor.row = clamp(cursor.row + step[1], rows);
    cursor.shown = true;
    tell();
  });
  redraws.push(redraw);
  return element("figure", {}, canvas, caption);
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));

function outline(canvas, rows, columns, { row, column }) {
  const context = canvas.getContext("2d"), [x, y] = [canvas.width / columns, canvas.height / rows];
  context.globalAlpha = 1;
  for (const [colour, width] of [["#000", 5], ["#fff", 2]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: width });
    context.strokeRect(column * x + 2, row * y + 2, x - 4, y - 4);
  }
}

/** A button that chooses the layer (null for all), or all when it is chosen already. */
function layerButton(layer, inner) {
  const caption = element("span");
  const button = element("button", { type: "button" }, inner, caption);
  button.addEventListener("click", () => {
    layerChoice.value = layer === null || choice(layerChoice) === layer ? "" : String(layer);
    draw();
  });
  redraws.push(() => button.setAttribute("aria-pressed", String(choice(layerChoice) === layer)));
  return [button, caption];
}

function thumbOf(visual, frame, layer) {
  const canvas = canvasFor(frame, 320);
  canvas.setAttribute("aria-hidden", "true");
  const [button, caption] = layerButton(layer, canvas);
  redraws.push(() => {
    const shares = layerHeats[layer];
    paint(canvas, frame, visual, 0, shares);
    const count = visual.positions.reduce((sum, position) => sum + shares[position], 0);
    caption.textContent = `layer ${layer}: ${tokens(count)} tokens`;
  });
  return button;
}

/** Tokens kept of each frame by a layer, or by all on average; a video's layers are on one scale. */
function barsOf(visual, layer) {
  const [times, rows, columns] = visual.grid, size = rows * columns;
  const bars = element("div", { className: "bars" });
  const [button, caption] = layerButton(layer, bars);
  const counts = (shares) => [...Array(times).keys()].map((time) =>
    visual.positions.slice(time * size, (time + 1) * size).reduce((sum, position) => sum + shares[position], 0));
  redraws.push(() => {
    const own = counts(layer === null ? allHeat : layerHeats[layer]);
    const most = Math.max(...layerHeats.map((shares) => Math.max(...counts(shares)))) || 1;
    bars.replaceChildren(...own.map((count, time) => {
      const bar = element("i", { title: `frame ${time}: ${tokens(count)} tokens` });
      bar.style.height = `${(100 * count) / most}%`;
      return bar;
    }));
    const name = layer === null ? "all layers" : `layer ${layer}`;
    caption.textContent = `${name}: ${tokens(own.reduce((sum, count) => sum + count, 0))} tokens`;
    bars.setAttribute("aria-label", `tokens of each frame: ${own.map(tokens).join(", ")}`);
  });
  bars.setAttribute("role", "img");
  return button;
}

function addBudget() {
  if (data.alone) {
    at("budget").closest("section").hidden = true;
    return;
  }
  const most = Math.max(...data.rows);
  const bar = (share, label) => {
    const filled = element("i");
    filled.style.width = `${70 * share}%`;
    return element("td", {}, element("div", { className: "bar" }, filled, label));
  };
  data.rows.forEach((rows, layer) => {
    const sparsity = data.sparsity && data.sparsity[layer];
    at("budget").tBodies[0].append(element("tr", {},
      element("th", { scope: "row" }, String(layer)),
      bar(rows / most, `${rows.toLocaleString("en-US")} (${percent(rows / numTokens)})`),
      data.sparsity ? bar(sparsity, percent(sparsity)) : element("td", {}, "not measured")));
  });
}

/** The text tokens in order, and every picture where it stands. */
function addText() {
  const visualAt = new Map(data.visuals.flatMap((visual) => visual.positions.map((p) => [p, visual])));
  const spans = [], text = at("text");
  let seen = null;
  for (let position = 0; position < numTokens; position++) {
    const visual = visualAt.get(position);
    if (visual && visual !== seen) text.append(element("span", { className: "visual" }, visual.name));
    seen = visual;
    if (visual) continue;
    const span = element("span", {}, data.tokens[position]);
    spans.push([span, position]);
    text.append(span);
  }
  let current = 0;
  const tell = (number) => {
    spans[current][0].classList.remove("here");
    current = number;
    readout.value = describe(spans[current][1], `“${data.tokens[spans[current][1]]}”`);
  };
  spans.forEach(([span], number) => span.addEventListener("pointerenter", () => tell(number)));
  const mark = () => { spans[current][0].classList.add("here"); };
  text.addEventListener("focus", () => { tell(current); mark(); });
  text.addEventListener("blur", () => spans[current][0].classList.remove("here"));
  text.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    tell(clamp(current + step[0] + step[1], spans.length));
    mark();
  });
  redraws.push(() => {
    for (const [span, position] of spans) {
      const share = heat[position];
      span.style.background = css(share);
      span.style.color = tone(share)[1] < data.dark ? "#fff" : "#000";
      span.title = describe(position, data.tokens[position]);
    }
  });
}

/** The heat of these positions, one beside the other. */
function band(positions, name) {
  const canvas = element("canvas", { width: positions.length, height: 1, className: "band" });
  canvas.setAttribute("role", "img");
  redraws.push(() => {
    const context = canvas.getContext("2d");
    const kept = positions.filter((position) => heat[position] > 0).length;
    canvas.setAttribute("aria-label", `${name}: ${kept} of ${positions.length} positions kept by a chosen layer and head`);
    positions.forEach((position, x) => {
      context.fillStyle = css(heat[position]);
      context.fillRect(x, 0, 1, 1);
    });
  });
  return canvas;
}

function addBand() {
  const spans = element("div", { id: "spans" });
  for (const { name, positions } of data.visuals) {
    const span = element("span", {}, name), [start, end] = [positions[0], positions[positions.length - 1] + 1];
    span.style.left = `${(100 * start) / numTokens}%`;
    span.style.width = `${(100 * (end - start)) / numTokens}%`;
    spans.append(span);
  }
  at("band").append(band([...Array(numTokens).keys()], "the prompt"), spans);
}

function addControls() {
  const options = (select, all, name, count, value) => {
    select.append(element("option", { value: "" }, all));
    for (let i = 0; i < count; i++) select.append(element("option", { value: String(i) }, `${name} ${i}`));
    select.value = value === null ? "" : String(value);
  };
  options(layerChoice, `all ${numLayers} layers`, "layer", numLayers, data.layer);
  options(headChoice, `all ${numHeads} heads`, "head", numHeads, data.head);
  for (const select of [layerChoice, headChoice]) {
    select.addEventListener("change", draw);
    select.hidden = select.labels[0].hidden = data.alone;
  }
  strength.addEventListener("input", draw);
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  const ramp = at("ramp"), context = ramp.getContext("2d");
  for (let x = 0; x < ramp.width; x++) {
    context.fillStyle = css(x / (ramp.width - 1));
    context.fillRect(x, 0, 1, ramp.height);
  }
}

function draw() {
  layerHeats = bits.map((_, layer) => heatOf(layer, choice(headChoice)));
  allHeat = mean(layerHeats);
  heat = choice(layerChoice) === null ? allHeat : layerHeats[choice(layerChoice)];
  const what = [
    choice(layerChoice) === null ? `all ${numLayers} layers` : `layer ${layerChoice.value}`,
    choice(headChoice) === null ? `all ${numHeads} KV heads` : `KV head ${headChoice.value}`,
  ];
  const shown = data.alone ? "All tokens are kept." : `Share of ${what.join(" and ")} that kept a token.`;
  readout.value = `${shown} Point at one, or use the arrow keys on a picture.`;
  for (const redraw of redraws) redraw();
}

async function main() {
  addControls();
  for (const visual of data.visuals) await addVisual(visual);
  addBudget();
  addText();
  addBand();
  draw();
  document.body.dataset.ready = "true";
}

main();
