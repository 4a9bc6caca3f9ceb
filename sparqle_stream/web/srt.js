// Words with times into SubRip cues: at most two lines, at most 7 s, a new one after a sentence.

const LINE = 42;
const MAX_S = 7;
const PAUSE_S = 1;

function stamp(seconds) {
  const ms = Math.max(0, Math.round(seconds * 1000));
  const pad = (n, width) => String(n).padStart(width, "0");
  const minutes = Math.floor(ms / 60_000);
  return `${pad(Math.floor(minutes / 60), 2)}:${pad(minutes % 60, 2)}:${pad(Math.floor(ms / 1000) % 60, 2)},${pad(ms % 1000, 3)}`;
}

function lines(text) {
  if (text.length <= LINE) return text;
  let at = -1;
  for (let i = text.indexOf(" "); i >= 0; i = text.indexOf(" ", i + 1)) {
    if (at < 0 || Math.abs(i - text.length / 2) < Math.abs(at - text.length / 2)) at = i;
  }
  return at < 0 ? text : `${text.slice(0, at)}\n${text.slice(at + 1)}`;
}

export function toSrt(words) {
  const cues = [];
  let cue = null;
  for (const { word, start, end } of words) {
    const text = word.trim();
    const isFull = cue && (
      lines(`${cue.text} ${text}`).split("\n").some((line) => line.length > LINE)
      || end - cue.start > MAX_S
      || start - cue.end > PAUSE_S
      || (/[.?!]$/.test(cue.text) && cue.text.length > 12)
    );
    if (!cue || isFull) cues.push(cue = { start, end, text });
    else Object.assign(cue, { end, text: `${cue.text} ${text}` });
  }
  return cues.map((c, i) => `${i + 1}\n${stamp(c.start)} --> ${stamp(c.end)}\n${lines(c.text)}\n`).join("\n");
}
