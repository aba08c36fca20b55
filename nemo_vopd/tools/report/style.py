"""Style sheet and script of the report page, as text: the page must work from one file, offline."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #faf9f7; --card: #ffffff; --ink: #1c2128; --muted: #59626e; --line: #e0ded9;
  --full: #0b67a8; --crop: #b65500; --good: #00755a; --bad: #a3245e; --heat: #b08ee8;
  --c0: #0b67a8; --c1: #b65500; --c2: #00866a; --c3: #8a6bbf; --c4: #b08a14; --c5: #7b8794;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --card: #1c2026; --ink: #e8eaed; --muted: #a4adb8; --line: #343b44;
    --full: #62b0ec; --crop: #f0a05a; --good: #4cc9a4; --bad: #f08bb4; --heat: #7547c0;
    --c0: #62b0ec; --c1: #f0a05a; --c2: #4cc9a4; --c3: #b79be6; --c4: #e0c15a; --c5: #98a3b0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main, nav, header { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
header { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 480px); gap: 24px 48px; align-items: center;
  padding-top: 44px; padding-bottom: 28px; }
h1 { font-size: 17px; font-weight: 600; color: var(--muted); margin: 0 0 12px; }
h2 { font-size: 22px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0 0 12px; max-width: 72ch; }
.lead { font-size: clamp(24px, 3.2vw, 34px); line-height: 1.2; font-weight: 650; letter-spacing: -0.02em;
  margin-bottom: 24px; text-wrap: balance; }
.note, figcaption { color: var(--muted); font-size: 14px; }
.full { color: var(--full); } .crop { color: var(--crop); }
.numbers { display: flex; flex-wrap: wrap; gap: 16px 36px; margin: 0 0 16px; }
.numbers dt { color: var(--muted); font-size: 14px; }
.numbers dd { margin: 0; font-size: clamp(30px, 4vw, 42px); line-height: 1.15; font-weight: 700;
  letter-spacing: -0.02em; }
.numbers small { font-size: 15px; font-weight: 400; letter-spacing: 0; color: var(--muted); }
nav { display: flex; flex-wrap: wrap; gap: 4px 22px; padding-top: 10px; padding-bottom: 10px; font-size: 14px;
  border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
a { color: inherit; text-underline-offset: 3px; text-decoration-color: var(--muted); }
section { padding: 36px 0 4px; }
figure { margin: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; min-width: 0; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); gap: 16px; }
.panel-head { display: flex; justify-content: space-between; gap: 12px; align-items: baseline; margin-bottom: 4px; }
.panel-head span { color: var(--muted); font-size: 13px; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; color: var(--muted); margin-top: 4px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
.legend .dashed { height: 0; width: 18px; border-radius: 0; border-top: 2px dashed var(--muted);
  vertical-align: middle; background: none; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
.still, #ends, #sources { margin-top: 16px; }
.data { display: block; columns: 3 300px; column-gap: 16px; }
.data > * { break-inside: avoid; margin-bottom: 16px; }
.stacked > * + * { margin-top: 16px; }
.split { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 16px; align-items: start; }
svg { display: block; width: 100%; height: auto; }
.chart text { font-size: 11px; fill: var(--muted); }
.chart .grid { stroke: var(--line); } .chart .axis { stroke: var(--muted); }
.chart .raw, .chart .trend { fill: none; stroke-linejoin: round; stroke-linecap: round; }
.chart .raw { stroke-width: 1; opacity: 0.3; } .chart .trend { stroke-width: 2; }
.chart .stack { opacity: 0.85; stroke: var(--card); stroke-width: 0.6; }
.chart .gap-area { fill: var(--muted); opacity: 0.16; }
.chart .other { stroke-width: 1.3; stroke-dasharray: 5 3; }
.chart .covers { stroke: var(--muted); stroke-width: 3.5; opacity: 0.55; }
.chart .whisker { fill: none; stroke-width: 1.3; opacity: 0.75; }
.chart .dot { stroke-width: 1.6; }
.chart .column { fill: var(--c3); }
.chart .hollow { fill: none; stroke: var(--c3); stroke-width: 1.4; stroke-dasharray: 3 2; }
.chart .cursor { stroke: var(--ink); stroke-dasharray: 2 3; }
#tip { position: fixed; z-index: 9; pointer-events: none; background: var(--ink); color: var(--bg); font-size: 13px;
  line-height: 1.4; padding: 5px 9px; border-radius: 5px; white-space: pre; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 400; color: var(--muted); } td { overflow-wrap: anywhere; }
.numeric :is(th, td) { text-align: right; } .numeric td { white-space: nowrap; }
.numeric :is(td .number-note, td code) { white-space: normal; } .numeric .long { overflow-wrap: anywhere; }
.numeric .number-note { overflow-wrap: normal; }
.numeric tr > *:last-child { padding-right: 0; }
.numeric :is(th, td):first-child { text-align: left; }
.scroll { overflow-x: auto; }
.plus { color: var(--good); } .minus { color: var(--bad); }
.number-note { display: block; color: var(--muted); font-size: 12px; font-weight: 400; }
.counts { display: grid; grid-template-columns: minmax(0, 12em) minmax(0, 1fr) auto; gap: 6px 14px; font-size: 14px;
  align-items: center; }
.counts i { display: block; height: 12px; min-width: 2px; border-radius: 0 3px 3px 0; background: var(--c3);
  width: calc(var(--p) * 100%); }
.counts > :nth-child(3n) { text-align: right; }
details { margin-top: 12px; }
summary { cursor: pointer; font-size: 14px; }
pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 10px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.found { font-size: 13px; margin: 6px 0 0; padding-left: 18px; color: var(--muted); overflow-wrap: anywhere; }
.notes { border-left: 3px solid var(--crop); padding-left: 12px; }
.facts { columns: 2 420px; column-gap: 40px; }
.facts table { break-inside: avoid; margin-bottom: 18px; }
.facts th { width: 46%; } caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 16px; }
.shots { display: grid; grid-template-columns: 3fr 2fr; gap: 12px; align-items: start; margin-bottom: 12px; }
.shot { position: relative; }
.shot img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--line); }
.shot img.small { image-rendering: pixelated; }
.shot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.shot rect { fill: none; vector-effect: non-scaling-stroke; }
.shot .halo { stroke: #fff; stroke-width: 4.5; } .shot .box { stroke: #b65500; stroke-width: 2.2; }
.question { font-weight: 600; margin-bottom: 4px; white-space: pre-wrap; }
.mark { display: inline-flex; gap: 6px; align-items: baseline; white-space: pre-wrap; }
.mark svg { width: 13px; height: 13px; flex: none; position: relative; top: 1.5px; fill: none; stroke: currentColor;
  stroke-width: 2.4; }
.mark.right { color: var(--good); } .mark.wrong { color: var(--bad); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.trace { display: grid; grid-template-columns: 230px minmax(0, 1fr); gap: 22px; margin-top: 16px; }
.trace .shots { grid-template-columns: 1fr; margin: 0; }
.tokens { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0 14px; }
.tokens button { position: relative; isolation: isolate; overflow: hidden; color: var(--ink); background: none;
  font: 14px/1.3 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; padding: 5px 8px;
  min-height: 30px; border: 1px solid var(--line); border-radius: 5px; cursor: pointer; white-space: pre-wrap;
  overflow-wrap: anywhere; max-width: 100%; text-align: left; }
.tokens button::before { content: ""; position: absolute; inset: 0; z-index: -1; background: var(--heat);
  opacity: var(--d); }
.tokens [aria-selected="true"] { border-color: var(--ink); box-shadow: 0 0 0 1px var(--ink); }
:focus-visible { outline: 3px solid var(--full); outline-offset: 2px; }
.scale { max-width: 380px; margin: 14px 0 0; font-size: 13px; color: var(--muted); }
.scale div { height: 12px; border-radius: 3px; border: 1px solid var(--line);
  background: linear-gradient(90deg, transparent, var(--heat)); }
.scale ol { display: flex; justify-content: space-between; list-style: none; margin: 2px 0 0; padding: 0; }
.detail { border-top: 1px solid var(--line); padding-top: 12px; }
code { font: 0.93em ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; }
.facts-line { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 14px; margin-bottom: 10px; }
.pair { display: grid; grid-template-columns: minmax(64px, 1fr) minmax(0, 5fr); gap: 4px 12px; align-items: center;
  font-size: 13px; margin-bottom: 7px; }
.pair em { font-style: normal; color: var(--muted); }
.bar { display: flex; align-items: center; gap: 7px; height: 15px; line-height: 1; }
.bar i { flex: none; height: 10px; min-width: 2px; border-radius: 0 2px 2px 0; background: currentColor;
  width: calc(var(--p) * (100% - 84px)); }
.bar span { color: var(--ink); white-space: nowrap; } .bar .absent { color: var(--muted); }
footer { max-width: 1160px; margin: 0 auto; padding: 24px 20px 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 860px) {
  header { grid-template-columns: minmax(0, 1fr); padding-top: 28px; gap: 16px; }
  .split, .trace { grid-template-columns: minmax(0, 1fr); }
  .trace .shots { grid-template-columns: 3fr 2fr; }
}
@media (max-width: 480px) {
  main, nav, header, footer { padding-left: 14px; padding-right: 14px; }
  .card { padding: 12px; }
  .large text { font-size: 13.5px; }
  .numeric { font-size: 13px; }
  .numeric :is(th, td) { padding-right: 6px; }
}
"""

SCRIPT = """
// Tokens: a tab list with one stop in the tab order; arrows, Home and End move, hover previews.
for (const list of document.querySelectorAll('[role=tablist]')) {
  const tabs = [...list.children];
  const select = (tab, focus) => {
    for (const other of tabs) {
      const on = other === tab;
      other.setAttribute('aria-selected', on);
      other.tabIndex = on ? 0 : -1;
      document.getElementById(other.getAttribute('aria-controls')).hidden = !on;
    }
    if (focus) tab.focus();
  };
  for (const [i, tab] of tabs.entries()) {
    for (const event of ['click', 'focus', 'pointerenter']) tab.addEventListener(event, () => select(tab));
    tab.addEventListener('keydown', event => {
      const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(tabs[(to + tabs.length) % tabs.length], true);
    });
  }
}
// Charts: the values of the step nearest to the pointer.
const tip = document.getElementById('tip');
for (const svg of document.querySelectorAll('[data-hover]')) {
  const { x, labels, rows, name, box: [left, right], range: [low, high] } = JSON.parse(svg.dataset.hover);
  const cursor = svg.querySelector('.cursor');
  svg.addEventListener('pointermove', event => {
    const area = svg.getBoundingClientRect();
    const at = (event.clientX - area.left) / area.width * svg.viewBox.baseVal.width;
    const step = low + (at - left) / (right - left) * (high - low);
    let best = 0;
    x.forEach((value, i) => { if (Math.abs(value - step) < Math.abs(x[best] - step)) best = i; });
    cursor.setAttribute('transform', `translate(${left + (x[best] - low) / (high - low) * (right - left)} 0)`);
    cursor.setAttribute('visibility', 'visible');
    const values = rows.map(([label, texts]) => `${label}  ${texts[best]}`);
    tip.textContent = [`${name} ${(labels ?? x)[best]}`, ...values].join('\\n');
    tip.hidden = false;
    const beyond = event.clientX + 16 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, event.clientX + (beyond ? -tip.offsetWidth - 12 : 16))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; cursor.setAttribute('visibility', 'hidden'); });
}
"""
