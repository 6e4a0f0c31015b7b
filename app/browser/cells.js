// Thousands of cells, painted as pixels behind a Vega view that has the axes, the legend and one single cell: the one
// under the pointer. So a frame of 20,000 cells costs milliseconds, and tooltips and clicks stay Vega's own.

const SHADES = 2048;
const BLANK = 0.16; // how far a stripe of a blank cell stands out, of the text's own colour

class Cells {
  // `told` says which columns hold the edges, each with a shift, which one is coloured, and on what scale.
  constructor(home, told, name) {
    [this.home, this.told, this.name] = [home, told, name];
    this.canvas = document.createElement("canvas");
    this.canvas.style.cssText = "position:absolute;image-rendering:pixelated";
    this.over = -1;
  }

  take(table) {
    this.table = table;
    this.edges = null;
    this.column(table.getChild(this.told.colour));
  }

  // The numbers to colour; those of the table, or a frame of playback.
  column(vector) {
    const whole = vector.nullCount ? null : vector.toArray();
    this.values =
      whole instanceof Float32Array ? whole : Float32Array.from({ length: vector.length }, (_, i) => vector.get(i) ?? NaN);
  }

  show(view, ink) {
    this.view = view;
    if (!this.table.numRows) return this.canvas.remove();
    const ratio = window.devicePixelRatio || 1;
    const sizes = ["x", "y"].map((name) => Math.max(...view.scale(name).range()));
    const [width, height] = sizes.map((size) => Math.max(1, Math.round(size * ratio)));
    const at = JSON.stringify([width, height, view.scale("x").domain(), view.scale("y").domain()]);
    if (at !== this.at || !this.edges) this.measure(width, height, ratio);
    this.at = at;
    const shades = this.shades();
    const { bend, start, scale } = this;
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    const { left, right, top, bottom } = this.edges;
    const stripe = colour(ink, BLANK);
    for (let i = 0; i < this.values.length; i++) {
      const value = this.values[i];
      if (Number.isNaN(value)) {
        for (let y = top[i]; y < bottom[i]; y++)
          for (let x = left[i]; x < right[i]; x++) if ((x + y) % 6 < 2) pixels[y * width + x] = stripe;
        continue;
      }
      const shade = shades[Math.max(0, Math.min(SHADES - 1, Math.round((bend(value) - start) * scale) || 0))];
      for (let y = top[i]; y < bottom[i]; y++) pixels.fill(shade, y * width + left[i], y * width + right[i]);
    }
    const { canvas } = this;
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    canvas.getContext("2d").putImageData(image, 0, 0);
    const [x, y] = view.origin();
    const { left: padX, top: padY } = view.padding();
    canvas.style.left = `${x + padX}px`;
    canvas.style.top = `${y + padY}px`;
    [canvas.style.width, canvas.style.height] = sizes.map((size) => `${size}px`);
    if (!canvas.isConnected) this.home.prepend(canvas);
    if (this.over >= 0) this.put(this.over < this.values.length ? this.over : -1); // its numbers may be new
  }

  // Edges in device pixels; wide cells leave a seam, so that they can be told apart.
  measure(width, height, ratio) {
    const side = (edge, scale, most) => {
      const [field, shift] = this.told[edge];
      const column = this.table.getChild(field);
      return Int32Array.from({ length: this.table.numRows }, (_, i) =>
        Math.max(0, Math.min(most, Math.round(scale(Number(column.get(i)) + shift) * ratio))),
      );
    };
    const [x, y] = [this.view.scale("x"), this.view.scale("y")];
    const ends = (one, other, most, scale) => {
      const [a, b] = [side(one, scale, most), side(other, scale, most)];
      return [a.map((value, i) => Math.min(value, b[i])), a.map((value, i) => Math.max(value, b[i]))];
    };
    const [left, right] = ends("left", "right", width, x);
    const [top, bottom] = ends("top", "bottom", height, y);
    const seam = Math.max(1, Math.round(ratio / 2));
    // All of them or none: cells of seven and a half pixels are of seven and of eight.
    const sizes = left.map((x, i) => Math.min(right[i] - x, bottom[i] - top[i])).sort();
    const wide = sizes[sizes.length >> 1] >= 8 * ratio;
    for (let i = 0; wide && i < left.length; i++) {
      if (Math.min(right[i] - left[i], bottom[i] - top[i]) <= 2 * seam) continue;
      right[i] -= seam;
      bottom[i] -= seam;
    }
    this.edges = { left, right, top, bottom };
    this.ratio = ratio;
  }

  // The colours of the view's own scale, evenly spaced in its own measure.
  shades() {
    const scale = this.view.scale("color");
    const domain = scale.domain();
    const key = JSON.stringify([domain, scale.range()]);
    if (key === this.key) return this.ramp;
    const [bend, back] = { sqrt: [Math.sqrt, (x) => x * x], log: [Math.log, Math.exp] }[this.told.scale] ?? [Number, Number];
    const [start, end] = [domain[0], domain.at(-1)].map(bend);
    Object.assign(this, { key, bend, start, scale: (SHADES - 1) / (end - start) });
    this.ramp = Uint32Array.from({ length: SHADES }, (_, i) =>
      colour(scale(back(start + ((end - start) * i) / (SHADES - 1)))),
    );
    return this.ramp;
  }

  // Puts the cell under the pointer into the view, before Vega looks what is there.
  hover(event) {
    if (!this.view || !this.edges) return;
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) * this.ratio, (event.clientY - box.top) * this.ratio];
    const over = this.find(x, y);
    if (over !== this.over) this.put(over);
  }

  // The cell beside the one under the pointer, in a direction; that itself where there is none, and the last to begin with.
  beside([right, down]) {
    const { edges, over, ratio } = this;
    const at = over < 0 ? this.values.length - 1 : over;
    if (over < 0) return at;
    const next = (low, high, by) => (by < 0 ? low - 2 * ratio : by > 0 ? high + 2 * ratio : (low + high) / 2);
    const [x, y] = [next(edges.left[at], edges.right[at], right), next(edges.top[at], edges.bottom[at], down)];
    const found = this.find(x, y);
    return found < 0 ? at : found;
  }

  // Where the middle of a cell is in the window.
  middle(i) {
    const box = this.canvas.getBoundingClientRect();
    const { left, right, top, bottom } = this.edges;
    return [box.left + (left[i] + right[i]) / 2 / this.ratio, box.top + (top[i] + bottom[i]) / 2 / this.ratio];
  }

  find(x, y) {
    const { left, right, top, bottom } = this.edges;
    const seam = this.ratio;
    return left.findIndex((edge, i) => edge <= x && x < right[i] + seam && top[i] <= y && y < bottom[i] + seam);
  }

  put(i) {
    this.over = i;
    this.view.data(this.name, i < 0 ? [] : [this.row(i)]).run();
  }

  row(i) {
    const fields = this.table.schema.fields.map(({ name }) => [name, this.table.getChild(name).get(i)]);
    const plain = fields.map(([name, value]) => [name, typeof value === "bigint" ? Number(value) : value]);
    return { ...Object.fromEntries(plain), [this.told.colour]: this.values[i] };
  }

  close() {
    this.canvas.remove();
  }
}

// Any CSS colour as the 32 bits of a pixel.
const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function colour(css, alpha = 1) {
  brush.clearRect(0, 0, 1, 1);
  brush.globalAlpha = alpha;
  brush.fillStyle = css;
  brush.fillRect(0, 0, 1, 1);
  return new Uint32Array(brush.getImageData(0, 0, 1, 1).data.buffer)[0];
}
