"""The browser that tests look with: Debian's Chromium through Playwright; only continuous integration must have it."""

import contextlib
import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_needed = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here: apt-get install chromium"
)


@contextlib.contextmanager
def page(width=1400, height=1000, **options):
    """A tab of a fresh browser; ``tab.trouble`` collects errors, ``tab.asked`` every address that was asked."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "continuous integration needs a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": width, "height": height}, **options)
            tab.trouble, tab.asked = [], []
            tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
            tab.on("console", lambda said: tab.trouble.append(said.text) if said.type == "error" else None)
            tab.on("request", lambda request: tab.asked.append(request.url))
            yield tab
        finally:
            browser.close()
