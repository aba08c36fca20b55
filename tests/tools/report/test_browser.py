"""The report page in a real Chromium: a silent console, everything visible, nothing too wide, all of it live."""

from __future__ import annotations

import os
import shutil

import pytest

from nemo_vopd.tools.prepare.card import data_card_page
from nemo_vopd.tools.report.page import write_report
from nemo_vopd.tools.report.run_files import Run, read_run
from tests.tools.report.run_folder import SUMMARY, wide_card, write_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: make browser-packages installs it (as root)"),
    pytest.mark.timeout(180),
]
MILLISECONDS = 30_000
"""Limit of each single thing asked of the browser."""

TOO_WIDE = """() => [...document.body.querySelectorAll('*')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.height && !element.closest('.hidden') && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(element => `${element.tagName}.${element.getAttribute('class')} ${element.textContent.slice(0, 40)}`)"""
SCROLLED = """() => [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth + 1)
  .map(one => `${one.scrollWidth} in ${one.clientWidth}: ${one.textContent.slice(0, 80)}`)"""
BEYOND_IMAGE = """() => [...document.querySelectorAll('.shot rect')].filter(box => {
  const [inner, outer] = [box, box.closest('.shot').querySelector('img')].map(one => one.getBoundingClientRect());
  return inner.left < outer.left - 3 || inner.right > outer.right + 3;
}).map(box => box.outerHTML)"""
CUT_OFF = """() => [...document.querySelectorAll('.chart svg')].flatMap(svg => {
  const area = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const box = text.getBoundingClientRect();
    return box.left < area.left - 1 || box.right > area.right + 1 || box.bottom > area.bottom + 1;
  }).map(text => `${svg.closest('.chart').getAttribute('aria-label')}: ${text.textContent}`);
})"""
OVERLAPPING = """() => [...document.querySelectorAll('.chart svg')].flatMap(svg => {
  const shown = [...svg.querySelectorAll('.role-axis-label text')].filter(text => text.getAttribute('opacity') !== '0');
  const boxes = shown.map(text => [text.textContent, text.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
  ).map(([other]) => `${svg.closest('.chart').getAttribute('aria-label')}: ${name} on ${other}`));
})"""
# WCAG's contrast of each text with the nearest background behind it
FAINT = """() => {
  const channels = colour => {
    const canvas = document.createElement('canvas').getContext('2d');
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const linear = value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(colour)) return colour;
    }
    return 'white';
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.getClientRects().length || element.matches('script, style, #tip')) continue;
    const style = getComputedStyle(element);
    const ink = element.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(channels(ink)), light(channels(behind(element)))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.push(`${element.tagName} ${element.textContent.slice(0, 30)} ${ink}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of two runs with everything, of a quickstart, of a run that has just begun, and of a data set."""
    root = tmp_path_factory.mktemp("pages")
    base = read_run(write_run(root / "baseline-with-a-long-name-0123456789", num_steps=120, scale=2.0))
    folder = write_run(root / "run", summary=SUMMARY)
    run = read_run(folder)
    shutil.copy(folder / "results" / "student.json", folder / "results" / "qwen2_5_vl_7b_instruct_step_00000065.json")
    two = read_run(folder)
    files = {"two": (two, base), "one": (run, None), "begun": (Run("begun", status={"reason": "running"}), None)}
    paths = {}
    for name, pair in files.items():
        paths[name] = root / f"{name}.html"
        write_report(paths[name], *pair)
    paths["card"] = root / "data_card.html"
    paths["card"].write_text(data_card_page(wide_card()))
    return paths


@pytest.fixture(scope="module")
def browser():
    # Chromium has no sandbox for root
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=2 * MILLISECONDS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, pages):
    """A function that opens a page and keeps what the console says; nothing may be left there at the end."""
    said, contexts = [], []

    def opened(name: str, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(MILLISECONDS)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("requestfailed", lambda request: said.append(f"failed: {request.url[:100]}"))
        page.goto(pages[name].as_uri())
        drawn = "document.querySelectorAll('.chart svg').length === document.querySelectorAll('.chart').length"
        page.wait_for_function(drawn)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["two", "one", "begun", "card"])
def test_everything_is_visible_and_nothing_is_too_wide(show, name, width, scheme):
    page = show(name, width, scheme)
    # what is folded has no size that could be looked at
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate(SCROLLED) == []
    assert page.evaluate(BEYOND_IMAGE) == []
    assert page.evaluate(CUT_OFF) == []
    assert page.evaluate(OVERLAPPING) == []
    assert page.evaluate(FAINT) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(250, 249, 247)")
    if name in ("begun", "card"):
        return
    charts = page.locator(".chart svg")
    assert charts.count() >= 18
    for box in charts.evaluate_all("all => all.map(one => one.getBoundingClientRect()).map(b => [b.width, b.height])"):
        assert box[0] > 250 and box[1] > 120
    curves = charts.locator(".mark-line path, .mark-rect path").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect().width)"
    )
    assert len(curves) > 25 and max(curves) > 150
    images = page.locator("img").evaluate_all(
        "all => all.map(one => [one.complete, one.naturalWidth, one.offsetWidth])"
    )
    assert len(images) == 10 and all(done and size > 0 and shown > 50 for done, size, shown in images)


@pytest.mark.parametrize("width", [1280, 400])
def test_the_pointer_reads_values(show, width):
    page = show("two", width)
    tip = page.locator("#tip")
    assert not tip.is_visible()
    for label, expected in (
        ("Loss over steps", ("step  ", "loss, run  ", "loss, baseline-with-a-long-name-0123456789  ")),
        ("Seconds per step by phase", ("step  ", "rollout  ", " s")),
        (
            "Accuracy of both views by relative evidence area",
            ("evidence  ", "full view, baseline-with-a-long-name-0123456789  ", "samples  20", "["),
        ),
        ("The gap by relative evidence area", ("gap, run  ", " points", "gap, baseline-with-a-long-name-0123456789  ")),
        ("Relative box area of the records", ("0.1% to 1%", "records  3,900")),
    ):
        chart = page.locator(f".chart[aria-label='{label}'] svg").first
        chart.hover()
        assert tip.is_visible()
        text = tip.inner_text()
        assert all(part in text for part in expected), text
        box, view = tip.bounding_box(), page.viewport_size
        assert box["x"] >= 0 and box["x"] + box["width"] <= view["width"] + 1
        assert box["y"] >= 0 and box["y"] + box["height"] <= view["height"] + 1
    page.locator("h2").first.hover()
    assert not tip.is_visible()


def test_the_token_viewer_follows_pointer_and_keys(show):
    page = show("one")
    viewer = page.locator("article.trace").first
    tokens, shown = viewer.get_by_role("tab"), viewer.locator("[role=tabpanel]:visible")
    assert "Token 2 of 3" in shown.inner_text() and "90.0%" in shown.inner_text()
    tokens.nth(0).hover()
    assert "Token 1 of 3" in shown.inner_text()
    tokens.nth(2).click()
    assert shown.count() == 1 and "Token 3 of 3" in shown.inner_text()
    for key, number in (("ArrowRight", 1), ("ArrowLeft", 3), ("Home", 1), ("End", 3), ("ArrowLeft", 2)):
        page.keyboard.press(key)
        assert shown.count() == 1 and f"Token {number} of 3" in shown.inner_text()
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"


def test_links_lead_to_their_sections_and_folded_parts_open(show):
    page = show("two")
    for link in page.locator("nav a").all():
        link.click()
        section = page.locator(link.get_attribute("href"))
        assert section.bounding_box()["height"] > 50
    options = page.locator("#config details").first
    assert not options.locator("pre").is_visible()
    options.locator("summary").click()
    assert "teacher_view: crop" in options.locator("pre").inner_text()
