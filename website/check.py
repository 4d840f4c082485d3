"""The site in a real browser (``make site-check``): search, tables, console, narrow screens. Needs a Chromium."""

from __future__ import annotations

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, Request, expect, sync_playwright

SITE = Path(__file__).resolve().parents[1] / "site"
PAGES = sorted(str(path.parent.relative_to(SITE)) for path in SITE.rglob("index.html"))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def search_finds(page: Page, word: str) -> None:
    """The search leads to a page that has the word."""
    expect(page.locator(".md-search-result__meta")).to_have_text("Type to start searching")  # the index is loaded
    page.locator("[data-md-component='search-query']").first.fill(word)
    first = page.locator(".md-search-result__item a").first
    expect(first).to_be_visible()
    first.click()
    expect(page.locator("article")).to_contain_text(word)


def table_filters_and_sorts(page: Page, words: str, first: str) -> None:
    """A search leaves fewer rows, a heading sorts them, a refused cell shows its reasons."""
    rows = page.locator(".records tbody tr")
    expect(rows.first).to_be_visible()
    whole = page.locator(".records .count").inner_text()
    page.locator(".records input[type=search]").fill(words)
    expect(page.locator(".records .count")).not_to_have_text(whole)
    expect(rows.first).to_contain_text(first)
    page.locator(".records th button").first.click()
    expect(page.locator(".records th").first).to_have_attribute("aria-sort", "ascending")
    up = rows.first.inner_text()
    page.locator(".records th button").first.click()
    expect(page.locator(".records th").first).to_have_attribute("aria-sort", "descending")
    if rows.count() > 1:
        assert rows.first.inner_text() != up
    page.locator(".records td.refused button").first.click()
    expect(page.locator(".records .reasons li").first).to_be_visible()


def fits(page: Page, width: int) -> None:
    """No page is wider than the screen; wide tables scroll by themselves."""
    found = page.evaluate("document.documentElement.scrollWidth")
    assert found <= width, f"{page.url}: {found} pixels wide on a screen of {width}"


def failed(asked: Request) -> bool:
    """Whether a request failed by itself; one that ends because its page was left has not."""
    return asked.failure != "net::ERR_ABORTED"


def main(pictures: Path | None = None) -> None:
    """Check the built site; keep screenshots in a folder if one is given."""
    handler = functools.partial(Quiet, directory=str(SITE))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    errors: list[str] = []
    expect.set_options(timeout=20_000)  # a busy machine
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in ((1280, "light"), (390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda raised: errors.append(str(raised)))
            page.on(
                "requestfailed", lambda asked: errors.append(f"{asked.url}: {asked.failure}") if failed(asked) else None
            )
            for name in PAGES:
                page.goto(f"{address}/{name}/", wait_until="networkidle")
                fits(page, width)
                if pictures:
                    page.screenshot(path=pictures / f"{width}-{name.replace('/', '-') or 'home'}.png")
            if width == 1280:
                page.goto(f"{address}/")
                search_finds(page, "leak")
            page.goto(f"{address}/models/")
            table_filters_and_sorts(page, "gemma3 decoder", "gemma3")
            page.goto(f"{address}/conformance/")
            table_filters_and_sorts(page, "llama padding", "llama")
            context.close()
        browser.close()
    server.shutdown()
    assert not errors, errors
    print(f"{len(PAGES)} pages at 1280 and 390 pixels: search, tables, no error in the console")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
