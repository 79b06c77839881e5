// The frame of the page: header, tabs, theme, keys, and the refresh of a page that is served.

const TABS = [["curves", "Curves"], ["traces", "Traces"], ["judge", "Judge"], ["time", "Time"]];
const CONTENTS = { curves: curveTab, traces: traceTab, judge: judgeTab, time: timeTab };

function header() {
  const chips = MODEL.runs.map((run, index) => {
    const only = MODEL.runs.length === 1;
    const chip = el("span", { class: "chip", style: { "--run": runColor(index) } });
    const toggle = only ? chip : el("label", {},
      el("input", {
        type: "checkbox", checked: isShown(index), "aria-label": `show ${run.name}`,
        onchange: (event) => { event.target.checked ? state.hidden.delete(index) : state.hidden.add(index); refresh(); },
      }), chip);
    return el("div", { class: "run" }, toggle, el("strong", {}, run.name), " ", el("span", { class: "muted" }, outcome(run)));
  });
  const theme = el("button", { type: "button", onclick: switchTheme }, "Dark or light");
  return [
    el("div", { class: "title" }, el("h1", {}, "exprl report"), el("span", { class: "muted", id: "made" }, `made ${MODEL.made.replace("T", " ")}`), theme),
    el("div", { class: "runs" }, chips),
    el("details", { class: "about" }, el("summary", {}, "About the runs"), MODEL.runs.map(about),
      MODEL.references ? null : note("References, and all that quotes them, were left out of this page.")),
  ];
}

function outcome(run) {
  const steps = run.curves.steps.length ? counted(run.curves.steps.at(-1), "step") : "no step yet";
  if (!run.record.start) return steps;
  if (!run.record.end) return `${steps}, running or killed`;
  return run.record.status === "0" ? `${steps}, ended` : `${steps}, stopped`;
}

function about(run) {
  const rows = [["directory", run.directory], ["stages", run.stages.map((s) => `${s.name} (${s.kind})`).join(", ")]];
  return el("div", { class: "facts" }, el("h3", {}, run.name),
    el("dl", {}, [...rows, ...Object.entries(run.record)].map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

function tabs() {
  return TABS.map(([key, text]) => el("button", {
    type: "button", role: "tab", id: `tab-${key}`, "aria-selected": String(key === state.tab), "aria-controls": "main",
    tabindex: key === state.tab ? "0" : "-1", onclick: () => { state.tab = key; refresh(`tab-${key}`); },
    onkeydown: moveTab,
  }, text));
}

function moveTab(event) {
  const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!move) return;
  event.preventDefault();
  const at = TABS.findIndex(([key]) => key === state.tab);
  state.tab = TABS[(at + move + TABS.length) % TABS.length][0];
  refresh(`tab-${state.tab}`);
}

// Draws the chosen tab again; the element with the id `focused` keeps the keyboard.
function refresh(focused) {
  forgetCharts();
  const cursor = focused && document.getElementById(focused)?.selectionStart;
  document.getElementById("top").replaceChildren(...header().flat(Infinity).filter(Boolean));
  document.getElementById("tabs").replaceChildren(...tabs());
  const content = [CONTENTS[state.tab]()].flat(Infinity).filter(Boolean);
  const main = document.getElementById("main");
  main.setAttribute("aria-labelledby", `tab-${state.tab}`);
  main.replaceChildren(...content);
  if (focused) {
    const kept = document.getElementById(focused);
    kept?.focus();
    if (cursor !== undefined && cursor !== null) kept?.setSelectionRange?.(cursor, cursor);
  }
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  redrawCharts();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
document.addEventListener("keydown", traceKeys);
refresh();
if (LIVE) follow();

// A served page asks every few seconds whether its runs have left something new.
async function follow() {
  const query = location.search;
  let stamp = null;
  for (;;) {
    try {
      const answer = await fetch(`stamp${query}`);
      const latest = answer.ok ? await answer.text() : stamp;
      if (stamp !== null && latest !== stamp) {
        MODEL = await (await fetch(`model${query}`)).json();
        openedBlocks.clear();
        refresh(document.activeElement?.id || undefined);
      }
      stamp = latest;
    } catch (error) {
      document.getElementById("made").textContent = "the server has ended; the page is as of its last answer";
    }
    await new Promise((resolve) => setTimeout(resolve, 3000));
  }
}
