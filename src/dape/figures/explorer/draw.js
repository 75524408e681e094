// Colours, maps and lines.

const content = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const escaped = (text) =>
  text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3)));
  return text.replace("-", "\u2212");
}

// A colour of values from -reach to reach: the page's own at 0.
function colours(reach) {
  const [page, positive, negative] = ["--page", "--positive", "--negative"].map((name) => channels(style(name)));
  return (value) => {
    const share = reach ? Math.min(1, Math.abs(value) / reach) : 0;
    const end = value < 0 ? negative : positive;
    return page.map((from, at) => Math.round(from + share * (end[at] - from)));
  };
}

const reachOf = (values) => values.reduce((most, x) => Math.max(most, Math.abs(x)), 0);

function scale(id, reach, signed) {
  const rgb = (value) => `rgb(${colours(1)(value)})`;
  const stops = signed ? [-1, 0, 1] : [0, 1];
  const ends = signed ? [-reach, reach] : [0, reach];
  element(id).innerHTML =
    `<span>${short(ends[0])}</span><i style="background: linear-gradient(to right, ${stops.map(rgb)})"></i>` +
    `<span>${short(ends[1])}</span>`;
}

// Paint rows of values, where NaN is hidden; return the largest absolute value.
function heat(canvas, rows, marked = -1) {
  const [height, width] = [rows.length, rows[0].length];
  Object.assign(canvas, { width, height });
  const reach = reachOf(rows.flat().filter((x) => !Number.isNaN(x)));
  const colour = colours(reach);
  const [faint, ink] = [channels(style("--line")), channels(style("--ink"))];
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  rows.forEach((row, y) =>
    row.forEach((value, x) => {
      const hidden = y === marked ? ink : faint;
      image.data.set([...(Number.isNaN(value) ? hidden : colour(value)), 255], 4 * (y * width + x));
    }),
  );
  context.putImageData(image, 0, 0);
  return reach;
}

function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= raw);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
}

function powersOfTwo(most) {
  const all = [0, ...Array.from({ length: Math.floor(Math.log2(most)) + 1 }, (_, n) => 2 ** n)];
  const step = Math.ceil(all.length / 8);
  return all.filter((_, n) => n === 0 || (all.length - 1 - n) % step === 0);
}

// Draw lines [{values, colour, faint}] over 0, 1, ..; `log` makes the axis logarithmic from 1 on.
function chart(id, lines, { log = false, label, range }) {
  const [width, height, left, bottom, top] = [Math.max(280, element(id).clientWidth), 230, 52, 36, 8];
  const most = Math.max(...lines.map((line) => line.values.length)) - 1;
  const all = lines.flatMap((line) => [...line.values]);
  const ends = range ?? [
    all.reduce((a, b) => Math.min(a, b), 0),
    all.reduce((a, b) => Math.max(a, b), 0),
  ];
  const [low, high] = ends[0] === ends[1] ? [-1, 1] : ends;
  const along = (d) => (log ? (d <= 1 ? d : 1 + Math.log2(d)) / (1 + Math.log2(Math.max(2, most))) : d / most);
  const x = (d) => left + along(d) * (width - left - 12);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  const marks = (log ? powersOfTwo(most) : ticks(0, most)).filter(Number.isInteger);
  const grid = [
    ...ticks(low, high).map(
      (value) =>
        `<line class="axis" x1="${left}" x2="${width - 12}" y1="${y(value)}" y2="${y(value)}"/>` +
        `<text x="${left - 6}" y="${y(value) + 4}" text-anchor="end">${short(value)}</text>`,
    ),
    ...marks.map(
      (d) => `<text x="${x(d)}" y="${height - bottom + 16}" text-anchor="middle">${d.toLocaleString("en")}</text>`,
    ),
  ];
  const drawn = lines.map(({ values, colour, faint }) => {
    const step = Math.max(1, values.length / (2 * width));
    const points = [];
    for (let d = 0; d < values.length; d = log && d < 256 ? d + 1 : Math.ceil(d + step)) points.push(d);
    if (points.at(-1) !== values.length - 1) points.push(values.length - 1);
    const path = points.map((d) => `${x(d).toFixed(1)},${y(values[d]).toFixed(1)}`).join(" ");
    return `<polyline class="line" points="${path}" style="stroke: var(${colour})" opacity="${faint ? 0.45 : 1}"/>`;
  });
  element(id).innerHTML =
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escaped(label)}">${grid.join("")}${drawn.join("")}` +
    `<text x="${(left + width) / 2}" y="${height - 4}" text-anchor="middle">${escaped(label)}</text></svg>`;
}

const options = (id, labels) => {
  element(id).innerHTML = labels.map((label, n) => `<option value="${n}">${escaped(String(label))}</option>`).join("");
};
const chosen = (id) => Number(element(id).value);
