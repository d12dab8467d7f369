// The page: holds the conversation, and sends all of it with every question.

import { Problem, ask } from "./chat.js";
import { element, show } from "./report.js";

const at = (id) => document.getElementById(id);
const config = await (await fetch("config")).json();

let turns = []; // {question, media, answer}: the conversation so far
let pending = []; // {name, url, video}: media of the next question; url is a data URL
let opened = null; // the video in the player, as one of `pending`
let running = null; // the AbortController of the question under way

at("server").textContent = config.server;
at("files").accept = config.types.join();

// Media

async function open(files) {
  problem(null);
  for (const file of files) {
    if (!config.types.includes(file.type)) {
      const known = config.types.map((type) => type.split("/")[1]).join(", ");
      return problem(`${file.name} is of type ${file.type || "unknown"}; this page sends ${known}.`);
    }
    if (!fits(file.name, Math.ceil(file.size / 3) * 4)) return;
    const media = { name: file.name, url: await dataUrl(file), video: file.type.startsWith("video/") };
    if (media.video) play(file, media);
    add(media);
  }
}

function fits(name, size) {
  const all = [...pending, ...turns.flatMap((turn) => turn.media)];
  const used = all.reduce((sum, media) => sum + media.url.length, 0);
  if (used + size <= config.max_bytes) return true;
  const mb = (n) => `${(n / 1e6).toFixed(1)} MB`;
  const besides = used ? `, and ${mb(used)} are in this one already` : "";
  const holds = `a conversation holds ${mb(config.max_bytes)}${besides}`;
  problem(`${name} is too large: encoded it takes ${mb(size)}, ${holds}.`);
  return false;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function play(file, media) {
  if (at("video").src) URL.revokeObjectURL(at("video").src);
  opened = media;
  at("grab").disabled = true;
  at("video").src = URL.createObjectURL(file);
  at("player").hidden = false;
}

for (const [event, ready] of [["loadeddata", true], ["seeking", false], ["seeked", true]]) {
  at("video").addEventListener(event, () => { at("grab").disabled = !ready; });
}
at("video").addEventListener("error", () => {
  if (opened) problem(`This browser cannot show ${opened.name}. It can be sent whole, without frames of it.`);
});

at("grab").addEventListener("click", () => {
  const video = at("video");
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  const url = canvas.toDataURL("image/png");
  const name = `frame at ${video.currentTime.toFixed(2)} s`;
  if (fits(name, url.length)) add({ name, url, video: false });
});

at("whole").addEventListener("click", () => {
  if (fits(opened.name, opened.url.length)) add(opened);
});

function add(media) {
  pending.push(media);
  drawPending();
  at("question").focus();
}

function drawPending() {
  at("pending").replaceChildren(...pending.map((media, i) => {
    const item = element("li");
    const remove = element("button", { type: "button", "aria-label": `Remove ${media.name}` }, "×");
    remove.addEventListener("click", () => {
      pending.splice(i, 1);
      drawPending();
      at("question").focus();
    });
    item.append(preview(media), element("span", {}, media.name), remove);
    return item;
  }));
}

function preview(media) {
  if (!media.video) return element("img", { src: media.url, alt: media.name });
  const video = element("video", { src: media.url, "aria-label": media.name, preload: "auto" });
  video.muted = true;
  return video;
}

at("files").addEventListener("change", async () => {
  await open([...at("files").files]);
  at("files").value = "";
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  open([...event.dataTransfer.files]);
});
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", async () => {
    const blob = await (await fetch(`samples/${button.dataset.sample}`)).blob();
    open([new File([blob], button.dataset.sample, { type: blob.type })]);
  });
}

// Questions and answers

async function send() {
  const turn = { question: at("question").value.trim(), media: pending };
  if (!turn.question || running) return;
  const history = turns;
  const body = conversation(turn);
  turn.answer = "";
  const drawn = drawTurn(turn);
  problem(null);
  pending = [];
  at("question").value = "";
  drawPending();
  begin();
  let failure = null;
  try {
    for await (const event of ask(body, running.signal)) {
      turn.answer += event.text ?? "";
      drawn.answer.textContent = turn.answer.trim();
      if (event.finish_reason) drawEnd(drawn, event);
      drawn.item.scrollIntoView({ block: "nearest" });
    }
  } catch (error) {
    failure = error;
  }
  finish();
  if (turns !== history) return; // a new conversation has begun
  const stopped = failure?.name === "AbortError";
  if (!failure || (stopped && turn.answer)) turns.push(turn);
  else takeBack(turn, drawn);
  if (stopped) note(drawn, "Stopped.");
  else if (failure instanceof Problem) problem(failure.message);
  else if (failure) throw failure;
}

/** What the app is sent: everything so far, the new turn, and the chosen policy. */
function conversation(turn) {
  const custom = {};
  if (at("policy").value.trim()) custom.kv_policy = at("policy").value.trim();
  if (at("budget").value) custom.kv_budget = Number(at("budget").value);
  const all = [...turns, turn].map((one) => ({ ...one, media: one.media.map((media) => media.url) }));
  return { turns: all, custom_params: custom };
}

function begin() {
  running = new AbortController();
  at("turns").setAttribute("aria-busy", "true"); // announced once it is whole
  at("stop").hidden = false;
  if (document.activeElement === at("ask")) at("stop").focus();
  at("ask").hidden = true;
}

function finish() {
  running = null;
  at("turns").setAttribute("aria-busy", "false");
  at("ask").hidden = false;
  if (document.activeElement === at("stop")) at("question").focus();
  at("stop").hidden = true;
}

/** A question without an answer goes back to where it was typed, for another try. */
function takeBack(turn, { item }) {
  if (turn.answer) item.classList.add("failed");
  else item.remove();
  pending = [...turn.media, ...pending];
  at("question").value ||= turn.question;
  at("empty").hidden = at("turns").hasChildNodes();
  drawPending();
}

function drawTurn(turn) {
  const item = element("li");
  const asked = element("div", { class: "question" });
  asked.append(...turn.media.map(preview), element("p", {}, turn.question));
  const answer = element("p", { class: "answer" });
  item.append(asked, answer);
  at("turns").append(item);
  at("empty").hidden = true;
  return { item, answer };
}

function note({ item }, text) {
  item.append(element("p", { class: "note" }, text));
}

function drawEnd(drawn, { id, finish_reason, report, summary }) {
  if (finish_reason !== "stop") note(drawn, `Cut off: ${finish_reason}.`);
  const button = element("button", { type: "button", class: "link summary", "data-id": id }, summary);
  button.addEventListener("click", () => drawReport(button, report, summary));
  drawn.item.append(button);
  drawReport(button, report, summary);
}

function drawReport(button, report, summary) {
  for (const other of document.querySelectorAll(".summary")) {
    other.setAttribute("aria-pressed", other === button);
  }
  at("nothing").hidden = true;
  at("report").hidden = false;
  show(at("report"), report, summary);
}

function problem(text) {
  at("problem").hidden = !text;
  at("problem").textContent = text ?? "";
  at("problem").scrollIntoView({ block: "nearest" });
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
at("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
for (const button of document.querySelectorAll(".questions button")) {
  button.addEventListener("click", () => {
    at("question").value = button.textContent;
    at("question").focus();
  });
}
at("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  pending = [];
  opened = null;
  at("video").removeAttribute("src");
  at("player").hidden = true;
  at("turns").replaceChildren();
  at("empty").hidden = false;
  at("report").hidden = true;
  at("nothing").hidden = false;
  at("question").value = "";
  problem(null);
  drawPending();
  at("files").focus();
});
