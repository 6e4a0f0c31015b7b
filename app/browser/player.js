// The step that charts show: a slider and a play button. While it is held or plays, charts draw frames they already
// have and take no new numbers; when it is let go, Python hears the step.

const players = new WeakMap();

export default function ({ data, parentElement, setTriggerValue }) {
  let player = players.get(parentElement);
  if (!player) players.set(parentElement, (player = new Player(parentElement)));
  player.report = setTriggerValue;
  player.show(data);
  return () => setTimeout(() => parentElement.isConnected || player.close());
}

const FRAME = 140; // milliseconds a frame at least
const WHOLE = 7000; // about this long for all of them,
const SLOW = 700; // but where there are few, a frame at most

class Player {
  constructor(parent) {
    this.root = parent.querySelector(".depthscope-player");
    [this.button, this.range, this.label] = ["button", "input", "output"].map((tag) => this.root.querySelector(tag));
    this.range.addEventListener("input", () => this.hold());
    this.range.addEventListener("change", () => this.timer || this.release());
    this.button.addEventListener("click", () => (this.timer ? this.pause() : this.play()));
  }

  show(data) {
    this.next = data;
    // The whole bar, with the controls beside the player, hides what is scrolled below it.
    const bar = this.root.closest(".st-key-player");
    if (bar) bar.style.background = getComputedStyle(this.root).backgroundColor;
    if (this.pressed || this.timer) return;
    const { steps, at } = (this.data = data);
    this.range.max = steps.length - 1;
    this.range.value = at;
    this.tell();
    this.free();
  }

  get at() {
    return Number(this.range.value);
  }

  hold() {
    this.pressed = true;
    clearTimeout(this.late);
    window.depthscopePlayer = { held: true, step: this.data.steps[this.at] };
    this.tell();
    document.dispatchEvent(new Event("depthscope-step"));
  }

  // Charts stay held until Python has answered with this step, or a moment has passed.
  release() {
    this.pressed = false;
    const step = this.data.steps[this.at];
    const last = this.at === this.data.steps.length - 1;
    if (this.at === this.data.at) return this.show(this.next);
    this.data = { ...this.data, at: this.at };
    this.report("step", { step: last ? null : step });
    this.late = setTimeout(() => this.show(this.next), 4000);
  }

  free() {
    clearTimeout(this.late);
    if (!window.depthscopePlayer?.held) return;
    window.depthscopePlayer = { held: false, step: this.data.steps[this.at] };
    document.dispatchEvent(new Event("depthscope-step"));
  }

  play() {
    const count = this.data.steps.length;
    if (this.at === count - 1) this.range.value = 0;
    this.hold();
    this.timer = setInterval(() => {
      if (this.at >= count - 1) return this.pause();
      this.range.value = this.at + 1;
      this.hold();
    }, Math.min(SLOW, Math.max(FRAME, WHOLE / count)));
    this.face();
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.face();
    this.release();
  }

  face() {
    this.button.classList.toggle("plays", Boolean(this.timer));
    this.button.setAttribute("aria-label", this.timer ? "Pause" : "Play the training");
  }

  tell() {
    const { steps } = this.data;
    const now = steps[this.at].toLocaleString("en-US");
    const end = this.at === steps.length - 1 ? ", the latest" : ` of ${steps.at(-1).toLocaleString("en-US")}`;
    this.label.textContent = `Step ${now}${end}`;
    this.range.setAttribute("aria-valuetext", `step ${now}`);
    this.range.style.setProperty("--done", `${(100 * this.at) / Math.max(1, steps.length - 1)}%`);
  }

  close() {
    clearInterval(this.timer);
    clearTimeout(this.late);
    window.depthscopePlayer = undefined;
  }
}
