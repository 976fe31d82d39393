"""A headless browser for the pages."""

import shutil
from collections.abc import Iterator

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A started browser. Skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield launched
        launched.close()
