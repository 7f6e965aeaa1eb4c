"use strict";
// Draws the report from the figures embedded in the page; no network, no library.
const R = JSON.parse(document.getElementById("results").textContent);
const NS = "http://www.w3.org/2000/svg";
const HIGHER = R.higher_is_better, TRAINS = R.trains;
const arms = [...new Set(R.cells.map((c) => c.arm))];
const state = { point: 0, cost: null, sort: null, off: new Set() };
const points = [];
for (const c of R.cells) {
  const key = JSON.stringify(c.point);
  if (!points.some((p) => p.key === key)) {
    points.push({ key, point: c.point, name: Object.entries(c.point).map(([k, v]) => `${k.split(".").pop()} = ${v}`).join(", ") });
  }
}
const num = (v) => (typeof v === "number" && Number.isFinite(v) ? v : null);
const colour = (arm) => `var(--c${arms.indexOf(arm) % 10})`;
const dash = (arm) => ["", "6 3", "2 3"][Math.floor(arms.indexOf(arm) / 10) % 3];

function si(v, digits = 3) {
  if (num(v) === null) return "";
  for (const [p, s] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (Math.abs(v) >= p) return trim(v / p, digits) + s;
  if (v !== 0 && Math.abs(v) < 1e-3) return trim(v * 1e6, digits) + "µ";
  if (v !== 0 && Math.abs(v) < 0.1) return trim(v * 1e3, digits) + "m";
  return trim(v, digits);
}
const trim = (v, digits) => String(Number(v.toPrecision(digits)));
const bytes = (v) => (num(v) === null ? "" : si(v) + "B");
const score = (v) => (num(v) === null ? "" : v.toFixed(4));

function el(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) k.startsWith("on") ? e.addEventListener(k.slice(2), v) : e.setAttribute(k, v);
  e.append(...children);
  return e;
}
function draw(tag, attributes = {}, text) {
  const e = document.createElementNS(NS, tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}

// -- tooltips
const tip = el("div", { class: "tip", role: "status" });
document.body.append(tip);
function hint(target, lines) {
  const show = (event) => {
    tip.replaceChildren(...lines.flatMap((l, i) => (i ? [el("br"), l] : [l])));
    tip.style.display = "block";
    const x = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, x)}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
  };
  target.addEventListener("pointermove", show);
  target.addEventListener("pointerdown", show);
  target.addEventListener("pointerleave", () => (tip.style.display = "none"));
}

// -- axes
function ticks(low, high, log, count = 5) {
  if (log) {
    const found = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of [1, 2, 5]) {
        const v = m * 10 ** p;
        if (v >= low * 0.999 && v <= high * 1.001) found.push(v);
      }
    const every = Math.ceil(found.length / 7);
    return found.filter((_, i) => i % every === 0);
  }
  const span = high - low || 1, raw = span / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}
function scale(domain, range, log) {
  const f = log ? Math.log : (v) => v;
  const [a, b] = domain.map(f);
  return (v) => range[0] + ((f(v) - a) / (b - a || 1)) * (range[1] - range[0]);
}
function extent(values, log, pad = 0.06) {
  let low = Math.min(...values), high = Math.max(...values);
  if (log) {
    const r = Math.max(Math.log(high / low), 0.2) * pad;
    return [low * Math.exp(-r), high * Math.exp(r)];
  }
  const r = (high - low || Math.abs(high) || 1) * pad;
  return [low - r, high + r];
}
// A chart: returns the svg with axes and the two scales.
function frame(box, { x, y, logX = false, logY = false, labelX, labelY, height = 300, tickX = (v) => si(v), tickY = (v) => si(v), at, margin }) {
  const width = Math.max(260, box.clientWidth || 600);
  const m = { l: 56, r: 14, t: 12, b: 40, ...margin };
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${labelY} against ${labelX}` });
  const sx = scale(x, [m.l, width - m.r], logX), sy = scale(y, [height - m.b, m.t], logY);
  for (const v of ticks(...y, logY)) {
    svg.append(draw("line", { class: "grid", x1: m.l, x2: width - m.r, y1: sy(v), y2: sy(v) }));
    svg.append(draw("text", { x: m.l - 7, y: sy(v) + 4, "text-anchor": "end" }, tickY(v)));
  }
  let last = -1e9;
  for (const v of at || ticks(...x, logX)) {
    if (sx(v) - last < 44) continue;
    last = sx(v);
    svg.append(draw("line", { class: "axis", x1: sx(v), x2: sx(v), y1: height - m.b, y2: height - m.b + 4 }));
    svg.append(draw("text", { x: sx(v), y: height - m.b + 17, "text-anchor": "middle" }, tickX(v)));
  }
  svg.append(draw("line", { class: "axis", x1: m.l, x2: width - m.r, y1: height - m.b, y2: height - m.b }));
  svg.append(draw("text", { x: (m.l + width - m.r) / 2, y: height - 5, "text-anchor": "middle" }, labelX));
  svg.append(draw("text", { x: 12, y: (height - m.b + m.t) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(height - m.b + m.t) / 2})` }, labelY));
  box.append(svg);
  return { svg, sx, sy, width, height, m };
}
function lines(box, series, options) {
  const shown = series.filter((s) => !state.off.has(s.arm) && s.points.length);
  if (!shown.length) return box.append(el("p", { class: "soft" }, "Nothing to show."));
  const all = shown.flatMap((s) => s.points);
  const f = frame(box, {
    x: options.x || extent(all.map((p) => p.x), options.logX, 0.02),
    y: extent(all.flatMap((p) => [p.low ?? p.y, p.high ?? p.y]), options.logY),
    ...options,
  });
  for (const s of shown) {
    if (s.points.some((p) => (p.high ?? p.y) > (p.low ?? p.y))) {
      const up = s.points.map((p) => `${f.sx(p.x)},${f.sy(p.high ?? p.y)}`), down = s.points.map((p) => `${f.sx(p.x)},${f.sy(p.low ?? p.y)}`);
      f.svg.append(draw("polygon", { points: [...up, ...down.reverse()].join(" "), style: `fill:${colour(s.arm)}`, opacity: 0.13 }));
    }
    f.svg.append(draw("polyline", { points: s.points.map((p) => `${f.sx(p.x)},${f.sy(p.y)}`).join(" "), fill: "none",
      style: `stroke:${colour(s.arm)}`, "stroke-width": 2, "stroke-dasharray": dash(s.arm), "stroke-linejoin": "round" }));
    for (const p of s.points) {
      const dot = draw("circle", { cx: f.sx(p.x), cy: f.sy(p.y), r: 3.2, style: `fill:${colour(s.arm)}` });
      const big = draw("circle", { cx: f.sx(p.x), cy: f.sy(p.y), r: 9, fill: "transparent" });
      hint(big, [s.arm, `${options.labelX}: ${(options.tickX || si)(p.x)}`, `${options.labelY}: ${(options.full || si)(p.y)}`, ...(s.note ? [s.note] : [])]);
      f.svg.append(dot, big);
    }
  }
}
function legend(notes = {}) {
  const box = el("div", { class: "legend" });
  for (const arm of arms) {
    const b = el("button", { type: "button", class: state.off.has(arm) ? "off" : "", title: "show or hide",
      onclick: () => { state.off.has(arm) ? state.off.delete(arm) : state.off.add(arm); render(); } },
      el("span", { class: "dot", style: `background:${colour(arm)}` }), arm + (notes[arm] ? `  ${notes[arm]}` : ""));
    box.append(b);
  }
  return box;
}

// -- what there is to show
const here = () => R.cells.filter((c) => JSON.stringify(c.point) === points[state.point].key);
const costOf = (c, key) => {
  const v = c.costs[key];
  return num(v && typeof v === "object" ? v.median : v);
};
// key, heading, shown as, whether more is better
const COSTS = [
  ["parameters", "Parameters", si, false],
  ["flops", "FLOPs per sample", si, false],
  ["activation_bytes", "Activations per sample", bytes, false],
  ["train_throughput", `Training, ${R.unit}/s`, si, true],
  ["infer_throughput", `Inference, ${R.unit}/s`, si, true],
  ["observed_throughput", `While it trained, ${R.unit}/s`, si, true],
  ["peak_bytes", "Peak memory added", bytes, false],
  ["state_bytes", "Decoding state", bytes, false],
  ["decode_seconds", "Seconds per decoded token", si, false],
  ["time_exponent", "Time grows as N^", (v) => v.toFixed(2), false],
  ["memory_exponent", "Memory grows as N^", (v) => v.toFixed(2), false],
];
const known = () => COSTS.filter(([k]) => here().some((c) => costOf(c, k) !== null));

function columns() {
  const found = [{ key: "arm", name: "Arm", value: (c) => c.arm, show: armCell, text: true }];
  if (TRAINS) {
    const span = extentOf(here().flatMap((c) => [num(c.low), num(c.high)]));
    found.push(
      { key: "score", name: `${R.split} ${R.metric}`, value: (c) => num(c.mean), show: (c) => scoreCell(c), down: HIGHER },
      { key: "interval", name: "95% interval", value: (c) => (num(c.high) === null ? null : c.high - c.low), show: (c) => intervalCell(c, span) },
      { key: "gap", name: `against ${R.reference}`, value: (c) => num(c.difference && c.difference.mean), show: gapCell, down: HIGHER },
      { key: "p", name: "p (Holm)", value: (c) => num(c.difference && c.difference.p_holm), show: (c) => pText(c) },
      { key: "lr", name: "Rate", value: (c) => num(c.lr), show: (c) => (num(c.lr) === null ? "" : String(c.lr)) },
    );
  }
  for (const [key, name, show, more] of known()) found.push({ key, name, value: (c) => costOf(c, key), show: (c) => spreadCell(c.costs[key], show), down: more });
  return found;
}
const extentOf = (values) => { const v = values.filter((x) => x !== null); return v.length ? [Math.min(...v), Math.max(...v)] : [0, 1]; };
const pText = (c) => { const p = num(c.difference && c.difference.p_holm); return p === null ? "" : p < 0.001 ? "<0.001" : p.toFixed(3); };
function armCell(c) {
  const tags = [];
  if (c.arm === R.reference) tags.push(el("span", { class: "tag" }, "reference"));
  if (R.controls.includes(c.arm)) tags.push(el("span", { class: "tag" }, "control"));
  if (c.matched && !c.matched.within) {
    const t = el("span", { class: "tag bad" }, "not matched");
    hint(t, [c.matched.why]);
    tags.push(t);
  }
  if (c.status !== "done" && c.status !== "measured") tags.push(el("span", { class: "tag bad" }, c.status));
  return el("span", {}, el("span", { class: "dot", style: `background:${colour(c.arm)}` }), el("span", { class: "arm" }, c.arm), ...tags);
}
function scoreCell(c) {
  return c.runs.length ? el("span", {}, score(c.mean), c.runs.length > 1 ? el("span", { class: "sub" }, ` ± ${score(c.sd)}`) : "") : "";
}
function intervalCell(c, [low, high]) {
  if (num(c.low) === null || c.runs.length < 2) return "";
  const s = scale([low, high], [4, 106], false), svg = draw("svg", { width: 110, height: 16, style: "width:110px;display:inline-block;vertical-align:middle" });
  svg.append(draw("line", { class: "axis", x1: 0, x2: 110, y1: 8, y2: 8 }));
  svg.append(draw("line", { x1: s(c.low), x2: s(c.high), y1: 8, y2: 8, style: `stroke:${colour(c.arm)}`, "stroke-width": 4, "stroke-linecap": "round", opacity: 0.5 }));
  for (const run of c.runs) svg.append(draw("circle", { cx: s(Math.min(high, Math.max(low, run.value))), cy: 8, r: 1.8, style: `fill:${colour(c.arm)}` }));
  svg.append(draw("circle", { cx: s(c.mean), cy: 8, r: 3.6, style: `fill:${colour(c.arm)}` }));
  hint(svg, [`${score(c.low)} to ${score(c.high)}`, ...c.runs.map((r) => `seed ${r.seed}: ${score(r.value)}`)]);
  return svg;
}
function gapCell(c) {
  const d = c.difference;
  if (!d || num(d.mean) === null) return "";
  const good = HIGHER ? d.mean > 0 : d.mean < 0;
  return el("span", { class: d.mean === 0 ? "" : good ? "up" : "down" }, (d.mean > 0 ? "+" : "") + d.mean.toFixed(4));
}
function spreadCell(v, show) {
  if (v && typeof v === "object") {
    const e = el("span", {}, num(v.median) === null ? "" : show(v.median));
    hint(e, [`median ${si(v.median)}`, `quartiles ${si(v.p25)} to ${si(v.p75)}`]);
    return e;
  }
  return num(v) === null ? "" : show(v);
}

function table(box) {
  const cols = columns();
  if (!state.sort) state.sort = TRAINS ? { key: "score", down: HIGHER } : { key: "arm", down: false };
  const by = cols.find((c) => c.key === state.sort.key) || cols[0], sign = state.sort.down ? -1 : 1;
  const rows = [...here()].sort((a, b) => {
    const x = by.value(a), y = by.value(b);
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (by.text ? x.localeCompare(y) : x - y);
  });
  const sortBy = (c) => { state.sort = { key: c.key, down: state.sort.key === c.key ? !state.sort.down : Boolean(c.down) }; render(); };
  const head = el("tr", {}, ...cols.map((c) => el("th", { scope: "col", tabindex: "0", "data-key": c.key,
    ...(c.key === by.key ? { "aria-sort": state.sort.down ? "descending" : "ascending" } : {}),
    onclick: () => sortBy(c), onkeydown: (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sortBy(c); } } }, c.name)));
  const body = rows.map((r) => el("tr", { class: r.arm === R.reference ? "reference" : "", "data-arm": r.arm }, ...cols.map((c) => el("td", { "data-name": c.name }, c.show(r)))));
  box.append(el("div", { class: "scroll" }, el("table", { id: "arms" }, el("thead", {}, head), el("tbody", {}, ...body))));
}

function scatter(box) {
  const options = known().filter(([k]) => { const v = here().map((c) => costOf(c, k)).filter((x) => x !== null); return v.length > 1 && Math.max(...v) > Math.min(...v); });
  if (!options.length) return;
  // at matched size the more telling cost is another one
  if (!options.some(([k]) => k === state.cost)) state.cost = (options.find(([k]) => k === "train_throughput") || options.find(([k]) => k === "flops") || options[0])[0];
  box.append(el("div", { class: "row", role: "group", "aria-label": "cost" }, ...options.map(([k, name]) =>
    el("button", { type: "button", "aria-pressed": String(k === state.cost), onclick: () => { state.cost = k; render(); } }, name))));
  const [key, name, show, more] = options.find(([k]) => k === state.cost);
  const dots = here().filter((c) => num(c.mean) !== null && costOf(c, key) !== null && !state.off.has(c.arm));
  if (!dots.length) return;
  const xs = dots.map((c) => costOf(c, key)), log = Math.min(...xs) > 0 && Math.max(...xs) / Math.min(...xs) > 3;
  const inner = el("div", { class: "chart" });
  box.append(inner);
  const f = frame(inner, { x: extent(xs, log, 0.12), y: extent(dots.flatMap((c) => [c.low, c.high]), false), logX: log, height: 380,
    labelX: name + (more ? " (more is better)" : " (less is better)"), labelY: `${R.split} ${R.metric}`, tickX: show, tickY: (v) => trim(v, 4) });
  const order = [...dots].sort((a, b) => (more ? -1 : 1) * (costOf(a, key) - costOf(b, key)) || (HIGHER ? b.mean - a.mean : a.mean - b.mean));
  const front = [];
  for (const c of order) if (!front.length || (HIGHER ? c.mean > front.at(-1).mean : c.mean < front.at(-1).mean)) front.push(c);
  if (front.length > 1) {
    const steps = [];
    front.forEach((c, i) => { if (i) steps.push(`${f.sx(costOf(c, key))},${f.sy(front[i - 1].mean)}`); steps.push(`${f.sx(costOf(c, key))},${f.sy(c.mean)}`); });
    f.svg.append(draw("polyline", { class: "front", points: steps.join(" ") }));
  }
  const taken = [];
  for (const c of dots) {
    const x = f.sx(costOf(c, key)), y = f.sy(c.mean);
    f.svg.append(draw("line", { x1: x, x2: x, y1: f.sy(c.low), y2: f.sy(c.high), style: `stroke:${colour(c.arm)}`, "stroke-width": 1.5, opacity: 0.6 }));
    const dot = draw("circle", { cx: x, cy: y, r: front.includes(c) ? 6.5 : 5, style: `fill:${colour(c.arm)};stroke:var(--card);stroke-width:1.5` });
    hint(dot, [c.arm, `${R.metric}: ${score(c.mean)}`, `${name}: ${show(costOf(c, key))}`, ...(front.includes(c) ? ["on the Pareto front"] : [])]);
    f.svg.append(dot);
    taken.push([x - 7, y - 7, 14, 14]);
  }
  for (const c of [...front, ...dots.filter((d) => !front.includes(d))]) {
    const x = f.sx(costOf(c, key)), y = f.sy(c.mean), w = c.arm.length * 6.4 + 4, h = 13;
    for (const [dx, dy] of [[9, 4], [-9 - w, 4], [-w / 2, -10], [-w / 2, 20], [9, -9], [-9 - w, -9], [9, 17], [-9 - w, 17]]) {
      const b = [x + dx, y + dy - 10, w, h];
      if (b[0] < f.m.l || b[0] + w > f.width || b[1] < 0 || b[1] + h > f.height - f.m.b) continue;
      if (taken.some(([a, d, e, g]) => a < b[0] + w && b[0] < a + e && d < b[1] + h && b[1] < d + g)) continue;
      taken.push(b);
      f.svg.append(draw("text", { class: "name", x: b[0], y: y + dy, style: front.includes(c) ? "font-weight:650" : "" }, c.arm));
      break;
    }
  }
}

function card(id, title, note, fill) {
  const inner = el("div", {});
  const s = el("section", { id }, el("h2", {}, title), ...(note ? [el("p", { class: "soft small" }, note)] : []), inner);
  document.getElementById("body").append(s);
  fill(inner);
}
// All boxes of a row first: a chart takes its box's width when it is drawn.
const charts = (box, titles) => { const row = el("div", { class: "charts" }); box.append(row); return titles.map((t) => chart(row, t)); };
const chart = (box, title) => { const c = el("div", { class: "chart" }, ...(title ? [el("h3", {}, title)] : [])); box.append(c); return c; };

function tiles() {
  const box = document.getElementById("tiles");
  box.replaceChildren();
  const done = here().filter((c) => num(c.mean) !== null);
  if (!TRAINS || !done.length) return;
  const best = [...done].sort((a, b) => (HIGHER ? b.mean - a.mean : a.mean - b.mean));
  const tile = (what, c, more) => box.append(el("div", { class: "tile" }, el("div", { class: "what" }, what), el("div", { class: "who" }, c.arm), el("div", { class: "small" }, more)));
  tile(`Best ${R.metric}`, best[0], `${score(best[0].mean)}, 95% interval ${score(best[0].low)} to ${score(best[0].high)}`);
  const tied = best.slice(1).filter((c) => c.high >= best[0].low && c.low <= best[0].high);
  if (tied.length) tile(tied.length > 1 ? `${tied.length} with overlapping intervals, next best` : "Overlapping interval", tied[0], tied.map((c) => c.arm).join(", "));
  const key = ["train_throughput", "observed_throughput"].find((k) => done.some((c) => costOf(c, k) !== null));
  if (key) {
    const fast = [...done].sort((a, b) => costOf(b, key) - costOf(a, key))[0];
    tile("Fastest in training", fast, `${si(costOf(fast, key))} ${R.unit}/s at ${R.metric} ${score(fast.mean)}`);
  }
  const ref = done.find((c) => c.arm === R.reference);
  if (ref && ref !== best[0]) tile("Reference", ref, `${score(ref.mean)}, rank ${best.indexOf(ref) + 1} of ${best.length}`);
}

function render() {
  const scroll = window.scrollY, left = document.querySelector(".scroll")?.scrollLeft || 0;
  const body = document.getElementById("body");
  body.replaceChildren();
  const pick = document.getElementById("points");
  pick.replaceChildren();
  if (points.length > 1) pick.append(el("span", { class: "soft small" }, "Shown at"), ...points.map((p, i) =>
    el("button", { type: "button", "aria-pressed": String(i === state.point), onclick: () => { state.point = i; render(); } }, p.name)));
  tiles();
  card("table", "Arms", "A heading sorts. Bars show intervals, small dots the seeds; figures of cost show their quartiles when pointed at.", table);
  if (TRAINS) {
    card("pareto", "Quality against cost", "The dotted line joins the arms that no other one beats in both (Pareto front). Vertical bars are 95% intervals.", scatter);
    const vary = Object.entries(R.vary).filter(([, v]) => v.length > 1 && v.every((x) => num(x) !== null));
    for (const [key, values] of vary) {
      const rest = JSON.stringify(Object.entries(points[state.point].point).filter(([k]) => k !== key));
      card(`over-${key}`, `Over ${key}`, "", (box) => {
        lines(chart(box), arms.map((arm) => ({ arm, points: R.cells.filter((c) => c.arm === arm && num(c.mean) !== null
          && JSON.stringify(Object.entries(c.point).filter(([k]) => k !== key)) === rest)
          .map((c) => ({ x: c.point[key], y: c.mean, low: c.low, high: c.high })).sort((a, b) => a.x - b.x) })),
          { labelX: key, labelY: `${R.split} ${R.metric}`, at: values, height: 340, full: score, logX: Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 4 });
        box.append(legend());
      });
    }
    if (here().some((c) => c.curve.length > 1)) card("curves", "Learning curves", "Validation while training: mean over the seeds, with the range between them. Names in the legend hide and show.", (box) => {
      const [left, right] = charts(box, [`Validation ${R.metric}`, "Training loss"]);
      box.append(legend());
      const series = (f) => here().map((c) => ({ arm: c.arm, points: c.curve.map(f).filter((p) => num(p.y) !== null) }));
      lines(left, series((p) => ({ x: p.step, y: p.mean, low: p.low, high: p.high })), { labelX: "step", labelY: R.metric, full: score });
      lines(right, series((p) => ({ x: p.step, y: p.loss })), { labelX: "step", labelY: "loss", full: score });
    });
  }
  if (R.scaling) {
    card("scaling", "Growth with the sequence length", "Logarithmic axes: a straight line is a power of the length. Exponents are fitted over the upper half of the lengths.", (box) => {
      const four = charts(box, ["Training step", "Forward pass", "Activations kept for backward", "Peak memory added by a training step"]);
      const label = Object.fromEntries(R.cells.map((c) => [c.label, c]));
      const of = (key, exponent) => Object.entries(R.scaling.arms).map(([name, rows]) => ({ arm: label[name].arm,
        note: num(label[name].costs[exponent]) === null ? "" : `grows as N^${label[name].costs[exponent].toFixed(2)}`,
        points: rows.map((r) => { const v = r[key]; return typeof v === "object" && v ? { x: r.length, y: v.median, low: v.p25, high: v.p75 } : { x: r.length, y: v }; }).filter((p) => p.y > 0) }));
      const options = { labelX: "tokens", logX: true, logY: true, at: R.scaling.lengths, tickX: (v) => (v % 1024 ? String(v) : `${v / 1024}k`) };
      lines(four[0], of("train_seconds", "time_exponent"), { ...options, labelY: "seconds" });
      lines(four[1], of("infer_seconds", "inference_exponent"), { ...options, labelY: "seconds" });
      lines(four[2], of("activation_bytes", "memory_exponent"), { ...options, labelY: "bytes" });
      lines(four[3], of("peak_bytes", "memory_exponent"), { ...options, labelY: "bytes" });
      box.append(legend(Object.fromEntries(R.cells.map((c) => [c.arm, num(c.costs.time_exponent) === null ? "" : `N^${c.costs.time_exponent.toFixed(2)}`]))));
    });
  }
  card("details", "Each arm", "How it was sized, what each learning rate reached on validation, the command that repeats its first run, and its whole configuration.", (box) => {
    for (const c of here()) {
      const parts = [];
      if (c.matched) {
        const m = c.matched, gap = `${(100 * m.difference).toFixed(2)}%`;
        parts.push(el("p", { class: "small" }, `${R.match}: ${m.count.toLocaleString("en")} (${m.difference >= 0 ? "+" : ""}${gap} against the reference; ${m.own.toLocaleString("en")} at the base model's width). ${m.why}`));
      }
      if (c.rates.length > 1) parts.push(el("p", { class: "small" }, "Validation by rate: " + c.rates.map((r) => `${r.lr}: ${score(r.val) || "no result"}`).join(", ")));
      for (const f of c.failures) parts.push(el("p", { class: "small down" }, `${f.label}: ${f.kind}: ${f.error}`));
      parts.push(el("pre", {}, c.command), el("pre", {}, c.config));
      box.append(el("details", { "data-arm": c.arm }, el("summary", {}, c.label), ...parts));
    }
  });
  const scroller = document.querySelector(".scroll");
  if (scroller) scroller.scrollLeft = left;
  window.scrollTo(0, scroll);
}
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; render(); } });
render();
