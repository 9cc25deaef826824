"use strict";
// Charts are drawn at the width of the page. Each is a slider over its points: by pointer or by arrow keys, it shows
// the values of a point below the chart.
const HEIGHT = 220, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 34;
const DASHES = ["", "6 3", "2 3", "9 3 2 3", "12 4", "4 2"];
const color = (i) => `var(--c${i % 10})`;

function element(parent, name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function shown(value, percent) {
  if (percent) return `${(100 * value).toFixed(1)}%`;
  return value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e5) ? value.toExponential(1) : String(+value.toPrecision(3));
}

function ticks(low, high, log) {
  if (log) {
    const found = [];
    for (let e = Math.ceil(Math.log10(low)); e <= Math.floor(Math.log10(high)); e++) found.push(10 ** e);
    if (found.length > 1) return found.filter((_, i) => i % Math.ceil(found.length / 6) === 0);
    return [low, high];
  }
  const raw = (high - low) / 4 || 1, size = 10 ** Math.floor(Math.log10(raw));
  const step = size * [1, 2, 5, 10].find((each) => each * size >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return found;
}

// Axes of a chart; returns its scales.
function axes(svg, width, spec, range) {
  const [x0, x1, y0, y1] = range, bottom = HEIGHT - BOTTOM;
  const value = spec.log ? Math.log10 : (v) => v;
  const x = (v) => LEFT + ((v - x0) / (x1 - x0 || 1)) * (width - LEFT - RIGHT);
  const y = (v) => bottom - ((value(v) - value(y0)) / (value(y1) - value(y0) || 1)) * (bottom - TOP);
  for (const tick of ticks(y0, y1, spec.log)) {
    element(svg, "line", {x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick), stroke: "var(--line)", "stroke-width": 0.5});
    element(svg, "text", {x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end"}, spec.percent ? `${Math.round(100 * tick)}%` : shown(tick));
  }
  for (const tick of ticks(x0, x1)) {
    if (spec.whole && tick % 1) continue;
    element(svg, "text", {x: x(tick), y: bottom + 15, "text-anchor": "middle"}, spec.xPercent ? `${Math.round(100 * tick)}%` : tick);
  }
  element(svg, "text", {x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end"}, spec.axis);
  return {x, y, bottom};
}

// Each kind returns the number of points, the point nearest to a position, and its text and marks.
const KINDS = {
  line(svg, width, spec) {
    const xs = [...new Set(spec.series.flatMap((each) => each.x))].sort((a, b) => a - b);
    const all = spec.series.flatMap((each) => each.y);
    const low = Math.min(...all), high = Math.max(...all);
    const [y0, y1] = spec.percent ? [0, 1] : low === high ? [low - (Math.abs(low) || 1), high + (Math.abs(low) || 1)] : [low, high];
    const at = axes(svg, width, {...spec, whole: true}, [xs[0], xs.at(-1), y0, y1]);
    spec.series.forEach((each) => {
      const points = each.x.map((x, k) => `${at.x(x).toFixed(1)},${at.y(each.y[k]).toFixed(1)}`).join(" ");
      element(svg, "polyline", {points, fill: "none", stroke: color(each.run), "stroke-width": 1.8, "stroke-dasharray": DASHES[each.run % 6]});
      if (each.x.length < 30) each.x.forEach((x, k) => element(svg, "circle", {cx: at.x(x), cy: at.y(each.y[k]), r: 2.5, fill: color(each.run)}));
    });
    const nearest = (values, x) => values.reduce((best, v, k) => (Math.abs(v - x) < Math.abs(values[best] - x) ? k : best), 0);
    const here = (i) => spec.series.map((each) => nearest(each.x, xs[i])).map((k, s) => [spec.series[s].x[k], spec.series[s].y[k]]);
    return {
      count: xs.length,
      find: (px) => xs.reduce((best, v, i) => (Math.abs(at.x(v) - px) < Math.abs(at.x(xs[best]) - px) ? i : best), 0),
      text: (i) => `${spec.axis} ${xs[i]}: ` + here(i).map(([, y], s) => (spec.series.length > 1 ? `${spec.series[s].name} ` : "") + shown(y, spec.percent)).join(", "),
      marks: (i) => here(i).map(([x, y], s) => [at.x(x), at.y(y), color(spec.series[s].run)]),
    };
  },
  bars(svg, width, spec) {
    const at = axes(svg, width, {...spec, percent: true, xPercent: true}, [0, 1, 0, 1]);
    const count = spec.bins.length, wide = at.x(1 / count) - at.x(0) - 2;
    spec.bins.forEach(([, accuracy], i) => {
      if (accuracy !== null) element(svg, "rect", {x: at.x(i / count) + 1, y: at.y(accuracy), width: wide, height: Math.max(1, at.bottom - at.y(accuracy)), fill: color(0), "fill-opacity": 0.55});
    });
    element(svg, "line", {x1: at.x(0), y1: at.y(0), x2: at.x(1), y2: at.y(1), stroke: "var(--text)", "stroke-dasharray": "5 4"});
    return {
      count,
      find: (px) => Math.max(0, Math.min(count - 1, Math.floor(((px - at.x(0)) / (at.x(1) - at.x(0))) * count))),
      text(i) {
        const [confidence, accuracy, images] = spec.bins[i];
        const range = `${Math.round((100 * i) / count)}–${Math.round((100 * (i + 1)) / count)}%`;
        return images ? `${range}: ${images} images, confidence ${shown(confidence, true)}, accuracy ${shown(accuracy, true)}` : `${range}: no images`;
      },
      marks: (i) => (spec.bins[i][2] ? [[at.x((i + 0.5) / count), at.y(spec.bins[i][1]), color(0)]] : []),
    };
  },
  means(svg, width, spec) {
    const left = Math.min(190, 0.45 * width), step = 22, bottom = TOP + step * spec.rows.length;
    const low = Math.min(...spec.rows.map((row) => row.mean - row.deviation)), high = Math.max(...spec.rows.map((row) => row.mean + row.deviation));
    const pad = 0.05 * (high - low) || 0.05, x0 = low - pad, x1 = high + pad;
    const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - RIGHT), y = (i) => TOP + step * (i + 0.5);
    for (const tick of ticks(x0, x1)) {
      element(svg, "line", {x1: x(tick), x2: x(tick), y1: TOP, y2: bottom, stroke: "var(--line)", "stroke-width": 0.5});
      element(svg, "text", {x: x(tick), y: bottom + 15, "text-anchor": "middle"}, shown(tick, true));
    }
    element(svg, "text", {x: width - RIGHT, y: bottom + BOTTOM - 4, "text-anchor": "end"}, "top-1");
    const letters = Math.floor(left / 7);
    spec.rows.forEach((row, i) => {
      const label = row.name.length > letters ? `${row.name.slice(0, letters - 1)}…` : row.name;
      element(svg, "text", {x: left - 8, y: y(i) + 4, "text-anchor": "end"}, label);
      element(svg, "line", {x1: x(row.mean - row.deviation), x2: x(row.mean + row.deviation), y1: y(i), y2: y(i), stroke: color(0), "stroke-width": 2});
      element(svg, "circle", {cx: x(row.mean), cy: y(i), r: 4, fill: color(0)});
    });
    return {
      height: bottom + BOTTOM,
      count: spec.rows.length,
      find: (_, py) => Math.max(0, Math.min(spec.rows.length - 1, Math.floor((py - TOP) / step))),
      text: (i) => `${spec.rows[i].name}: ${shown(spec.rows[i].mean, true)} ± ${(100 * spec.rows[i].deviation).toFixed(1)}`,
      marks: (i) => [[x(spec.rows[i].mean), y(i), color(0)]],
    };
  },
  scatter(svg, width, spec) {
    const size = HEIGHT + 60, x = (v) => 8 + (v / 1000) * (width - 16), y = (v) => 8 + (v / 1000) * (size - 16);
    spec.points.forEach(([px, py, kind, source]) => {
      const [cx, cy] = [x(px), y(py)];
      if (source === "held-out") element(svg, "circle", {cx, cy, r: 3.5, fill: color(kind)});
      else element(svg, "path", {d: `M${cx - 3},${cy - 3}l6,6m0,-6l-6,6`, stroke: color(kind), "stroke-width": 1.6});
    });
    return {
      height: size,
      count: spec.points.length,
      find: (px, py) => spec.points.reduce((best, p, i) => {
        const distance = (q) => (x(q[0]) - px) ** 2 + (y(q[1]) - py) ** 2;
        return distance(p) < distance(spec.points[best]) ? i : best;
      }, 0),
      text: (i) => `${spec.classes[spec.points[i][2]]}, ${spec.points[i][3]}`,
      marks: (i) => [[x(spec.points[i][0]), y(spec.points[i][1]), color(spec.points[i][2])]],
    };
  },
};

for (const plot of document.querySelectorAll(".plot")) {
  const spec = JSON.parse(plot.dataset.chart), readout = plot.parentElement.querySelector(".readout");
  let svg, drawn, current = 0;
  const draw = () => {
    svg?.remove();
    svg = element(plot, "svg", {"aria-hidden": "true", height: HEIGHT});
    drawn = KINDS[spec.kind](svg, plot.clientWidth, spec);
    svg.setAttribute("height", drawn.height || HEIGHT);
    plot.setAttribute("aria-valuemin", 0);
    plot.setAttribute("aria-valuemax", drawn.count - 1);
    name(current);
  };
  const name = (i) => {
    current = i;
    plot.setAttribute("aria-valuenow", i);
    plot.setAttribute("aria-valuetext", drawn.text(i));
  };
  const clear = () => svg.querySelectorAll(".mark").forEach((each) => each.remove());
  const show = (i) => {
    clear();
    name(i);
    for (const [cx, cy, stroke] of drawn.marks(i)) element(svg, "circle", {class: "mark", cx, cy, r: 6, fill: "none", stroke, "stroke-width": 2});
    readout.textContent = drawn.text(i);
  };
  const leave = () => { clear(); readout.textContent = "\u00a0"; };
  plot.addEventListener("pointermove", (event) => {
    const frame = plot.getBoundingClientRect();
    show(drawn.find(event.clientX - frame.left, event.clientY - frame.top));
  });
  plot.addEventListener("pointerleave", () => (document.activeElement === plot ? show(current) : leave()));
  plot.addEventListener("focus", () => show(current));
  plot.addEventListener("blur", leave);
  plot.addEventListener("keydown", (event) => {
    const many = Math.ceil(drawn.count / 10);
    const moves = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -many, PageUp: many, Home: -drawn.count, End: drawn.count};
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(Math.max(0, Math.min(drawn.count - 1, current + moves[event.key])));
  });
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth && plot.clientWidth !== width) { width = plot.clientWidth; draw(); }
  }).observe(plot);
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), column = head.cellIndex, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const each of head.parentElement.children) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const compare = (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true});
    body.append(...[...body.rows].sort((a, b) => {
      if (!key(a) || !key(b)) return !key(a) - !key(b);
      return (up ? 1 : -1) * (isNaN(key(a)) || isNaN(key(b)) ? compare(a, b) : key(a) - key(b));
    }));
  });
}
