"use strict";
// Draws the parts of the page: each function takes a place in it and what to show.

const LINES = ["--blue", "--orange", "--violet", "--green"];
const HEAT = ["--cold", "--cool", "--even", "--warm", "--hot"]; // from 0 to MOST
const MOST = 2; // where the heat map's colours end, in units of the even share
const SVG = "http://www.w3.org/2000/svg";

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function shape(name, attributes, text = "") {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

function colour(variable) {
  return getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
}

// Numbers as people read them.

function readable(value, unit = "") {
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value; // NaN, Infinity
  if (unit === "%") return `${trimmed(value * 100, 3)}%`;
  if (unit === "s") return duration(value);
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= 1e4 && size >= limit) return `${trimmed(value / limit, 3)}${letter}`;
  }
  if (Number.isInteger(value) || size >= 1e3) {
    return Math.round(value).toLocaleString("en");
  }
  if (size < 1e-3) return value.toExponential(1);
  return value.toPrecision(size >= 1 && size < 10 ? 4 : 3);
}

function mark(value, unit) {
  if (!unit && Math.abs(value) < 1) return trimmed(value, 3);
  const text = readable(value, unit);
  return /^[\d.]+$/.test(text) ? String(Number(text)) : text; // 2, not 2.000
}

function trimmed(value, digits) {
  return String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  if (seconds < 1) return `${trimmed(seconds * 1000, 3)} ms`;
  if (seconds < 100) return `${trimmed(seconds, 3)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

function clockTime(unix) {
  return new Date(unix * 1000).toLocaleTimeString([], { hour12: false });
}

// The tip under the pointer or the finger.

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const above = event.clientY - height - 14;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above < 8 ? event.clientY + 18 : above}px`;
}

function hideTip() {
  tip.hidden = true;
}

addEventListener("scroll", hideTip, { passive: true });

// Figures.

function drawFigures(place, figures) {
  place.replaceChildren(...figures.map(({ name, value, unit, note }) => {
    const known = value !== null;
    const shown = element("dd", { className: known ? "" : "none" },
      known ? readable(value, unit) : "not yet", element("small", {}, note));
    return element("div", {}, element("dt", {}, name), shown);
  }));
}

// The heat map: a row a layer, a cell an expert, and a bar for the layer's MaxVio.

function drawHeat(canvas, load, maxVio) {
  const layers = load.length, experts = load[0].length;
  const width = canvas.parentElement.clientWidth, narrow = width < 600;
  const left = 30, bars = narrow ? 74 : 150, gap = 12, foot = 20;
  const row = layers <= 12 ? 24 : layers <= 32 ? 14 : 8;
  const cell = (width - left - bars - gap) / experts;
  const top = 5, height = top + layers * row + foot;
  const ratio = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.translate(0, top);
  const apart = cell >= 5 && row >= 12 ? 1 : 0;
  const heat = heatColours();
  load.forEach((loads, layer) => loads.forEach((value, expert) => {
    context.fillStyle = heat(value);
    const x = left + expert * cell, end = left + (expert + 1) * cell;
    // Whole pixels of the screen: cells that touch show no seams.
    const from = Math.round(x * ratio) / ratio, to = Math.round(end * ratio) / ratio;
    context.fillRect(from, layer * row, to - from - apart, row - apart);
  }));
  drawHeatLabels(context, { left, row, cell, layers, experts });
  drawVioBars(context, maxVio, { start: width - bars, bars, row, layers });
  canvas.setAttribute("aria-label", heatInWords(load, maxVio));
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const box = canvas.getBoundingClientRect();
    const layer = Math.floor((event.clientY - box.top - top) / row);
    const expert = Math.floor((event.clientX - box.left - left) / cell);
    if (layer < 0 || layer >= layers) return hideTip();
    if (expert >= 0 && expert < experts) {
      const times = readable(load[layer][expert]);
      showTip(event, `layer ${layer}, expert ${expert}\n${times} × the even share`);
    } else {
      showTip(event, `layer ${layer}\nMaxVio ${readable(maxVio[layer])}`);
    }
  };
  canvas.onpointerleave = hideTip;
}

function drawHeatLabels(context, { left, row, cell, layers, experts }) {
  context.fillStyle = colour("--muted");
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  const every = Math.ceil(14 / row);
  for (let layer = 0; layer < layers; layer += every) {
    context.fillText(String(layer), left - 7, layer * row + row / 2);
  }
  context.textAlign = "center";
  const bottom = layers * row + 11;
  for (const expert of ticks(0, experts - 1, Math.min(experts, 8))) {
    if (!Number.isInteger(expert)) continue;
    context.fillText(String(expert), left + (expert + 0.5) * cell, bottom);
  }
}

function drawVioBars(context, maxVio, { start, bars, row, layers }) {
  const most = Math.max(0.5, ...maxVio), room = bars - 34;
  const worst = Math.max(...maxVio);
  context.textAlign = "left";
  maxVio.forEach((vio, layer) => {
    const length = Math.max(1, (vio / most) * room), top = layer * row;
    context.fillStyle = colour(vio === worst && vio > 0.1 ? "--orange" : "--blue");
    context.fillRect(start, top + row * 0.15, length, row * 0.7 - 0.5);
    if (row >= 12 || vio === worst) {
      context.fillStyle = colour("--muted");
      context.fillText(vio.toFixed(2), start + length + 5, top + row / 2);
    }
  });
  context.fillStyle = colour("--muted");
  context.fillText("MaxVio", start, layers * row + 11);
}

function heatInWords(load, maxVio) {
  const all = load.flat();
  const least = readable(Math.min(...all)), most = readable(Math.max(...all));
  return `Load of ${load[0].length} experts in ${load.length} layers, from ${least} to `
    + `${most} times the even share; MaxVio at most ${readable(Math.max(...maxVio))}`;
}

function heatColours() {
  const stops = HEAT.map(colour).map((hex) =>
    [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const made = Array.from({ length: 65 }, (_, i) => {
    const at = (i / 64) * (stops.length - 1), low = Math.min(Math.floor(at), 3);
    const mix = stops[low].map((c, k) => c + (stops[low + 1][k] - c) * (at - low));
    return `rgb(${mix.map(Math.round).join(" ")})`;
  });
  return (value) => made[Math.round(Math.min(value / MOST, 1) * 64)];
}

// Devices: mean over layers, with the range of its layers.

function drawDevices(place, said, load) {
  const devices = load[0].map((_, device) => load.map((layer) => layer[device]));
  const means = devices.map((loads) => loads.reduce((a, b) => a + b) / loads.length);
  const most = Math.max(...means), busiest = means.indexOf(most);
  const end = Math.max(1.5, ...load.flat());
  const waits = load.map((layer) => Math.max(...layer)), worst = Math.max(...waits);
  const wait = waits.reduce((a, b) => a + b) / waits.length;
  said.textContent = `A layer waits for its busiest device, which computes `
    + `${wait.toFixed(2)} times the mean, and ${worst.toFixed(2)} times in layer `
    + `${waits.indexOf(worst)}. Over all layers device ${busiest} is the busiest. Bars `
    + "are means over layers, thin lines their range, the dashed line is the even share.";
  place.setAttribute("aria-label", said.textContent);
  place.replaceChildren(...means.map((mean, device) => {
    const percent = (value) => `${(value / end) * 100}%`;
    const low = Math.min(...devices[device]), high = Math.max(...devices[device]);
    const drawn = shape("svg", { "aria-hidden": "true" });
    drawn.append(
      shape("rect", { class: "fill", y: "22%", height: "56%", width: percent(mean), rx: 2 }),
      shape("line", { class: "range", x1: percent(low), x2: percent(high), y1: "50%", y2: "50%" }),
      shape("line", { class: "mean", x1: percent(1), x2: percent(1), y1: 0, y2: "100%" }));
    const row = element("div", { className: device === busiest ? "bar most" : "bar" },
      element("span", {}, `device ${device}`), drawn, element("span", {}, mean.toFixed(2)));
    return row;
  }));
}

// Lines over time or steps.

function tickStep(low, high, about) {
  const raw = (high - low || high || 1) / about, unit = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 2.5, 5, 10].map((m) => m * unit).find((s) => s >= raw * 0.999);
}

function ticks(low, high, about) {
  const step = tickStep(low, high, about);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = first; i * step <= high + step * 1e-6; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function drawChart(figure, chart) {
  const lines = Object.entries(chart.lines);
  const legend = element("span", { className: "legend" });
  lines.forEach(([name, values], i) => {
    const dash = element("i");
    dash.style.background = `var(${LINES[i]})`;
    const last = values.findLast((value) => value !== null);
    const value = readable(last, chart.unit);
    const text = lines.length > 1 ? `${name} ${value}` : value;
    legend.append(element("span", {}, dash, text));
  });
  figure.replaceChildren(
    element("figcaption", {}, element("b", {}, chart.title), legend),
    lineChart(figure, chart, lines.map(([, values]) => values)));
}

function lineChart(figure, chart, lines) {
  const width = figure.clientWidth, height = 170;
  const area = { left: 46, right: width - 8, top: 8, bottom: height - 22 };
  const drawn = shape("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img" });
  const known = lines.flat().filter((value) => value !== null);
  drawn.setAttribute("aria-label", `${chart.title}; a line chart`);
  if (!known.length) {
    drawn.append(shape("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing yet"));
    return drawn;
  }
  const xs = chart.x_N, { y, marks, isFrom0 } = scale(known, area);
  const span = xs.at(-1) - xs[0] || 1;
  const x = (value) => area.left + ((value - xs[0]) / span) * (area.right - area.left);
  for (const value of marks) {
    const height = y(value);
    drawn.append(
      shape("line", { class: "grid", x1: area.left, x2: area.right, y1: height, y2: height }),
      shape("text", { x: area.left - 6, y: height + 4, "text-anchor": "end" }, mark(value, chart.unit)));
  }
  drawn.append(...xLabels(chart, x, area));
  lines.forEach((values, i) => {
    const fill = i === 0 && isFrom0 ? area.bottom : null;
    drawn.append(...line(xs, values, x, y, `var(${LINES[i]})`, fill));
  });
  drawn.append(cross(drawn, chart, x, area));
  return drawn;
}

// From 0, unless values lie so high and close together that nothing could be seen.
function scale(known, area) {
  const least = Math.min(...known), most = Math.max(...known);
  const from = least < most * 0.8 || least === most ? Math.min(0, least) : least;
  const step = tickStep(from, most, 4), room = area.bottom - area.top;
  const low = Math.floor(from / step + 1e-9) * step;
  const top = Math.max(Math.ceil(most / step - 1e-9) * step, low + step);
  const y = (value) => area.bottom - ((value - low) / (top - low)) * room;
  return { y, marks: ticks(low, top, (top - low) / step), isFrom0: low === 0 };
}

function xLabels(chart, x, area) {
  const [first, last] = [chart.x_N[0], chart.x_N.at(-1)];
  const about = Math.max(3, Math.floor((area.right - area.left) / 90));
  const label = (value, text) => {
    const at = x(value);
    const anchor = at > area.right - 24 ? "end" : at < area.left + 12 ? "start" : "middle";
    return shape("text", { x: at, y: area.bottom + 16, "text-anchor": anchor }, text);
  };
  if (chart.x === "step") {
    return ticks(first, last, about).filter(Number.isInteger)
      .map((step) => label(step, step.toLocaleString("en")));
  }
  const unit = last - first > 150 ? 60 : 1, name = unit === 60 ? "min" : "s";
  return ticks(0, (last - first) / unit, about).map((ago) =>
    label(last - ago * unit, ago ? `−${ago} ${name}` : "now"));
}

// `bottom`: down to where the area below the line is filled; null: it isn't.
function line(xs, values, x, y, hue, bottom) {
  const parts = [[]];
  values.forEach((value, i) => {
    if (value === null) parts.push([]);
    else parts.at(-1).push([x(xs[i]).toFixed(1), y(value).toFixed(1)]);
  });
  const whole = parts.filter((part) => part.length);
  const drawn = [];
  for (const part of whole) {
    const path = part.map((point) => point.join(",")).join(" L");
    const style = { class: "line", d: `M${path}${part.length > 1 ? "" : " h0.1"}`, stroke: hue };
    if (part.length === 1) style["stroke-linecap"] = "round", style["stroke-width"] = 3;
    if (bottom !== null && part.length > 1) {
      const under = `M${part[0][0]},${bottom} L${path} V${bottom} Z`;
      drawn.push(shape("path", { class: "area", d: under, fill: hue }));
    }
    drawn.push(shape("path", style));
  }
  if (whole.length) {
    const [cx, cy] = whole.at(-1).at(-1);
    drawn.push(shape("circle", { cx, cy, r: 2.6, fill: hue }));
  }
  return drawn;
}

function cross(drawn, chart, x, area) {
  const rule = shape("line", { class: "cross", y1: area.top, y2: area.bottom, visibility: "hidden" });
  const read = (event) => {
    const box = drawn.getBoundingClientRect(), at = event.clientX - box.left;
    let nearest = 0;
    chart.x_N.forEach((value, i) => {
      if (Math.abs(x(value) - at) < Math.abs(x(chart.x_N[nearest]) - at)) nearest = i;
    });
    const value = chart.x_N[nearest];
    rule.setAttribute("x1", x(value));
    rule.setAttribute("x2", x(value));
    rule.setAttribute("visibility", "visible");
    const where = chart.x === "step" ? `step ${value.toLocaleString("en")}` : clockTime(value);
    const said = Object.entries(chart.lines).map(([name, values]) =>
      `${name} ${readable(values[nearest], chart.unit)}`);
    showTip(event, [where, ...said].join("\n"));
  };
  drawn.onpointermove = drawn.onpointerdown = read;
  drawn.onpointerleave = () => {
    rule.setAttribute("visibility", "hidden");
    hideTip();
  };
  return rule;
}

// Decisions, the newest first.

function drawDecisions(place, decisions) {
  const shown = [...decisions].reverse().map(({ time, kind, reason, change }) =>
    element("li", {},
      element("div", {}, element("time", {}, clockTime(time)),
        element("div", {}, element("span", { className: "chip" }, kind))),
      element("div", {}, element("div", { className: "change" }, change),
        element("div", { className: "reason" }, reason))));
  if (!shown.length) shown.push(element("li", {}, element("span", { className: "reason" }, "none yet")));
  place.replaceChildren(...shown);
}
