// The two linked panels: curves on logarithmic axes, residuals below.

/* global uPlot */
const CURVES_HEIGHT = () => Math.round(Math.min(440, Math.max(240, 0.45 * innerHeight)));
const RESIDUALS_HEIGHT = 150;
const AXIS = 62; // px; the same in both panels, so that their q axes lie above each other
const GOOD = 2; // residuals within two standard deviations are what noise makes

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const positive = (values) => values.map((value) => (value > 0 ? value : null));
const finite = (values) => values.filter((value) => value !== null && Number.isFinite(value));

export class Figure {
  /** @param onCursor called with the index of the point under the pointer, or null. */
  constructor(curves, residuals, onCursor) {
    this.hosts = { curves, residuals };
    this.onCursor = onCursor;
    this.plots = [];
    this.exposure = null;
    new ResizeObserver(() => this.resize()).observe(curves);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.exposure && this.draw(this.exposure));
  }

  /** @param exposure {q, measured, desmeared, error, again, residual, unit}, arrays of numbers and null. */
  draw(exposure) {
    this.exposure = exposure;
    this.plots.forEach((plot) => plot.destroy());
    const { q, measured, desmeared, error, again, residual } = exposure;
    const low = desmeared.map((value, i) => (value === null ? null : Math.max(value - error[i], 1e-3 * Math.abs(value))));
    const high = desmeared.map((value, i) => (value === null ? null : value + error[i]));
    const rows = [measured, desmeared, again, low, high].map(positive);
    this.plots = [
      new uPlot(this.curves(exposure, q, rows), [q, ...rows], this.hosts.curves),
      new uPlot(this.residuals(q, residual), [q, residual], this.hosts.residuals),
    ];
  }

  curves(exposure, q, [measured, desmeared]) {
    const shown = finite([...measured, ...desmeared]).sort((a, b) => a - b);
    // All but the lowest percent: a minimum may go down to nothing.
    const limits = [0.5 * shown[Math.floor(0.005 * shown.length)], 2 * shown.at(-1)];
    const line = (name, width, more = {}) => ({ stroke: colour(name), width, points: { show: false }, ...more });
    const none = { stroke: "transparent", width: 0, points: { show: false } };
    return this.options(CURVES_HEIGHT(), q, {
      scales: { y: { distr: 3, range: () => limits } },
      series: [{}, dots("measured", 3.5), line("desmeared", 1.8), line("again", 1.4), none, none],
      bands: [{ series: [5, 4], fill: colour("band") }],
      axes: [axis({ ...rounded("x", q[0] > 0), values: unlabelled, size: 8 }), axis({ ...rounded("y", true), label: `I / ${exposure.unit}` })],
      hooks: { setCursor: [(u) => this.onCursor(u.cursor.idx ?? null)] },
    });
  }

  residuals(q, residual) {
    const sizes = finite(residual).map(Math.abs).sort((a, b) => a - b);
    const limit = Math.max(4, 1.15 * (sizes[Math.floor(0.995 * (sizes.length - 1))] ?? 0));
    return this.options(RESIDUALS_HEIGHT, q, {
      scales: { y: { range: () => [-limit, limit] } },
      series: [{}, dots("desmeared", 3)],
      axes: [axis({ ...rounded("x", q[0] > 0), label: "q / nm⁻¹", size: 34, labelSize: 18 }), axis({ label: "residual / σ", space: 22 })],
      hooks: { drawClear: [zone] },
    });
  }

  options(height, q, more) {
    const log = q[0] > 0;
    const margin = log ? (q.at(-1) / q[0]) ** 0.015 : 0;
    const limits = log ? [q[0] / margin, q.at(-1) * margin] : [q[0], q.at(-1)];
    return {
      width: this.hosts.curves.clientWidth,
      height,
      padding: [8, 12, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "live" }, drag: { x: false, y: false }, points: { show: false }, y: false },
      ...more,
      scales: { x: { time: false, distr: log ? 3 : 1, range: () => limits }, ...more.scales },
    };
  }

  resize() {
    const width = this.hosts.curves.clientWidth;
    if (!width || !this.plots.length) return;
    const [curves, residuals] = this.plots;
    curves.setSize({ width, height: CURVES_HEIGHT() });
    residuals.setSize({ width, height: RESIDUALS_HEIGHT });
  }
}

function dots(name, size) {
  return { stroke: colour(name), width: 0, paths: () => null, points: { show: true, size, width: 0, fill: colour(name) } };
}

function axis(more) {
  const shades = { stroke: colour("faint"), grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("line"), width: 1 } };
  return { ...shades, size: AXIS, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", labelSize: 20, ...more };
}

/** Ticks of a logarithmic axis, at 1, 2 and 5 over a decade or two, else at the decades; uPlot's own where it is linear. */
function rounded(scale, logarithmic) {
  if (!logarithmic) return {};
  const short = ({ min, max }) => max < 300 * min;
  const splits = (u) => {
    const { min, max } = u.scales[scale];
    const first = Math.floor(Math.log10(min));
    const decades = Array.from({ length: Math.ceil(Math.log10(max)) - first + 1 }, (_, i) => 10 ** (first + i));
    const steps = short(u.scales[scale]) ? [1, 2, 5] : [1];
    return decades.flatMap((decade) => steps.map((step) => step * decade)).filter((tick) => tick >= min && tick <= max);
  };
  const values = (u, ticks) => ticks.map(short(u.scales[scale]) ? plain : power);
  return { splits, values, filter: (u, ticks) => ticks };
}

const unlabelled = (u, ticks) => ticks.map(() => "");
const plain = (value) => String(Number(value.toPrecision(3)));
const power = (value) => `10${superscript(Math.round(Math.log10(value)))}`;

function superscript(number) {
  return [...String(number)].map((sign) => (sign === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign])).join("");
}

/** Shade what noise makes, and draw the line of zero. */
function zone(u) {
  const [top, middle, bottom] = [GOOD, 0, -GOOD].map((value) => u.valToPos(value, "y", true));
  const { left, width } = u.bbox;
  u.ctx.save();
  u.ctx.fillStyle = colour("zone");
  u.ctx.fillRect(left, top, width, bottom - top);
  u.ctx.fillStyle = colour("measured");
  u.ctx.fillRect(left, middle, width, devicePixelRatio);
  u.ctx.restore();
}
