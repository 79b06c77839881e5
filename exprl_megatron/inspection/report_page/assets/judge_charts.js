// Whether the judge can be trusted: scores over steps, agreement with the verifier, abstentions, lengths.

function judgeTab() {
  const found = shownRuns().map(([run, index]) => judgeOfRun(run, index));
  return [agreementSection(), found];
}

const judgedSteps = (run) => stepsRead(run).filter((place) => place.judge && place.judge.units);

// Steps of the log count from 1 in each stage; curves count over all stages.
function stepNumber(run, place) {
  const first = run.curves.stages.indexOf(place.stage);
  return first < 0 ? place.step : run.curves.steps[first] - 1 + place.step;
}

function agreementSection() {
  const runs = shownRuns().filter(([run]) => judgedSteps(run).some((place) => place.judge.agreement));
  if (!runs.length) return note("No trace has a score of a judge beside a finding of the verifier.");
  const lines = (pick) => runs.map(([run, index]) => {
    const steps = judgedSteps(run).filter((place) => place.judge.agreement);
    return {
      type: "scatter", mode: "lines+markers", name: chartText(run.name), marker: { size: 4 },
      x: steps.map((place) => stepNumber(run, place)), y: steps.map((place) => pick(place.judge.agreement)),
      line: { color: runColor(index), dash: runDash(index) },
      hovertemplate: "step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
    };
  });
  const xaxis = stepAxis(runs.flatMap(([run]) => judgedSteps(run).map((place) => stepNumber(run, place))));
  const share = { xaxis, yaxis: { tickformat: ".1%", rangemode: "tozero" } };
  const scores = { xaxis, yaxis: { range: [-0.03, 1.03] } };
  return el("section", {}, el("h2", { class: "of-run" }, "Judge against verifier"),
    el("div", { class: "grid" },
      chart("traces on which they disagree (scores more than 0.5 apart)", () => ({ traces: lines((each) => each.disagree / each.compared), layout: share })),
      chart("judge's mean score of right answers", () => ({ traces: lines((each) => each.right), layout: scores })),
      chart("judge's mean score of wrong answers", () => ({ traces: lines((each) => each.wrong), layout: scores })),
      MODEL.runs.some((run) => run.curves.metrics["judge/auroc"]) ? metricChart("judge/auroc") : null),
    runs.map(([run, index]) => disagreements(run, index)));
}

// The steps with the most, each opening the browser on them.
function disagreements(run, index) {
  const found = judgedSteps(run).filter((place) => place.judge.agreement?.disagree)
    .sort((a, b) => b.judge.agreement.disagree - a.judge.agreement.disagree).slice(0, 8);
  if (!found.length) return note(`${run.name}: judge and verifier disagree on no trace that was read.`);
  return el("div", { class: "links" }, el("span", {}, `${run.name}, disagreements: `), found.map((place) => el("button", {
    type: "button", onclick: () => go({ tab: "traces", run: index, place: run.places.indexOf(place), trace: null, sort: "disagreement", only: "disagree", search: "" }, "trace"),
  }, `${placeName(place)}: ${place.judge.agreement.disagree}`)));
}

function judgeOfRun(run, index) {
  const steps = judgedSteps(run);
  if (!steps.length) return el("section", {}, el("h2", {}, run.name), note("Its rollout log has no scores."));
  const stages = [...new Set(steps.map((place) => place.stage))];
  return el("section", {}, el("h2", { class: "of-run" }, el("span", { class: "chip", style: { "--run": runColor(index) } }), run.name),
    el("div", { class: "grid" },
      chart("scores over steps (share of the step's judgements)", (color) => histogram(run, steps, color), { height: 240 }),
      chart("judgements without a score, by reason", () => abstentions(run, steps), { height: 240 }),
      stages.map((stage) => chart(`length against score, ${stage} (traces)`, (color) => lengths(steps.filter((place) => place.stage === stage), color), { height: 240 }))));
}

function ramp(color) {
  return [[0, color("--panel")], [0.02, color("--ramp-1")], [0.4, color("--ramp-2")], [1, color("--ramp-3")]];
}

function histogram(run, steps, color) {
  const bins = steps[0].judge.scores.length;
  if (!steps.some((place) => sum(place.judge.scores))) return { traces: [], layout: emptyLayout("no score") };
  const scored = steps.map((place) => sum(place.judge.scores) || 1);
  return {
    traces: [{
      type: "heatmap", x: steps.map((place) => stepNumber(run, place)),
      y: Array.from({ length: bins }, (_, bin) => (bin + 0.5) / bins),
      z: Array.from({ length: bins }, (_, bin) => steps.map((place, at) => place.judge.scores[bin] / scored[at])),
      zmin: 0, zmax: 1, colorscale: ramp(color), colorbar: { thickness: 8, tickformat: ".0%", outlinewidth: 0 },
      hovertemplate: "step %{x}, score about %{y:.2f}: %{z:.1%}<extra></extra>",
    }],
    layout: { xaxis: stepAxis(steps.map((place) => stepNumber(run, place))), yaxis: { title: { text: "score" }, range: [0, 1] } },
  };
}

function abstentions(run, steps) {
  const reasons = [...new Set(steps.flatMap((place) => Object.keys(place.judge.abstained)))].sort();
  const x = steps.map((place) => stepNumber(run, place));
  if (!reasons.length) return { traces: [], layout: emptyLayout("none") };
  return {
    traces: reasons.map((reason, at) => ({
      type: "bar", name: chartText(reason), x, y: steps.map((place) => place.judge.abstained[reason] || 0),
      marker: { color: ORDERED[at % ORDERED.length] }, hovertemplate: "step %{x}: %{y}<extra>%{fullData.name}</extra>",
    })),
    layout: { barmode: "stack", showlegend: true, xaxis: stepAxis(x) },
  };
}

function lengths(steps, color) {
  const most = Math.max(...steps.map((place) => place.judge.most_tokens));
  const alike = steps.filter((place) => place.judge.most_tokens === most);
  const [columns, rows] = [alike[0].judge.lengths.length, alike[0].judge.lengths[0].length];
  if (!alike.some((place) => place.judge.lengths.some((of) => sum(of)))) return { traces: [], layout: emptyLayout("no score") };
  const count = (column, row) => sum(alike.map((place) => place.judge.lengths[column][row]));
  return {
    traces: [{
      type: "heatmap", x: Array.from({ length: columns }, (_, column) => ((column + 0.5) * most) / columns),
      y: Array.from({ length: rows }, (_, row) => (row + 0.5) / rows),
      z: Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => count(column, row))),
      colorscale: ramp(color), colorbar: { thickness: 8, outlinewidth: 0 },
      hovertemplate: "about %{x:.0f} tokens, score about %{y:.2f}: %{z} traces<extra></extra>",
    }],
    layout: { xaxis: { title: { text: "tokens" } }, yaxis: { title: { text: "score" }, range: [0, 1] } },
  };
}
