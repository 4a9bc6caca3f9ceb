// A stream of /v1/stream that survives its connection: audio that the server has not acknowledged
// is kept and sent again (docs/protocol.md, Resuming).

const RETRY = new Set([1001, 1006, 1011, 1012, 1013]);
const PATIENCE_MS = 30_000;
const MAX_BUFFERED = 1 << 19; // bytes that may wait in the browser for the network
const TOKEN = /^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$/; // what a subprotocol may be made of

export class CaptionStream {
  // onEvent gets the server's events, and {type: "lost"} and {type: "closed", message} of our own.
  constructor({ rate, key, pace, onEvent }) {
    this.rate = rate;
    this.key = key;
    this.pace = pace;
    this.onEvent = onEvent;
    this.kept = []; // {start, samples: Int16Array}
    this.received = 0; // samples
    this.acked = 0;
    this.after = 0;
    this.segment = -1;
    this.isSpeech = false;
    this.id = "";
    this.isEnded = false;
    this.isOver = false;
    this.lostAt = 0;
    this.pause = 50;
    this.connect();
  }

  connect() {
    const query = new URLSearchParams({ format: "s16le", sample_rate: this.rate, ack: "on", pace: this.pace });
    if (this.id) {
      query.set("stream_id", this.id);
      query.set("offset", this.acked);
      query.set("after", this.after.toFixed(3));
      query.set("segment", Math.max(0, this.isSpeech ? this.segment : this.segment + 1));
      query.set("pace", "file");
    }
    const protocols = ["sparqle-stream"];
    if (this.key && TOKEN.test(this.key)) protocols.push(`openai-insecure-api-key.${this.key}`);
    else if (this.key) query.set("token", this.key);
    const url = new URL("v1/stream", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    url.search = query;
    this.isOpen = false;
    this.socket = new WebSocket(url, protocols);
    this.socket.onopen = () => this.resend();
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = ({ code, reason }) => this.closed(code, reason);
  }

  resend() {
    this.isOpen = true;
    for (const { start, samples } of this.kept) {
      this.socket.send(start < this.acked ? samples.slice(this.acked - start) : samples);
    }
    if (this.isEnded) this.socket.send('{"type": "end"}');
  }

  send(samples) {
    if (this.isOver || this.isEnded) return;
    this.kept.push({ start: this.received, samples });
    this.received += samples.length;
    if (this.isOpen) this.socket.send(samples);
  }

  // For files: resolves when the network has taken most of what was sent.
  async room() {
    while (!this.isOver && (!this.isOpen || this.socket.bufferedAmount > MAX_BUFFERED)) {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }

  end() {
    if (this.isEnded) return;
    this.isEnded = true;
    if (this.isOpen) this.socket.send('{"type": "end"}');
  }

  receive(event) {
    if (event.type === "acknowledged") {
      this.acked = Math.max(this.acked, event.offset);
      while (this.kept.length && this.kept[0].start + this.kept[0].samples.length <= this.acked) this.kept.shift();
      this.renew();
      return;
    }
    if (event.type === "ready") {
      if (this.id) return;
      this.id = event.stream_id;
    } else if (event.type === "final") {
      for (const word of event.words) this.after = Math.max(this.after, word.end);
      this.segment = Math.max(this.segment, event.segment);
      this.renew();
    } else if (event.type === "speech_started" || event.type === "speech_stopped") {
      const isStart = event.type === "speech_started";
      if (isStart === this.isSpeech) return;
      this.isSpeech = isStart;
      if (isStart) this.segment += 1;
    }
    if (event.type === "done" || event.type === "error") this.isOver = true;
    this.onEvent(event);
  }

  renew() {
    this.lostAt = 0;
    this.pause = 50;
  }

  closed(code, reason) {
    this.isOpen = false;
    if (this.isOver) return;
    this.lostAt ||= performance.now();
    if (this.id && RETRY.has(code) && performance.now() - this.lostAt < PATIENCE_MS) {
      this.onEvent({ type: "lost" });
      setTimeout(() => this.connect(), this.pause * (0.5 + Math.random() / 2));
      this.pause = Math.min(2000, this.pause * 2);
      return;
    }
    this.isOver = true;
    const message = this.id
      ? `The connection was lost: ${reason || code}.`
      : "The server did not accept the connection: is it busy, or is the key wrong?";
    this.onEvent({ type: "closed", message });
  }
}
