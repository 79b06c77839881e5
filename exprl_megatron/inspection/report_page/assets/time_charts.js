// Where the time goes: phases of every step, the waterfall, parts of the weight sync, memory, the planner.

function timeTab() {
  return shownRuns().map(([run, index]) => el("section", {},
    el("h2", { class: "of-run" }, el("span", { class: "chip", style: { "--run": runColor(index) } }), run.name),
    run.time.steps.length ? phases(run) : note("No step is finished yet."),
    parts(run), run.curves.steps.length ? predicted(run) : null));
}

function phases(run) {
  const steps = run.time.steps;
  const labels = steps.map((each) => `${chartText(each.stage)} ${each.step}`);
  const slowest = steps.map((each) => run.time.phases[each.seconds.indexOf(Math.max(...each.seconds))]);
  const traces = run.time.phases.map((phase, at) => ({
    type: "bar", name: phase.replace("_", "-"), x: labels, y: steps.map((each) => each.seconds[at]), customdata: slowest,
    marker: { color: PHASE_COLORS[phase] },
    hovertemplate: `%{x}: ${phase} %{y:.3g} s; longest: %{customdata}<extra></extra>`,
  }));
  return [
    el("ul", { class: "plain" }, Object.entries(run.time.stages).map(([stage, sentence]) => el("li", {}, el("strong", {}, `${stage}: `), sentence))),
    el("div", { class: "grid" },
      chart("seconds of each step, by phase", () => ({
        traces, layout: { barmode: "stack", showlegend: true, yaxis: { title: { text: "s" } }, xaxis: { type: "category", nticks: 12 } },
      }), { wide: true, height: 300 })),
    waterfall(run),
  ];
}

// One step as it went: what the trainer did, and what was sampled and graded meanwhile.
function waterfall(run) {
  const steps = [...new Map(run.time.spans.map((span) => [`${span[0]}|${span[1]}`, [span[0], span[1]]])).values()];
  if (!steps.length) return null;
  const last = steps.length - 1;
  const chosen = Math.min(state.lane[run.name] ?? last, last);
  const choose = (value) => { state.lane[run.name] = Number(value); refresh(); };
  const [stage, step] = steps[chosen];
  const spans = run.time.spans.filter((span) => span[0] === stage && span[1] === step);
  const start = Math.min(...spans.map((span) => span[3]));
  const lane = (name) => ({ sampling: "sampling", grading: "grading" }[name] || "trainer");
  const names = [...new Set(spans.map((span) => span[2]))];
  const of = run.time.steps.find((each) => each.stage === stage && each.step === step);
  const longest = of ? run.time.phases[of.seconds.indexOf(Math.max(...of.seconds))] : null;
  return [
    el("div", { class: "controls" }, select("Waterfall of", steps.map(([s, n], at) => [at, `${s}, step ${n}`]), chosen, choose),
      longest ? el("p", {}, el("strong", {}, `${longest.replace("_", "-")} is the bottleneck of this step`), `; what helps: ${run.time.remedies[longest]}.`) : null),
    el("div", { class: "grid" }, chart(`waterfall of ${stage}, step ${step}`, () => ({
      traces: names.map((name) => {
        const found = spans.filter((span) => span[2] === name);
        return {
          type: "bar", orientation: "h", name: name.replace("_", "-"), marker: { color: PHASE_COLORS[name] || PHASE_COLORS.other },
          y: found.map((span) => lane(span[2])), base: found.map((span) => span[3] - start), x: found.map((span) => span[4] - span[3]),
          hovertemplate: `${chartText(name)}: %{x:.3g} s from %{base:.3g} s on<extra></extra>`,
        };
      }),
      layout: {
        barmode: "overlay", showlegend: true, bargap: 0.35, xaxis: { title: { text: "s" } },
        yaxis: { categoryorder: "array", categoryarray: ["grading", "sampling", "trainer"] },
      },
    }), { wide: true, height: 220 })),
  ];
}

// Metrics of one prefix as lines of one chart.
function family(run, title, names, unit) {
  const found = names.filter((name) => run.curves.metrics[name]);
  if (!found.length) return null;
  return chart(title, (color) => ({
    traces: found.map((name, at) => ({
      type: "scatter", mode: "lines", x: axisOf(run), y: run.curves.metrics[name], name: chartText(name),
      line: { color: ORDERED[at % ORDERED.length], width: 1.6 }, hovertemplate: "%{x:.4g}: %{y:.4g}<extra>%{fullData.name}</extra>",
    })),
    layout: { ...stageMarks(color), showlegend: true, xaxis: curveAxis(), yaxis: { title: { text: unit }, rangemode: "tozero" } },
  }), { height: 280 });
}

function parts(run) {
  const names = Object.keys(run.curves.metrics);
  const sync = ["gather", "quantize", "send", "load", "check", "seconds"].map((part) => `sync/${part}`);
  const of = (prefix) => names.filter((name) => name.startsWith(prefix));
  const charts = [
    family(run, "weight sync, its parts", sync, "s"),
    family(run, "weight sync, throughput", ["sync/gb_per_s"], "GB/s"),
    family(run, "memory", of("memory/"), "GiB"),
    family(run, "judge's requests", of("judge/").filter((name) => name !== "judge/auroc"), "requests"),
  ].filter(Boolean);
  return charts.length ? el("div", { class: "grid" }, charts) : null;
}

function predicted(run) {
  const found = run.predicted;
  if (!found) return null;
  if (found.missing) return note(found.missing);
  const rows = found.rows.map((row) => [row.stage, row.phase, number(row.predicted_s), number(row.measured_s),
    row.predicted_s && row.measured_s ? number(row.predicted_s / row.measured_s) : "–"]);
  return [el("h3", {}, "Predicted beside measured"), note(found.how),
    table(["stage", "phase", "predicted s", "measured s", "predicted / measured"], rows, { right: [2, 3, 4], label: `Predicted for ${found.device}` })];
}
