// Groups and traces of a step: who scored what, in which words.

const SORTS = {
  page: ["the page's order", null],
  disagreement: ["disagreement", (row) => disagreementOf(row)],
  high: ["highest score", (row) => row.score],
  low: ["lowest score", (row) => (row.score === null ? null : -row.score)],
  long: ["longest", (row) => row.tokens],
  advantage: ["largest advantage", (row) => Math.max(...advantagesOf(row).map(Math.abs), -1)],
};
const FILTERS = {
  all: ["all traces", () => true],
  disagree: ["judge and verifier disagree", (row) => (disagreementOf(row) ?? 0) > 0.5],
  abstained: ["without a score", (row) => row.score === null],
  right: ["verifier: right", (row) => verifierOf(row) === 1],
  wrong: ["verifier: wrong", (row) => verifierOf(row) === 0],
  out: ["out of the loss", (row) => row.out],
};
const openedBlocks = new Map();

const verifierOf = (row) => (row.verified ? row.verified.score : null);

function disagreementOf(row) {
  const verified = verifierOf(row);
  return row.score === null || verified === null ? null : Math.abs(row.score - verified);
}

function advantagesOf(row) {
  const found = row.texts ? row.texts.segments.map((segment) => segment.advantage) : [];
  return [row.advantage, ...found].filter((value) => value !== null && value !== undefined);
}

async function openBlock(key) {
  if (!openedBlocks.has(key)) openedBlocks.set(key, readBlock(key));
  return openedBlocks.get(key);
}

// Blocks are behind this program in the file.
const wholePage = new Promise((done) => document.addEventListener("DOMContentLoaded", done));

async function readBlock(key) {
  let stream;
  if (LIVE) {
    const answer = await fetch(`block/${key}${location.search}`);
    if (!answer.ok) throw new Error(`the server has no block ${key} any more`);
    stream = answer.body;
  } else {
    await wholePage;
    const text = document.getElementById(`block-${key}`).textContent;
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    stream = new Blob([bytes]).stream();
  }
  return (await new Response(stream.pipeThrough(new DecompressionStream("gzip"))).json()).groups;
}

function traceTab() {
  const run = MODEL.runs[state.run] || MODEL.runs[0];
  const places = run.places;
  if (!places.length) return [el("div", { class: "controls" }, runSelect()), note(`${run.name} has no traces: its rollout log is empty.`)];
  if (state.place === null || state.place >= places.length) state.place = firstPlace(places);
  const place = places[state.place];
  const list = el("div", { class: "list" }, note("opening …"));
  const detail = el("article", { class: "detail", id: "trace", tabindex: "-1", "aria-live": "polite" });
  if (place.fault) list.replaceChildren(note(place.fault));
  else
    openBlock(place.block)
      .then((groups) => fillTraces(run, place, groups, list, detail))
      .catch(() => list.replaceChildren(note("This step has just changed; the page shows it in a few seconds.")));
  return [traceControls(run, places), howMany(run, place), el("div", { class: "browser" }, list, detail)];
}

// The latest step of a judged stage, whose traces have the most to show, or the latest step.
function firstPlace(places) {
  const steps = places.map((place, index) => [place, index]).filter(([place]) => place.step !== null && !place.fault);
  const judged = steps.filter(([place]) => place.judge.agreement);
  return (judged.at(-1) || steps.at(-1) || [null, 0])[1];
}

function go(changes, focused) {
  Object.assign(state, changes);
  refresh(focused);
}

function runSelect() {
  const runs = MODEL.runs.map((each, index) => [index, each.name]);
  return runs.length > 1 ? select("Run", runs, state.run, (value) => go({ run: Number(value), place: null, trace: null })) : null;
}

function traceControls(run, places) {
  const steps = places.map((place, index) => [index, placeName(place)]);
  const move = (by) => () => go({ place: Math.min(places.length - 1, Math.max(0, state.place + by)), trace: null });
  const search = el("input", {
    type: "search", value: state.search, id: "problem-search", placeholder: "id or words",
    oninput: (event) => go({ search: event.target.value, trace: null }, "problem-search"),
  });
  return el("div", { class: "controls" },
    runSelect(),
    el("div", { class: "stepper" },
      el("button", { type: "button", onclick: move(-1), "aria-label": "step before", title: "step before: [" }, "‹"),
      select("Step", steps, state.place, (value) => go({ place: Number(value), trace: null })),
      el("button", { type: "button", onclick: move(1), "aria-label": "next step", title: "next step: ]" }, "›")),
    select("Order", Object.entries(SORTS).map(([key, [text]]) => [key, text]), state.sort, (sort) => go({ sort, trace: null })),
    select("Only", Object.entries(FILTERS).map(([key, [text]]) => [key, text]), state.only, (only) => go({ only, trace: null })),
    el("label", { class: "field" }, el("span", {}, "Problem"), search));
}

function howMany(run, place) {
  if (place.fault) return null;
  const parts = [`${counted(place.traces, "trace")} in ${counted(place.groups, "group")}`];
  if (place.kept < place.traces) {
    parts.push(`the texts of ${place.kept} of them are in this page, those first on which judge and verifier disagree, ` +
      "then those without a score, then the widest groups; `exprl show` prints every one");
  }
  const read = stepsRead(run).length;
  if (read < run.logged_steps) parts.push(`${read} of ${run.logged_steps} steps, evenly spaced, are in this page`);
  return note(`${parts.join("; ")}.`);
}

function listed(groups) {
  const wanted = state.search.toLowerCase();
  const found = [];
  for (const group of groups) {
    if (wanted && !`${group.problem} ${group.prompt || ""}`.toLowerCase().includes(wanted)) continue;
    for (const row of group.traces) if (FILTERS[state.only][1](row)) found.push({ group, row });
  }
  const key = SORTS[state.sort][1];
  if (!key) return found;
  const value = ({ row }) => key(row) ?? -Infinity;
  return found.map((each, place) => [each, place]).sort(([a, i], [b, j]) => (value(b) - value(a)) || i - j).map(([each]) => each);
}

const traceKey = ({ group, row }) => `${group.number}.${row.sample}`;

function fillTraces(run, place, groups, list, detail) {
  const found = listed(groups);
  if (!found.length) {
    list.replaceChildren(note("No trace of this step is as asked for; choose another order, filter or problem."));
    detail.replaceChildren();
    return;
  }
  const show = (each) => {
    state.trace = traceKey(each);
    list.querySelectorAll("button.trace").forEach((button) => button.setAttribute("aria-current", String(button.key === state.trace)));
    detail.replaceChildren(...traceDetail(run, place, each, () => show(each)).flat(Infinity).filter(Boolean));
  };
  let former = null;
  const items = [];
  for (const each of found) {
    if (state.sort === "page" && each.group !== former) items.push(groupHeading(each.group));
    former = each.group;
    items.push(traceButton(each, () => show(each)));
  }
  list.replaceChildren(...items);
  const chosen = found.find((each) => traceKey(each) === state.trace) || found.find(({ row }) => row.texts) || found[0];
  show(chosen);
}

function groupHeading(group) {
  const scores = group.traces.map((row) => row.score).filter((score) => score !== null);
  const spread = scores.length ? `, ${number(Math.min(...scores))} to ${number(Math.max(...scores))}` : "";
  return el("h3", { class: "group-heading clamped", title: group.problem }, group.problem, el("span", { class: "muted" }, ` ${group.domain}${spread}`));
}

function traceButton(each, onclick) {
  const { group, row } = each;
  const button = el("button", { type: "button", class: row.texts ? "trace" : "trace bare", onclick },
    el("span", { class: "swatch", style: { background: scoreColor(row.score) }, "aria-hidden": "true" }),
    el("span", { class: "score" }, row.score === null ? "none" : number(row.score, 2)),
    el("span", { class: "what" },
      state.sort === "page" ? `sample ${row.sample}` : el("span", { class: "clamped", title: group.problem }, `sample ${row.sample} of ${group.problem}`),
      row.score === null ? el("span", { class: "tag" }, row.reason) : null,
      verifierTag(row),
      row.finish === "length" ? el("span", { class: "tag" }, "cut off") : null),
    el("span", { class: "muted" }, `${row.tokens}`));
  button.key = traceKey(each);
  return button;
}

function verifierTag(row) {
  const found = verifierOf(row);
  if (found === null) return null;
  const against = (disagreementOf(row) ?? 0) > 0.5;
  return el("span", { class: against ? "tag against" : "tag" }, found === 1 ? "right" : found === 0 ? "wrong" : number(found, 2));
}

// From orange (0) over gray to blue (1), which readers who cannot tell red from green can tell apart.
function scoreColor(score) {
  if (score === null || score === undefined) return "var(--none)";
  return `color-mix(in oklab, var(--low) ${Math.round(100 * (1 - score))}%, var(--high))`;
}

function advantageColor(advantage, largest) {
  if (advantage === null || advantage === undefined) return "var(--none)";
  const share = largest ? Math.min(1, Math.abs(advantage) / largest) : 0;
  return `color-mix(in oklab, ${advantage < 0 ? "var(--low)" : "var(--high)"} ${Math.round(100 * share)}%, transparent)`;
}

function traceDetail(run, place, { group, row }, again) {
  const facts = [
    ["score", row.score === null ? `none: ${row.reason}` : number(row.score)],
    ["verifier", row.verified ? (row.verified.score === null ? `none: ${row.verified.reason}` : row.verified.score === 1 ? "right" : row.verified.score === 0 ? "wrong" : number(row.verified.score)) : "–"],
    ["advantage", row.out ? "out of the loss" : row.texts?.segments.length > 1 ? "by segment" : signed(row.advantage ?? row.texts?.segments[0].advantage)],
    ["tokens", `${row.tokens}, ${row.finish}`], ["weights", row.weights],
  ];
  if (row.hash) facts.push(["judgement", row.hash]);
  return [
    el("h2", { class: "clamped", title: group.problem }, `Sample ${row.sample} of ${group.problem}`),
    el("p", { class: "muted" }, `${run.name}: ${placeName(place)}, group ${group.number}`),
    el("dl", { class: "figures" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    el("section", {}, el("h3", {}, "Problem"), el("pre", {}, group.prompt ?? "The run's tokenizer and problems are missing.")),
    group.reference ? el("details", { class: "reference" }, el("summary", {}, "Reference, hidden from the policy"), el("pre", {}, group.reference),
      group.answer ? note(`Answer: ${group.answer}`) : null) : null,
    row.texts ? traceText(row, again) : note(`The text of this trace was left out to keep the page small: exprl show RUN ${showArguments(place)} --problem ID --sample ${row.sample} --text`),
    row.texts?.finding !== undefined ? el("section", {}, el("h3", {}, `Verifier: ${facts[1][1]}`), el("pre", {}, row.texts.finding || "(no words)")) : null,
    row.texts ? judgedSection(row) : null,
  ];
}

const showArguments = (place) => (place.step === null ? `--evaluation ${place.stage}` : `--stage ${place.stage} --step ${place.step}`);

function traceText(row, again) {
  const { segments, tokens } = row.texts;
  const colors = [["score", "score"], ["advantage", "advantage"]];
  if (tokens) colors.push(["log-prob", "log-prob"]);
  if (tokens?.gaps) colors.push(["gap", "trainer gap"]);
  const color = colors.some(([key]) => key === state.color) ? state.color : "score";
  const body = el("div", { class: "text", id: "trace-text" });
  if (color === "log-prob" || color === "gap") body.append(...tokenSpans(row.texts, color));
  else body.append(...segmentSpans(row, color));
  return el("section", {}, el("h3", {}, "Trace"),
    choice("Color by", colors, color, (key) => { state.color = key; again(); document.getElementById("trace").focus(); }),
    row.texts.uncut ? note("The policy's tokenizer does not give this text, so that its segments are not marked.") : null,
    body, legend(color, row));
}

function segmentSpans(row, color) {
  const largest = Math.max(...advantagesOf(row).map(Math.abs), 1e-9);
  if (row.texts.uncut) return [row.texts.segments.map((segment) => segment.text).join("")];
  return row.texts.segments.map((segment, place) => {
    const whole = row.texts.segments.length === 1 && segment.score === undefined;
    const score = whole ? row.score : segment.score;
    const advantage = whole ? row.advantage : segment.advantage;
    const shade = color === "score" ? scoreColor(score) : advantageColor(advantage, largest);
    const said = color === "score" ? (score === null ? segment.reason || row.reason : number(score, 2)) : row.out ? "out" : signed(advantage);
    const label = whole ? said : `${place} · ${said}`;
    return el("span", { class: "segment", style: { "--shade": shade }, "data-score": score ?? "", "data-advantage": advantage ?? "" },
      el("button", { type: "button", class: "badge", "aria-label": `segment ${place}: ${color} ${said}`, onclick: () => openJudged(place) }, label),
      segment.text);
  });
}

function openJudged(place) {
  const found = document.getElementById(`judged-${place}`);
  if (!found) return;
  found.open = true;
  found.scrollIntoView({ block: "nearest" });
  found.querySelector("summary").focus({ preventScroll: true });
}

// Characters count as Unicode code points there.
function tokenSpans({ segments, tokens }, color) {
  const largest = Math.max(...(tokens.gaps || []).map(Math.abs), 1e-9);
  const characters = Array.from(segments.map((segment) => segment.text).join(""));
  let at = 0;
  const spans = tokens.characters.map((count, place) => {
    const value = tokens.log_probs[place] / 1000;
    const gap = color === "gap" ? tokens.gaps[place] : null;
    const shade = gap === null ? `color-mix(in oklab, var(--low) ${Math.round(100 * Math.min(1, -value / 4))}%, transparent)` : advantageColor(gap, largest);
    const said = gap === null ? "" : `, trainer ${signed(gap)}`;
    const text = characters.slice(at, at + count).join("");
    at += count;
    return el("span", { class: "token", style: { "--shade": shade }, title: `token ${place}: log-prob ${number(value)}${said}` }, text || "\u25ab");
  });
  return [...spans, characters.slice(at).join("")];
}

function legend(color, row) {
  if (color === "gap") {
    const distances = row.texts.tokens.gaps.map(Math.abs);
    return note(`Trainer's log-prob of each token less the sampler's, in nats: blue where the trainer's is higher, orange where it is lower; the darkest is the largest of this trace. Mean distance ${number(sum(distances) / (distances.length || 1))}, largest ${number(Math.max(...distances, 0))}.`);
  }
  if (color === "log-prob") {
    const values = row.texts.tokens.log_probs.map((value) => value / 1000);
    return note(`Log-prob of each token as the sampler returned it; the darker, the less likely, from −4 nats on. Mean ${number(sum(values) / (values.length || 1))}, lowest ${number(Math.min(...values, 0))}.`);
  }
  const low = color === "score" ? "0" : "negative";
  const high = color === "score" ? "1" : "positive";
  return el("p", { class: "note legend" }, low, el("span", { class: "ramp", "aria-hidden": "true" }), high,
    color === "score" ? "; hatched: no score" : "; none: out of the loss or no advantage");
}

function judgedSection(row) {
  const single = row.texts.judged ? [["", row, row.texts.judged]] : [];
  const several = row.texts.segments.map((segment, place) => [`segment ${place}: `, segment, segment.judged]).filter(([, , judged]) => judged);
  const all = single.length ? single : several;
  if (!all.length) return null;
  return el("section", {}, el("h3", {}, "Who scored it, and what was asked"),
    all.map(([name, unit, judged], place) => el("details", { class: "judged", id: `judged-${place}`, open: all.length === 1 },
      el("summary", {}, `${name}${unit.score === null || unit.score === undefined ? `no score: ${unit.reason}` : number(unit.score)}`,
        unit.hash ? el("span", { class: "muted" }, ` ${unit.hash}`) : null),
      el("h4", {}, "Words"), el("pre", {}, judged.words || "(none)"),
      judged.asked ? asked(judged.asked, judged.words) : null)));
}

function asked({ messages, rubric, answer }, words) {
  const marks = rubric.map((each) => [each.mark ?? "–", each.text, number(each.weight), each.quote]);
  return [
    marks.length ? [el("h4", {}, "Rubric"), table(["mark", "checkpoint", "weight", "quote of the reference"], marks, { class: "rubric", label: "Rubric with marks" })] : null,
    answer.trim() !== words.trim() ? [el("h4", {}, "Whole answer"), el("pre", {}, answer)] : null,
    messages.map(([role, text]) => [el("h4", {}, `Asked (${role})`), el("pre", {}, text)]),
  ].flat(Infinity).filter(Boolean);
}

// [ and ] change the step, j and k the trace.
function traceKeys(event) {
  if (state.tab !== "traces" || event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT|TEXTAREA/.test(event.target.tagName)) return;
  const buttons = [...document.querySelectorAll("button.trace")];
  const inList = event.target.classList?.contains("trace");
  const by = { j: 1, k: -1 }[event.key] ?? (inList ? { ArrowDown: 1, ArrowUp: -1 }[event.key] : undefined);
  if (by) {
    event.preventDefault();
    const next = buttons[buttons.findIndex((button) => button.key === state.trace) + by];
    if (next) { next.click(); next.focus(); next.scrollIntoView({ block: "nearest" }); }
  } else if (event.key === "[" || event.key === "]") {
    const places = (MODEL.runs[state.run] || MODEL.runs[0]).places;
    go({ place: Math.min(places.length - 1, Math.max(0, state.place + (event.key === "]" ? 1 : -1))), trace: null });
  }
}

// Opens one trace from another part of the page.
function openTrace(run, place, trace) {
  go({ tab: "traces", run, place, trace, sort: "page", only: "all", search: "" }, "trace");
}
