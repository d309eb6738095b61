"""Look at pages in a real browser: pictures of them, and faults that only a browser can see.

    python tests/report/browser.py --out FOLDER PAGE.html [PAGE.html ...]

Every page is shown as on a phone and on a desktop, in light and dark. A page fails if it is wider
than the screen, has text that is too small, text of a picture that lies on other text or is cut
off, asks for another file, or makes the browser complain. Needs playwright; ``make screenshots``
gets it and finds a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

SCREENS = {"phone": (390, 844, 3, "light"), "phone-dark": (390, 844, 3, "dark")}
SCREENS |= {"desktop": (1280, 900, 1, "light"), "desktop-dark": (1280, 900, 1, "dark")}
LEAST_TEXT = 9.5  # pixels of the screen
FAULTS = """(least) => {
  const faults = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth)
    faults.push(`the page is ${root.scrollWidth} pixels wide on a screen of ${innerWidth}`);
  const shown = (e) => e.getClientRects().length && e.textContent.trim();
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect(), before = [];
    for (const text of svg.querySelectorAll("text")) {
      if (!shown(text)) continue;
      const box = text.getBoundingClientRect(), said = text.textContent.trim();
      const size = parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a;
      if (size < least) faults.push(`"${said}" is ${size.toFixed(1)} pixels high`);
      if (box.left < frame.left - 1 || box.right > frame.right + 1 ||
          box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        faults.push(`"${said}" is cut off`);
      for (const [other, words] of before) {
        const wide = Math.min(box.right, other.right) - Math.max(box.left, other.left);
        const high = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
        if (wide > 1 && high > 3) faults.push(`"${said}" lies on "${words}"`);
      }
      before.push([box, said]);
    }
  }
  for (const e of document.querySelectorAll("p, td, th, b, span, summary, figcaption, h1, h2"))
    if (shown(e) && parseFloat(getComputedStyle(e).fontSize) < 12.5)
      faults.push(`"${e.textContent.trim().slice(0, 40)}" is small`);
  return faults;
}"""


def look(page_file: Path, out: Path, browser) -> list[str]:
    """Show a page on every screen, write a picture of each, and return its faults."""
    faults: list[str] = []
    for screen, (width, height, scale, scheme) in SCREENS.items():
        context = browser.new_context(
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
            color_scheme=scheme,
        )
        page = context.new_page()
        said: list[str] = []
        address = page_file.resolve().as_uri()
        page.on("console", lambda message, said=said: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error, said=said: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog, said=said: said.append("a dialog opened"))
        page.on(
            "request",
            lambda request, said=said, address=address: (
                request.url == address or said.append(f"asks for {request.url[:80]}")
            ),
        )
        page.goto(address)
        said += page.evaluate(FAULTS, LEAST_TEXT)
        page.screenshot(path=out / f"{page_file.stem}-{screen}.png", full_page=True)
        faults += [f"{page_file.name}, {screen}: {each}" for each in said]
        context.close()
    return faults


def main() -> int:
    """Look at the pages of the command line; return 1 if one has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="a Chromium")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    faults = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for page in options.pages:
            faults += look(page, options.out, browser)
        print(f"Chromium {browser.version}: {len(options.pages)} pages on {len(SCREENS)} screens")
        browser.close()
    print("\n".join(faults) or f"no faults; pictures in {options.out}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
