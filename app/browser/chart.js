// One chart. A new specification is drawn behind the old picture and then takes its place; new numbers for the same
// specification go into the living view, so that zoom, hover and the page element stay. While somebody holds the
// player, new numbers wait. A chart whose usermeta tells of `cells` is painted (cells.js); one that tells of `room` is
// as high as the window leaves it.

const charts = new WeakMap();
let turn = Promise.resolve();

export default function ({ data, parentElement, setTriggerValue }) {
  let chart = charts.get(parentElement);
  if (!chart) charts.set(parentElement, (chart = new Chart(parentElement)));
  chart.report = setTriggerValue;
  chart.show(data);
  // Streamlit also calls this for a call that a newer one overtook.
  return () => setTimeout(() => parentElement.isConnected || chart.close());
}

class Chart {
  constructor(parent) {
    this.home = document.createElement("div");
    this.home.className = "depthscope-chart";
    this.home.dataset.testid = "stVegaLiteChart"; // found where Streamlit's own charts are
    this.home.style.cssText = "position:relative;width:100%;overflow:hidden";
    parent.append(this.home);
    this.onStep = () => (held() ? this.play() : this.show(this.latest));
    document.addEventListener("depthscope-step", this.onStep);
    this.sizes = new ResizeObserver(() => this.fit());
    this.sizes.observe(this.home);
    this.onResize = () => this.fit();
    window.addEventListener("resize", this.onResize);
    this.home.addEventListener("keydown", (event) => this.onKey(event));
    for (const move of ["pointermove", "pointerdown", "pointerleave"])
      this.home.addEventListener(move, (event) => this.cells?.hover(event), { capture: true });
  }

  async show(data) {
    this.latest = data;
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.latest !== this.drawn && !(held() && this.view)) {
        const next = this.latest;
        await this.draw(next);
        this.drawn = next;
        this.frame = null;
      }
    } finally {
      this.busy = false;
    }
    if (held()) this.play();
  }

  async draw(next) {
    const look = theme(this.home);
    const shape = next.spec + look.key;
    const painted = JSON.parse(next.spec).usermeta?.cells ? next.tables[0] : null;
    const tables = Object.fromEntries(next.tables.map((name) => [name, name === painted ? [] : rows(next[name])]));
    if (shape === this.shape) {
      for (const [name, value] of Object.entries(next.signals)) this.view.signal(name, value);
      for (const [name, values] of Object.entries(tables)) if (name !== painted) this.view.data(name, values);
      this.cells?.take(next[painted]);
      await this.view.runAsync();
      this.paint();
    } else {
      // One after the other: the first chart of a page is finished before the second begins.
      await (turn = turn.catch(() => {}).then(() => this.embed(next, look, tables)));
      this.shape = shape;
    }
    const walked = this.cells && next.fields.length;
    walked ? (this.home.tabIndex = 0) : this.home.removeAttribute("tabindex");
    this.home.setAttribute("role", walked ? "application" : "img");
    this.home.setAttribute("aria-label", walked ? `${next.alt}. Arrow keys move over the cells, Enter opens one.` : next.alt);
    this.home.dataset.step = next.step ?? "";
  }

  async embed(next, look, tables) {
    const { vegaEmbed } = await library();
    const spec = JSON.parse(next.spec);
    for (const param of spec.params ?? []) if (param.name in next.signals) param.value = next.signals[param.name];
    spec.datasets = tables;
    spec.width = this.home.clientWidth || 600;
    spec.height = this.high(spec.usermeta?.room) ?? spec.height;
    spec.autosize = { type: "fit-x", contains: "padding" };
    this.home.style.minHeight ||= `${(spec.height ?? 200) + 70}px`;
    const box = document.createElement("div");
    box.style.cssText = "position:absolute;inset:0 auto auto 0;visibility:hidden";
    this.home.append(box);
    const options = { actions: false, config: look.config, tooltip: { theme: look.dark ? "dark" : "light" } };
    const { view } = await vegaEmbed(box, spec, options);
    if (this.view) await keep(this.view, view);
    if (next.fields.length) this.listen(view, next.fields);
    if (next.zoom) this.watch(view);
    this.view?.finalize();
    this.box?.remove();
    this.cells?.close();
    // Inline, a canvas and its box would each leave a gap below.
    box.style.cssText = "position:relative;display:block";
    for (const drawn of box.querySelectorAll("canvas")) drawn.style.display = "block";
    [this.view, this.box, this.room, this.ink] = [view, box, spec.usermeta?.room, look.ink];
    this.cells = spec.usermeta?.cells ? new Cells(this.home, spec.usermeta.cells, next.tables[0]) : null;
    this.cells?.take(next[next.tables[0]]);
    this.paint();
    // A small picture is not cut, and the page below does not jump when it is redrawn.
    this.home.style.minHeight = `${box.offsetHeight}px`;
  }

  listen(view, fields) {
    view.addEventListener("click", (event, item) => {
      const datum = item?.datum ?? {};
      const hit = fields.every((field) => field in datum);
      this.report("click", hit ? Object.fromEntries(fields.map((field) => [field, datum[field]])) : {});
    });
  }

  // The steps in sight, when a zoom has come to rest: there may be more of them than were sent.
  watch(view) {
    if (!("zoom_step" in view.getState({ signals: (name) => name === "zoom_step", data: () => false }).signals)) return;
    view.addSignalListener("zoom_step", (_, seen) => {
      clearTimeout(this.resting);
      this.resting = setTimeout(() => this.report("zoom", seen ? { first: seen[0], last: seen[1] } : {}), 250);
    });
  }

  // Arrow keys walk over the cells as a pointer would, Enter clicks.
  onKey(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] }[event.key];
    if (!way || !this.cells?.edges || event.target !== this.home) return;
    event.preventDefault();
    const [clientX, clientY] = this.cells.middle(this.cells.beside(way));
    const canvas = this.box.querySelector("canvas");
    const told = { clientX, clientY, bubbles: true, pointerId: 1, pointerType: "mouse", view: window };
    const kinds = event.key === "Enter" ? ["pointermove", "pointerdown", "pointerup", "click"] : ["pointermove"];
    for (const kind of kinds) canvas.dispatchEvent(new (kind === "click" ? MouseEvent : PointerEvent)(kind, told));
  }

  // The frame of the held step, from numbers that are here already.
  async play() {
    const data = this.drawn;
    if (!data?.frames || !this.view || this.playing) return;
    this.playing = true;
    try {
      for (let at = nearest(data.frames.steps, step()); at !== this.frame && held(); at = nearest(data.frames.steps, step())) {
        this.frame = at;
        if (this.cells) {
          const frame = data.frames.fields[this.cells.told.colour];
          if (frame) this.cells.column(data[frame].getChild(`s${at}`));
          this.paint();
          this.home.dataset.step = data.frames.steps[at];
          await new Promise(requestAnimationFrame);
          continue;
        }
        const change = this.view.changeset();
        for (const [field, table] of Object.entries(data.frames.fields)) {
          const column = data[table].getChild(`s${at}`);
          change.modify(() => true, field, (row) => column.get(row._row));
        }
        await this.view.change(data.tables[0], change).runAsync();
        this.home.dataset.step = data.frames.steps[at];
      }
    } finally {
      this.playing = false;
    }
  }

  paint() {
    this.cells?.show(this.view, this.ink);
  }

  async fit() {
    const { view } = this;
    const width = this.home.clientWidth;
    const height = this.high(this.room) ?? view?.height();
    if (!view || !width || (width === this.wide && height === view.height())) return;
    this.wide = width;
    await view.width(width).height(height).runAsync();
    if (view === this.view) this.paint();
  }

  // What the window leaves after `taken` pixels of other things, between the least and the most that is legible.
  high(room) {
    return room ? Math.round(Math.max(room.least, Math.min(room.most, window.innerHeight - room.taken))) : undefined;
  }

  close() {
    clearTimeout(this.resting);
    document.removeEventListener("depthscope-step", this.onStep);
    this.sizes.disconnect();
    window.removeEventListener("resize", this.onResize);
    this.view?.finalize();
  }
}

const held = () => Boolean(window.depthscopePlayer?.held);
const step = () => window.depthscopePlayer?.step;

function nearest(steps, step) {
  let at = 0;
  while (at + 1 < steps.length && steps[at + 1] <= step) at++;
  return at;
}

async function library() {
  while (!window.depthscopeVega) await new Promise((resolve) => setTimeout(resolve, 20));
  return window.depthscopeVega;
}

function rows(table) {
  const columns = table.schema.fields.map((field) => [field.name, table.getChild(field.name)]);
  return Array.from({ length: table.numRows }, (_, i) => {
    const row = { _row: i };
    for (const [name, column] of columns) {
      const value = column.get(i);
      row[name] = typeof value === "bigint" ? Number(value) : value;
    }
    return row;
  });
}

// Zoom and selections of the old view, in a new one of the same chart.
async function keep(before, after) {
  try {
    const mine = (name) => /^zoom_(?!translate|zoom|tuple|toggle|modify)/.test(name);
    const { signals } = before.getState({ signals: mine, data: () => false });
    for (const [name, value] of Object.entries(signals)) if (value) after.signal(name, value);
    await after.runAsync();
  } catch {
    // Another chart: it starts unzoomed.
  }
}

function theme(element) {
  const style = getComputedStyle(element);
  const css = (name) => style.getPropertyValue(`--st-${name}`).trim();
  const text = css("text-color");
  const faint = (share) => (/^#[0-9a-f]{6}$/i.test(text) ? text + share : text);
  const colours = (name) => css(name).split(",");
  const written = { labelColor: faint("cc"), titleColor: text, labelFontSize: 12.5, titleFontSize: 12.5, titleFontWeight: 500 };
  const config = {
    background: "transparent",
    font: css("font"),
    axis: { ...written, gridColor: faint("1a"), domainColor: faint("40"), tickColor: faint("40") },
    legend: written,
    range: {
      category: colours("chart-categorical-colors"),
      ramp: colours("chart-sequential-colors"),
      heatmap: colours("chart-sequential-colors"),
      diverging: colours("chart-diverging-colors"),
    },
    view: { stroke: null },
    rule: { color: faint("80") },
    text: { color: text },
  };
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(css("background-color").slice(i, i + 2), 16));
  return { config, dark: r + g + b < 384, ink: text, key: JSON.stringify(config) };
}
