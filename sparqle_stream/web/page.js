// Live captions from the microphone or a file. Text goes in as text, never as HTML.

import { toSrt } from "./srt.js";
import { CaptionStream } from "./stream.js";

const MAX_RATE = 48_000;
const FILE_RATE = 16_000;
const FILE_BLOCK = 8_000;
const AGAIN_MS = 5_000; // after which an overlay that lost its server begins anew

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const captions = $("captions");
let words = [];
let stream = null;
let release = () => {};
let paragraph = null;
let tail = null;

// --- looks --------------------------------------------------------------------------------------

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch { /* a browser that keeps nothing: the choice lasts as long as the page */ }
}

function recall(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

const asked = new URLSearchParams(location.search);
for (const name of ["large", "contrast"]) {
  const button = $(name);
  const show = (isOn) => {
    root.classList.toggle(name, isOn);
    button.setAttribute("aria-pressed", isOn);
  };
  show(asked.has(name) || recall(name) === "true");
  button.onclick = () => {
    const isOn = !root.classList.contains(name);
    show(isOn);
    remember(name, isOn);
  };
}
if (asked.get("theme") === "transparent") root.classList.add("transparent");

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

// --- captions -----------------------------------------------------------------------------------

function newParagraph() {
  if (paragraph && !paragraph.firstChild.textContent) return;
  paragraph = document.createElement("p");
  tail = document.createElement("span");
  tail.className = "tail";
  tail.setAttribute("aria-hidden", "true"); // read aloud only once it is final
  paragraph.append(document.createTextNode(""), tail);
  captions.append(paragraph);
}

function show(event) {
  const isAtEnd = captions.scrollHeight - captions.scrollTop - captions.clientHeight < 80;
  if (event.type === "final") {
    const text = paragraph.firstChild;
    text.appendData(text.length ? event.text : event.text.trimStart());
    tail.textContent = "";
    words.push(...event.words);
    $("srt").disabled = $("clear").disabled = false;
  } else if (event.type === "tail") {
    tail.textContent = event.text && (paragraph.firstChild.length ? ` ${event.text.trim()}` : event.text.trim());
  }
  if (isAtEnd) captions.scrollTop = captions.scrollHeight;
}

function onEvent(event) {
  if ("lag" in event) {
    $("lag").value = `${event.lag.toFixed(1)} s`;
    const seconds = Math.floor(event.time);
    $("time").value = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }
  switch (event.type) {
    case "ready": return say(`Listening with ${event.model}.`);
    case "speech_started": return newParagraph();
    case "final": case "tail": return show(event);
    case "warning": return say(event.message);
    case "lost": return say("The connection was lost; trying again.");
    case "error": return finish(`${event.message}. ${event.hint}`, true);
    case "closed":
      finish(event.message, true);
      if (asked.has("start")) setTimeout(startAgain, AGAIN_MS);
      return;
    case "done": return finish("Done.");
  }
}

function finish(text, isError = false) {
  if (tail) tail.textContent = "";
  release();
  release = () => {};
  stream = null;
  $("level").value = 0;
  setRunning(false);
  say(text, isError);
}

function setRunning(isRunning) {
  const focused = document.activeElement;
  $("mic").disabled = $("file").disabled = isRunning;
  $("stop").disabled = !isRunning;
  // A button that is switched off loses the focus; who works by keyboard goes on with the other.
  if (isRunning && (focused === $("mic") || focused === $("file"))) $("stop").focus();
  if (!isRunning && focused === $("stop")) $("mic").focus();
}

// --- sound --------------------------------------------------------------------------------------

function toInt16(samples) {
  const out = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) out[i] = Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32768)));
  return out;
}

function showLevel(samples) {
  let sum = 0;
  for (const x of samples) sum += x * x;
  $("level").value = Math.min(1, 3 * Math.sqrt(sum / samples.length));
}

function begin(rate, pace) {
  newParagraph();
  stream = new CaptionStream({ rate, pace, key: $("key").value.trim(), onEvent });
  return stream;
}

async function startMicrophone() {
  setRunning(true);
  say("Asking for the microphone.");
  let media, context;
  try {
    if (!navigator.mediaDevices) throw new Error("browsers give a microphone to https and to this machine only");
    media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false } });
    context = new AudioContext();
    if (context.sampleRate > MAX_RATE) {
      await context.close();
      context = new AudioContext({ sampleRate: MAX_RATE });
    }
    await context.audioWorklet.addModule("worklet.js");
  } catch (error) {
    media?.getTracks().forEach((track) => track.stop());
    await context?.close();
    return finish(`No microphone: ${error.message}.`, true);
  }
  const node = new AudioWorkletNode(context, "blocks", { numberOfOutputs: 0 });
  const own = begin(context.sampleRate, "live");
  node.port.onmessage = ({ data }) => {
    showLevel(data);
    own.send(toInt16(data));
  };
  context.createMediaStreamSource(media).connect(node);
  for (const track of media.getTracks()) track.onended = stop;
  release = () => {
    node.port.onmessage = null;
    media.getTracks().forEach((track) => track.stop());
    context.close();
  };
}

function startAgain() {
  if (!$("mic").disabled) startMicrophone(); // unless somebody was quicker
}

async function startFile(file) {
  setRunning(true);
  say(`Reading ${file.name}.`);
  let sound;
  try {
    sound = await new OfflineAudioContext(1, 1, FILE_RATE).decodeAudioData(await file.arrayBuffer());
  } catch {
    return finish(`${file.name} has no sound that this browser can read.`, true);
  }
  const own = begin(FILE_RATE, "file");
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  for (let at = 0; at < sound.length && !own.isOver && !own.isEnded; at += FILE_BLOCK) {
    const block = new Float32Array(Math.min(FILE_BLOCK, sound.length - at));
    for (const channel of channels) for (let i = 0; i < block.length; i++) block[i] += channel[at + i] / channels.length;
    await own.room();
    showLevel(block);
    own.send(toInt16(block));
  }
  own.end();
}

function stop() {
  release();
  release = () => {};
  if (!stream) return;
  say("The last words are on their way.");
  stream.end();
}

// --- controls -----------------------------------------------------------------------------------

$("mic").onclick = startMicrophone;
$("stop").onclick = stop;
$("file").onchange = () => {
  const [file] = $("file").files;
  $("file").value = ""; // the same file may be chosen again
  if (file) startFile(file);
};
$("clear").onclick = () => {
  captions.replaceChildren();
  paragraph = null;
  words = [];
  newParagraph();
  $("srt").disabled = $("clear").disabled = true;
  $("mic").focus();
};
$("srt").onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([toSrt(words)], { type: "application/x-subrip" }));
  link.download = "captions.srt";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
$("controls").onsubmit = (event) => event.preventDefault();

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  const [file] = event.dataTransfer.files;
  if (file && !stream) startFile(file);
});
if (asked.has("start")) startMicrophone(); // for overlays, which have no hands
