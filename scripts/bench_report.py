"""The size of report.html, and how long it takes to write and to show.

    python scripts/bench_report.py --workdir runs/tiny [--picture docs/report.png]

Prints one JSON object: bytes; seconds to write; and of headless Chromium, the median of --repeats
fresh visits: milliseconds to the first contentful paint and to the load event. Needs playwright
(part of opsdc-jax[dev]) and the Debian package chromium. With --picture it also writes what a
reader sees who rests on the token where the teacher disagrees most.

Exit codes: 0 done; 1 an unexpected error (with a traceback); 2 bad input.
"""

import json
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from opsdc_jax import cli, report
from opsdc_jax.config import InputError

_TIMES = """
async () => {
  const paint = await new Promise((done) => new PerformanceObserver((list) => {
    list.getEntriesByName("first-contentful-paint").forEach((entry) => done(entry.startTime));
  }).observe({ type: "paint", buffered: true }));
  return { paint_ms: paint, load_ms: performance.getEntriesByType("navigation")[0].loadEventEnd };
}
"""


def main(argv: Sequence[str]) -> int:
    """Writes the page, visits it, prints the numbers."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_string("chromium", shutil.which("chromium"), "the browser", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "visits", 1, flag_values=values)
    flags.DEFINE_string("picture", None, "PNG file to write", flag_values=values)
    args = cli.parse(values, argv)
    if not args.workdir:
        raise InputError("--workdir DIR is required")
    if not args.chromium:
        raise InputError("no chromium was found: install it, or say where it is by --chromium")
    began = time.perf_counter()
    page = report.write(pathlib.Path(args.workdir))
    written = time.perf_counter() - began
    measured = {"benchmark": "report", "bytes": page.stat().st_size, "write_s": round(written, 2)}
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise InputError("playwright is not installed: pip install 'opsdc-jax[dev]'") from None
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        measured |= visits(browser, page.resolve().as_uri(), args.repeats)
        if args.picture:
            picture(browser, page.resolve().as_uri(), args.picture)
        browser.close()
    print(json.dumps(measured))
    return cli.EXIT_DONE


def visits(browser: Any, address: str, repeats: int) -> dict[str, float]:
    """Median times of fresh visits."""
    times = []
    for _ in range(repeats):
        page = browser.new_page()
        page.goto(address)
        times.append(page.evaluate(_TIMES))
        page.close()
    return {key: round(statistics.median(one[key] for one in times)) for key in times[0]}


def picture(browser: Any, address: str, path: str) -> None:
    """The token view on a desktop's screen, one token opened."""
    page = browser.new_page(viewport={"width": 1180, "height": 720})
    page.goto(address)
    if not page.locator("#tokens").count():
        raise InputError("the run has no token view to picture: log.token_views was 0")
    page.locator("#tokens").evaluate("(section) => scrollTo(0, section.offsetTop - 30)")
    tokens = page.locator(".tokens").first.locator("span")
    colours = tokens.evaluate_all("(all) => all.map((one) => one.className)")
    tokens.nth(colours.index(max(colours))).hover()
    page.screenshot(path=path)
    page.close()


if __name__ == "__main__":
    sys.exit(cli.run(main))
