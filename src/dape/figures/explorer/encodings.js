// The bias of an encoding, with its parameters as sliders.

const CELLS = 128; // of a side of the map, at most
let current = {}; // the parameters that the sliders show
let kept = [];

const encoding = () => content.encodings[chosen("encoding")];

function chooseEncoding() {
  const { sets } = encoding();
  options("set", sets.map((set) => set.label));
  element("set").value = sets.length > 1 ? 1 : 0;
  chooseSet();
}

function chooseSet() {
  const { heads } = encoding().sets[chosen("set")];
  const head = Math.min(chosen("head"), heads.length - 1);
  options("head", heads.map((_, n) => n));
  element("head").value = head;
  chooseHead();
}

function chooseHead() {
  current = structuredClone(encoding().sets[chosen("set")].heads[chosen("head")]);
  makeSliders();
  drawEncoding();
}

function makeSliders() {
  const holder = element("sliders");
  holder.replaceChildren(...encoding().sliders.map(slider));
  if (current.weight instanceof Array) holder.append(bars());
}

// A slider and a field of one parameter; the field takes values that the slider does not reach.
function slider({ name, low, high, step, log }) {
  const row = document.createElement("div");
  row.className = "control";
  row.innerHTML =
    `<span>${name}</span><div class="slider"><input type="range" aria-label="${name}">` +
    `<input type="number" step="any" aria-label="${name}, as a number" id="value-${name}"></div>`;
  const [range, field] = row.querySelectorAll("input");
  const bounds = log ? [Math.log(low), Math.log(high)] : [low, high];
  Object.assign(range, { min: bounds[0], max: bounds[1], step: log ? "any" : step });
  const whole = step >= 1;
  const show = () => {
    range.value = log ? Math.log(current[name]) : current[name];
    field.value = Number(current[name].toPrecision(6));
  };
  const take = (value) => {
    current[name] = whole ? Math.round(value) : value;
    if (name === "buckets") resize(current[name]);
    drawEncoding();
  };
  range.addEventListener("input", () => {
    take(log ? Math.exp(Number(range.value)) : Number(range.value));
    field.value = Number(current[name].toPrecision(6));
  });
  field.addEventListener("change", () => {
    const value = Number(field.value);
    const even = step === 2 ? 2 * Math.round(value / 2) : value;
    take(Number.isFinite(even) ? Math.min(high, Math.max(low, even)) : current[name]);
    show();
  });
  show();
  return row;
}

// The entries of T5's W, one for each bucket; new ones repeat the last.
function resize(buckets) {
  const last = current.weight.at(-1);
  current.weight = Array.from({ length: buckets }, (_, n) => current.weight[n] ?? last);
  element("sliders").lastChild.replaceWith(bars());
}

function bars() {
  const row = document.createElement("div");
  row.className = "control";
  const reach = Math.max(2, Math.ceil(reachOf(current.weight)));
  row.innerHTML = `<span>W of each bucket, from \u2212${reach} to ${reach}</span><div class="bars"></div>`;
  const inputs = current.weight.map((value, bucket) => {
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: -reach, max: reach, step: "any", value, title: `bucket ${bucket}` });
    input.setAttribute("aria-label", `W of bucket ${bucket}`);
    input.addEventListener("input", () => {
      current.weight[bucket] = Number(input.value);
      drawEncoding();
    });
    return input;
  });
  row.querySelector(".bars").append(...inputs);
  return row;
}

function drawEncoding() {
  const length = chosen("positions");
  const log = element("axis").value === "log";
  const bias = BIASES[encoding().kind](current);
  const values = Array.from({ length }, (_, d) => bias(length - 1, length - 1 - d));
  const label = "distance i \u2212 j (tokens)";
  element("formula").textContent = encoding().formula;
  chart("lines", [...kept.map((line) => ({ ...line, faint: true })), { values, colour: "--first" }], { log, label });
  let total = 0;
  const within = softmax(values).map((weight) => (total += weight));
  chart("within", [{ values: within, colour: "--first" }], { log, label, range: [0, 1] });
  const half = within.findIndex((share) => share >= 0.5);
  element("half").textContent = `Half of the attention lies within distance ${half.toLocaleString("en")}.`;
  const side = Math.min(CELLS, length);
  const positions = Array.from({ length: side }, (_, n) => Math.round((n * (length - 1)) / (side - 1)));
  const rows = positions.map((i) => positions.map((j) => (j > i ? NaN : bias(i, j))));
  scale("map-scale", heat(element("map"), rows), true);
  current.drawn = { values, within };
}

const KEPT = ["--second", "--third", "--fourth"];

function keep() {
  const name = `${encoding().name}, head ${chosen("head")}`;
  kept = [...kept, { name, values: current.drawn.values }].slice(-KEPT.length);
  kept.forEach((line, n) => (line.colour = KEPT[n]));
  showKept();
}

function showKept() {
  element("kept").innerHTML = kept
    .map(({ name, colour }) => `<span><i style="background: var(${colour})"></i>${escaped(name)}</span>`)
    .join("");
  drawEncoding();
}

function startEncodings() {
  options("encoding", content.encodings.map((each) => each.name));
  const lengths = Array.from({ length: 9 }, (_, n) => 64 * 2 ** n);
  element("positions").innerHTML = lengths
    .map((length) => `<option value="${length}">${length.toLocaleString("en")}</option>`)
    .join("");
  element("positions").value = content.length;
  const trained = content.encodings.findIndex((each) => each.sets.length > 1);
  const first = content.encodings.findIndex((each) => each.name === "kerple");
  element("encoding").value = trained < 0 ? first : trained;
  element("encoding").addEventListener("change", chooseEncoding);
  element("set").addEventListener("change", chooseSet);
  element("head").addEventListener("change", chooseHead);
  for (const id of ["positions", "axis"]) element(id).addEventListener("change", drawEncoding);
  element("keep").addEventListener("click", keep);
  element("forget").addEventListener("click", () => {
    kept = [];
    showKept();
  });
  chooseEncoding();
}
