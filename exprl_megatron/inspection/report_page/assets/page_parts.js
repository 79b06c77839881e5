// Elements, numbers, colors and charts. Text from runs becomes DOM text or escaped chart text, never markup.

let MODEL = JSON.parse(document.getElementById("model").textContent);
const LIVE = document.body.hasAttribute("data-live");
const RUN_COLORS = ["#3b82d0", "#d97706", "#0f9d76", "#c2408c", "#7c62d6", "#9a7b00", "#d1493a", "#5b8f2c"];
const PHASE_COLORS = {
  sync: "#577590", sampling: "#2a9d8f", grading: "#e0b040", log_probs: "#8ab17d", train: "#e76f51",
  save: "#b5838d", other: "#a3a3a3",
};
const ORDERED = ["#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac"];

// What the reader has chosen; it outlives a refresh of the data.
const state = {
  tab: "curves", axis: "step", hidden: new Set(), openGroups: null, filter: "", run: 0, place: null, trace: null,
  sort: "page", only: "all", search: "", color: "score", lane: {},
};

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") made[name] = value;
    else if (name === "style") Object.entries(value).forEach(([key, each]) => made.style.setProperty(key, each));
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// Charts read a few tags in their texts: these are escaped.
const chartText = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

const runColor = (index) => RUN_COLORS[index % RUN_COLORS.length];
const runDash = (index) => ["solid", "dash", "dot", "dashdot"][Math.floor(index / RUN_COLORS.length) % 4];
const isShown = (index) => !state.hidden.has(index);
const shownRuns = () => MODEL.runs.map((run, index) => [run, index]).filter(([, index]) => isShown(index));
const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)} %`);
const sum = (values) => values.reduce((total, value) => total + value, 0);

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;

function signed(value) {
  return value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + number(Math.abs(value));
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 100) return `${number(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function table(headings, rows, options = {}) {
  const cell = (tag, content, place) => {
    const right = (options.right || []).includes(place);
    return el(tag, { class: right ? "right" : null, scope: tag === "th" ? "col" : null }, content);
  };
  const head = el("thead", {}, el("tr", {}, headings.map((text, place) => cell("th", text, place))));
  const body = el("tbody", {}, rows.map((row) => el("tr", {}, row.map((text, place) => cell("td", text, place)))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label || headings.join(", ") },
    el("table", { class: options.class || null }, head, body));
}

function select(label, options, value, onchange) {
  const made = el("select", { onchange: (event) => onchange(event.target.value) },
    options.map(([key, text]) => el("option", { value: key, selected: String(key) === String(value) }, text)));
  return el("label", { class: "field" }, el("span", {}, label), made);
}

function choice(label, options, value, onchange) {
  const buttons = options.map(([key, text]) =>
    el("button", { type: "button", "aria-pressed": String(key === value), onclick: () => onchange(key) }, text));
  return el("div", { class: "choice", role: "group", "aria-label": label }, el("span", {}, label), buttons);
}

function note(...content) {
  return el("p", { class: "note" }, ...content);
}

// Charts are drawn when they come into view, and again when the theme changes.
const drawn = new Map();
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target);
}, { rootMargin: "200px" });

function chart(title, make, options = {}) {
  const place = el("div", { class: "plot", role: "img", "aria-label": title });
  place.style.height = `${options.height || 220}px`;
  place.make = make;
  place.title_ = title;
  waiting.observe(place);
  const caption = el("figcaption", {}, title);
  return el("figure", { class: options.wide ? "chart wide" : "chart" }, caption, place,
    options.below ? el("div", { class: "below" }, options.below) : null);
}

// Of a chart that has nothing to draw.
function emptyLayout(text) {
  const centered = { showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
  return { xaxis: { visible: false }, yaxis: { visible: false }, annotations: [{ text, ...centered }] };
}

function forgetCharts() {
  for (const place of drawn.keys()) Plotly.purge(place);
  drawn.clear();
  waiting.disconnect();
}

function draw(place) {
  waiting.unobserve(place);
  const css = getComputedStyle(document.documentElement);
  const color = (name) => css.getPropertyValue(name).trim();
  const { traces, layout = {} } = place.make(color);
  const axis = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--line"), automargin: true };
  const full = {
    margin: { l: 44, r: 12, t: 16, b: 34 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 11, color: color("--text") },
    hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--text") } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    showlegend: false, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    ...layout,
    xaxis: { ...axis, ...(layout.xaxis || {}) },
    yaxis: { ...axis, ...(layout.yaxis || {}) },
  };
  const config = {
    displaylogo: false, responsive: true, displayModeBar: "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
    toImageButtonOptions: { filename: place.title_.replace(/[^\w-]+/g, "-"), scale: 2 },
  };
  Plotly.react(place, traces, full, config);
  drawn.set(place, true);
}

function redrawCharts() {
  for (const place of drawn.keys()) draw(place);
}

// Steps of a run on the chosen axis.
function axisOf(run) {
  return state.axis === "step" ? run.curves.steps : run.curves.wall.map((seconds) => seconds / 60);
}

// The axis of `axisOf`, by default of the shown runs.
function curveAxis() {
  return state.axis === "step" ? stepAxis(shownRuns().flatMap(([run]) => run.curves.steps)) : { title: { text: "minutes" } };
}

// An axis of whole steps: with few of them the library would mark parts of steps, too.
function stepAxis(steps) {
  const [low, high] = [Math.min(...steps), Math.max(...steps)];
  const few = high - low < 8 ? { dtick: 1, tick0: 0 } : {};
  return { title: { text: "step" }, ...few, ...(low === high ? { range: [low - 0.6, low + 0.6] } : {}) };
}

// Around a constant the library would draw an axis from 1 below it to 1 above it, whatever its size.
function valueAxis(values) {
  const found = values.filter((value) => typeof value === "number");
  const [low, high] = [Math.min(...found), Math.max(...found)];
  if (!found.length || low !== high) return {};
  return { range: low === 0 ? [-0.02, 1] : low > 0 ? [0, 2 * low] : [2 * low, 0] };
}

// A line where a stage begins; one for all runs where they agree.
function stageMarks(color) {
  const marks = new Map();
  for (const [run, index] of shownRuns()) {
    const { stages, steps, wall } = run.curves;
    stages.forEach((stage, place) => {
      if (place > 0 && stages[place - 1] === stage) return;
      const x = state.axis === "step" ? steps[place] - 0.5 : place === 0 ? 0 : wall[place - 1] / 60;
      const key = `${x}|${stage}`;
      const former = marks.get(key);
      marks.set(key, former ? { ...former, several: true } : { x, stage, index });
    });
  }
  // Stages of several runs that begin at the same place share a line and a label.
  const joined = new Map();
  for (const mark of marks.values()) {
    const former = joined.get(mark.x);
    joined.set(mark.x, former ? { ...former, stage: `${former.stage}, ${mark.stage}`, several: true } : mark);
  }
  const all = [...joined.values()];
  const one = new Set(all.map(({ index }) => index)).size <= 1;
  return {
    shapes: all.map(({ x, index, several }) => ({
      type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1,
      line: { color: one || several ? color("--muted") : runColor(index), width: 1, dash: "dot" },
    })),
    annotations: all.map(({ x, stage, index, several }) => ({
      x, yref: "paper", y: 1, yanchor: "bottom", xanchor: "left", showarrow: false, text: chartText(stage),
      font: { size: 9, color: one || several ? color("--muted") : runColor(index) },
    })),
  };
}

// The steps and evaluations of a run whose traces were read.
const stepsRead = (run) => run.places.filter((place) => place.step !== null && !place.fault);
const placeName = (place) => (place.step === null ? `evaluation ${place.stage}` : `${place.stage}, step ${place.step}`);
