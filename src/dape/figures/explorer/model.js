// A model on a text.

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Float32Array(await new Response(stream).arrayBuffer());
}

// The numbers of one query in one head; logits and attention follow from A, B and f(A, B).
function rowOf(layer, head, query) {
  const pairs = layer.A.length / layer.heads;
  const start = head * pairs + (query * (query + 1)) / 2;
  const [A, B, f] = ["A", "B", "f"].map((name) => Array.from(layer[name].subarray(start, start + query + 1)));
  const logits = A.map((a, j) => a + (layer.residual ? B[j] : 0) + f[j]);
  return { A, B, f, logits, attention: softmax(logits) };
}

const shownToken = (text) => text.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5");

function drawModel() {
  const { tokens, layers } = content.passage;
  const [layer, head, query, name] = [layers[chosen("layer")], chosen("model-head"), chosen("query"), element("shown").value];
  const row = rowOf(layer, head, query);
  element("query-shown").textContent = `${query}, \u201c${shownToken(tokens[query])}\u201d`;
  element("sum").textContent = layer.residual ? "logits = A + B + f(A, B)" : "logits = A + f(A, B)";
  colourTokens(row, query, name);
  const lines = { "scores A": "A", "bias B": "B", "f(A, B)": "f", logits: "logits" };
  const inks = ["--first", "--second", "--third", "--fourth"];
  chart("row", Object.values(lines).map((part, n) => ({ values: row[part], colour: inks[n] })), { label: "key (token)" });
  element("row-legend").innerHTML = Object.keys(lines)
    .map((text, n) => `<span><i style="background: var(${inks[n]})"></i>${text}</span>`)
    .join("");
  element("top").innerHTML = topKeys(row, tokens);
  const every = Array.from({ length: layer.heads }, (_, other) => rowOf(layer, other, query)[name]);
  scale("heads-scale", heat(element("heads"), every), name !== "attention");
  element("heads").style.height = `${Math.max(40, 14 * layer.heads)}px`;
  const square = tokens.map((_, i) => Array.from({ length: tokens.length }, (_, j) => NaN));
  square.forEach((values, i) => rowOf(layer, head, i)[name].forEach((value, j) => (values[j] = value)));
  scale("square-scale", heat(element("square"), square, query), name !== "attention");
}

function colourTokens(row, query, name) {
  const reach = reachOf(row[name]);
  const colour = colours(reach);
  const page = channels(style("--page"));
  [...element("tokens").children].forEach((span, key) => {
    const seen = key <= query;
    const rgb = seen ? colour(row[name][key]) : page;
    const bright = rgb[0] * 0.299 + rgb[1] * 0.587 + rgb[2] * 0.114 > 140;
    span.style.background = seen ? `rgb(${rgb})` : "";
    span.style.color = seen ? (bright ? "#111" : "#fff") : "";
    span.className = key === query ? "query" : seen ? "" : "later";
    span.title = seen
      ? `key ${key}: A ${short(row.A[key])}, B ${short(row.B[key])}, f ${short(row.f[key])}, attention ${short(row.attention[key])}`
      : `key ${key}: after the query`;
  });
  scale("token-scale", reach, name !== "attention");
}

function topKeys(row, tokens) {
  const keys = row.attention.map((_, key) => key).sort((a, b) => row.attention[b] - row.attention[a]).slice(0, 8);
  const cells = (key) =>
    [key, `${(100 * row.attention[key]).toFixed(1)} %`, ...["A", "B", "f", "logits"].map((name) => short(row[name][key]))];
  const body = keys.map(
    (key) =>
      `<tr><td class="word">${escaped(shownToken(tokens[key]))}</td>${cells(key).map((cell) => `<td>${cell}</td>`).join("")}</tr>`,
  );
  const heading = ["key", "attention", "A", "B", "f", "logit"].map((text) => `<th>${text}</th>`).join("");
  return `<thead><tr><th class="word">token</th>${heading}</tr></thead><tbody>${body.join("")}</tbody>`;
}

function chooseQuery(query) {
  element("query").value = query;
  drawModel();
}

const rowAt = (event, rows) => {
  const box = event.currentTarget.getBoundingClientRect();
  return Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
};

async function startModel() {
  const { tokens, layers } = content.passage;
  for (const layer of layers) for (const name of ["A", "B", "f"]) layer[name] = await unpacked(layer[name]);
  options("layer", layers.map((each) => each.layer));
  options("model-head", Array.from({ length: layers[0].heads }, (_, head) => head));
  Object.assign(element("query"), { max: tokens.length - 1, value: tokens.length - 1 });
  element("tokens").replaceChildren(
    ...tokens.map((text) => {
      const span = document.createElement("span");
      span.textContent = text.replace(/\n/g, "\u23ce\n");
      return span;
    }),
  );
  element("tokens").addEventListener("click", (event) => {
    const key = [...element("tokens").children].indexOf(event.target);
    if (key >= 0) chooseQuery(key);
  });
  element("square").addEventListener("click", (event) => chooseQuery(rowAt(event, tokens.length)));
  element("heads").addEventListener("click", (event) => {
    element("model-head").value = rowAt(event, layers[chosen("layer")].heads);
    drawModel();
  });
  for (const id of ["layer", "model-head", "query", "shown"]) element(id).addEventListener("input", drawModel);
  drawModel();
}

async function start() {
  startEncodings();
  if (content.passage) await startModel();
  const redraw = () => {
    drawEncoding();
    if (content.passage) drawModel();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("resize", redraw);
}

const started = start();
