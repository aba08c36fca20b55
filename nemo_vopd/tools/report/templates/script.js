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
// Charts: Vega without eval, which the page's policy forbids.
const tip = document.getElementById('tip');
const showTip = (handler, event, item, value) => {
  tip.hidden = !value;
  if (!value) return;
  tip.textContent = Object.entries(value).map(([name, text]) => `${name}  ${text}`).join('\n');
  const beyond = event.clientX + 16 + tip.offsetWidth > document.documentElement.clientWidth;
  tip.style.left = `${Math.max(4, event.clientX + (beyond ? -tip.offsetWidth - 12 : 16))}px`;
  tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4))}px`;
};
const options = { mode: 'vega-lite', renderer: 'svg', ast: true, actions: false, defaultStyle: false, tooltip: showTip };
JSON.parse(document.getElementById('charts').textContent).forEach((spec, i) => {
  vegaEmbed(`#chart${i}`, spec, options);
});
