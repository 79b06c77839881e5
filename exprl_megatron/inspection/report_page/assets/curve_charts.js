// Curves of all metrics, evaluations, and what differs in the configs.

const GROUP_ORDER = ["reward", "verifier", "judge", "score", "length", "learning", "kl", "loss", "sampler_gap"];
const OPEN_AT_FIRST = new Set(["reward", "verifier", "length", "learning"]);

function metricGroups() {
  const groups = new Map();
  for (const run of MODEL.runs) {
    for (const name of Object.keys(run.curves.metrics)) {
      const group = name.includes("/") ? name.slice(0, name.indexOf("/")) : name === "loss" ? "loss" : "learning";
      if (!groups.has(group)) groups.set(group, new Set());
      groups.get(group).add(name);
    }
  }
  const rank = (group) => (GROUP_ORDER.includes(group) ? GROUP_ORDER.indexOf(group) : GROUP_ORDER.length);
  return [...groups].sort(([a], [b]) => rank(a) - rank(b) || a.localeCompare(b));
}

function curveTab() {
  const wanted = state.filter.toLowerCase();
  const sections = metricGroups().map(([group, names]) => {
    const found = [...names].filter((name) => name.toLowerCase().includes(wanted));
    return found.length ? curveGroup(group, found, wanted !== "") : null;
  });
  const search = el("input", {
    type: "search", value: state.filter, placeholder: "for example kl", id: "metric-filter",
    oninput: (event) => { state.filter = event.target.value; refresh("metric-filter"); },
  });
  return [
    el("div", { class: "controls" },
      choice("Over", [["step", "steps"], ["time", "time"]], state.axis, (axis) => { state.axis = axis; refresh(); }),
      el("label", { class: "field" }, el("span", {}, "Metrics with"), search)),
    thinned(),
    wanted === "" || "evaluation".includes(wanted) ? evaluationSection() : null,
    sections.some(Boolean) ? sections : note(wanted ? "No metric has this in its name." : "No step is finished yet; its metrics will be here."),
    wanted === "" ? configSection() : null,
  ];
}

function thinned() {
  const found = MODEL.runs.filter((run) => run.curves.of);
  return found.map((run) => note(`${run.name}: ${run.curves.steps.length} of ${run.curves.of} steps, evenly spaced, have points here.`));
}

function curveGroup(group, names, forced) {
  if (state.openGroups === null) state.openGroups = new Set(OPEN_AT_FIRST);
  const charts = el("div", { class: "grid" });
  const fill = () => { if (!charts.childElementCount) charts.append(...names.map(metricChart)); };
  const open = forced || state.openGroups.has(group);
  if (open) fill();
  return el("details", {
    class: "group", open,
    ontoggle: (event) => {
      if (forced) return;
      if (event.target.open) { fill(); state.openGroups.add(group); } else state.openGroups.delete(group);
    },
  }, el("summary", {}, el("h2", {}, group), el("span", { class: "count" }, `${names.length}`)), charts);
}

function metricChart(name) {
  const values = shownRuns().flatMap(([run]) => run.curves.metrics[name] ?? []);
  const none = values.every((value) => value === null);
  return chart(name, (color) => ({
    traces: shownRuns().filter(([run]) => run.curves.metrics[name]).map(([run, index]) => ({
      type: "scatter", mode: run.curves.steps.length > 60 ? "lines" : "lines+markers", marker: { size: 4 },
      x: axisOf(run), y: run.curves.metrics[name], name: chartText(run.name),
      line: { color: runColor(index), dash: runDash(index), width: 1.6 },
      customdata: run.curves.stages.map((stage, place) => `${chartText(stage)}, step ${run.curves.steps[place]}`),
      hovertemplate: "%{customdata}: %{y:.4g}<extra>%{fullData.name}</extra>",
    })),
    layout: none ? emptyLayout("no finite value") : { ...stageMarks(color), xaxis: curveAxis(), yaxis: valueAxis(values) },
  }));
}

function evaluationSection() {
  const names = new Set(MODEL.runs.flatMap((run) => run.curves.evaluations.flatMap((each) => Object.keys(each.values))));
  const measures = [...names].filter((name) => names.has(`${name}/low`));
  if (!measures.length) return null;
  const rows = shownRuns().flatMap(([run]) => run.curves.evaluations.map((each) => [
    run.name, each.step === 0 ? "start" : `${each.stage}, step ${each.step}`,
    ...measures.map((name) => interval(each.values, name)),
  ]));
  return el("details", { class: "group", open: true },
    el("summary", {}, el("h2", {}, "evaluation"), el("span", { class: "count" }, `${measures.length}`)),
    el("div", { class: "grid" }, measures.map(evaluationChart)),
    table(["run", "after", ...measures], rows, { label: "Evaluations with their intervals" }));
}

function interval(values, name) {
  const value = values[name];
  return value === undefined || value === null ? "–" : `${percent(value)} [${percent(values[`${name}/low`])}, ${percent(values[`${name}/high`])}]`;
}

function evaluationChart(name) {
  return chart(`${name} on held-out problems`, (color) => ({
    traces: shownRuns().map(([run, index]) => {
      const found = run.curves.evaluations.filter((each) => typeof each.values[name] === "number");
      return {
        type: "scatter", mode: "lines+markers", name: chartText(run.name),
        x: found.map((each) => (state.axis === "step" ? each.step : each.wall / 60)),
        y: found.map((each) => each.values[name]),
        line: { color: runColor(index), dash: runDash(index) }, marker: { size: 7 },
        error_y: {
          type: "data", symmetric: false, thickness: 1.2, width: 4,
          array: found.map((each) => each.values[`${name}/high`] - each.values[name]),
          arrayminus: found.map((each) => each.values[name] - each.values[`${name}/low`]),
        },
        hovertemplate: "%{x:.4g}: %{y:.1%}<extra>%{fullData.name}</extra>",
      };
    }),
    layout: { ...stageMarks(color), xaxis: evaluationAxis(), yaxis: { tickformat: ".0%", rangemode: "tozero" } },
  }));
}

function evaluationAxis() {
  const steps = shownRuns().flatMap(([run]) => [...run.curves.steps, ...run.curves.evaluations.map((each) => each.step)]);
  return state.axis === "step" ? stepAxis(steps) : curveAxis();
}

function configSection() {
  const several = MODEL.runs.length > 1;
  // What all runs have comes first: the keys of a stage that only one of them has are many.
  const alone = (row) => row.values.some((value) => value === "");
  const differing = MODEL.config.filter((row) => row.differs).sort((a, b) => alone(a) - alone(b));
  const rows = (found) => found.map((row) => [row.key, ...row.values]);
  const headings = ["key", ...MODEL.runs.map((run) => run.name)];
  return el("details", { class: "group", open: several },
    el("summary", {}, el("h2", {}, several ? "config: what differs" : "config"),
      el("span", { class: "count" }, `${several ? differing.length : MODEL.config.length}`)),
    several
      ? [table(headings, rows(differing), { class: "config", label: "Keys that differ" }),
        el("details", {}, el("summary", {}, `all ${MODEL.config.length} keys`),
          table(headings, rows(MODEL.config), { class: "config", label: "All keys" }))]
      : table(headings, rows(MODEL.config), { class: "config", label: "All keys" }));
}
