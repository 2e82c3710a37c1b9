"""report.html in a real browser: it loads nothing, and every token answers on any screen."""

import shutil

import pytest
from report_run import HOSTILE, make_run

from opsdc_jax import report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs the browser Chromium (Debian package chromium)", allow_module_level=True)

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    # A word that no line can hold must not make a phone scroll sideways.
    text = f"{HOSTILE} {'long' * 40}"
    return report.write(make_run(tmp_path_factory.mktemp("runs") / "run", text=text)).as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser, address):
    """A function that opens the page; at the end of the test nothing may have gone wrong in it."""
    contexts, wrong, requests = [], [], []

    def open_page(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == [], "console and errors"
    assert {url for url in requests if not url.startswith("data:")} == {address}


def test_what_a_model_wrote_is_shown_and_not_run(visit):
    page = visit()
    assert page.title() == "run: OPSDC report"
    assert "<script>document.title='hacked'</script>" in page.locator("#answers").inner_text()
    assert page.locator("#main b").count() == 0
    page.locator(".tokens").first.locator("span").nth(8).hover()
    assert "<script>document.title" in page.locator("#tip h4").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth === innerWidth")


def test_hovering_a_token_shows_what_either_side_would_have_said(visit):
    page = visit()
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator(".tokens span", has_text="Wait").first.hover()
    shown = tip.inner_text()
    assert "“Wait”" in shown
    assert "0.700 nats" in shown
    student, teacher = (
        tip.locator(f".from-{side}").inner_text() for side in ("student", "teacher")
    )
    assert "Wait\n50.0%" in student
    assert "So\n25.0%" in student
    assert "</think>\n75.0%" in teacher
    assert "Wait\n12.5%" in teacher, "what was said, though it is none of the teacher's choices"
    assert "Hmm" not in teacher, "less than a thousandth"
    page.locator("h1").hover()
    assert tip.is_hidden()


def test_the_keyboard_reaches_every_token(visit):
    page = visit()
    tip = page.locator("#tip")

    def focused():
        return page.evaluate(
            """() => {
              const at = document.activeElement, group = at.closest(".tokens");
              return group && [Number(group.dataset.rollout), [...group.children].indexOf(at)];
            }"""
        )

    for _ in range(60):
        page.keyboard.press("Tab")
        if focused():
            break
    assert focused() == [0, 0]
    assert tip.is_visible()
    page.keyboard.press("ArrowRight")
    assert focused() == [0, 1]
    assert "“Wait”" in tip.inner_text()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus is visible"
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("End")
    assert focused() == [0, 11]
    page.keyboard.press("ArrowRight")
    assert focused() == [0, 11]
    page.keyboard.press("Home")
    page.keyboard.press("Escape")
    assert focused() == [0, 0]
    assert tip.is_hidden()
    page.keyboard.press("Tab")
    assert focused() == [1, 0], "one stop for a rollout"


def test_a_tap_shows_the_choices_inside_the_screen_of_a_phone(visit):
    page = visit(**PHONE)
    page.locator(".tokens span", has_text="Wait").first.tap()
    box = page.locator("#tip").bounding_box()
    assert "“Wait”" in page.locator("#tip").inner_text()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= 740


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_no_width_scrolls_sideways(visit, width):
    page = visit(viewport={"width": width, "height": 740})
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_letters_of_the_figures_are_legible_on_a_phone(visit):
    page = visit(**PHONE)
    heights = page.evaluate(
        "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height)"
    )
    assert len(heights) > 50
    assert min(heights) >= 10


COLOURS = """
() => ['.lead', '.lead strong', '.facts dt', 'figcaption', 'nav a', 'td small', '.tokens .k5',
       'svg text', '.answer h4 span'].map((selector) => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const at = document.querySelector(selector), layers = [];
  for (let one = at; one; one = one.parentElement) {
    layers.unshift(getComputedStyle(one).backgroundColor);
  }
  const style = getComputedStyle(at);
  const draw = (colour) => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); };
  const pixel = () => [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  layers.forEach(draw);
  const back = pixel();
  draw(at.namespaceURI.includes('svg') ? style.fill : style.color);
  return [selector, back, pixel()];
})
"""


def luminance(rgb):
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in
             (channel / 255 for channel in rgb)]  # fmt: skip
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_light_and_dark_differ_and_have_contrast(visit):
    seen = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        colours = page.evaluate(COLOURS)
        for selector, back, front in colours:
            low, high = sorted((luminance(back), luminance(front)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, selector, back, front)
        seen[scheme] = luminance(colours[0][1])
    assert seen["light"] > 0.8
    assert seen["dark"] < 0.05


def test_print_leaves_out_what_only_a_screen_needs(visit):
    page = visit()
    assert page.locator("nav").is_visible()
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator("#results table").first.is_visible()
