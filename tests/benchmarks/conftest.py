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


@pytest.fixture
def page(browser, address, request) -> Iterator:
    """The page at the module's address, just loaded; at the end nothing has gone wrong in it, and it has loaded itself alone."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    opened = context.new_page()
    wrong, loaded = [], []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda sent: loaded.append(sent.url.split("#")[0]))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(address)
    yield opened
    assert wrong == []
    assert {url for url in loaded if not url.startswith(("data:image/", "blob:"))} == {address}
    assert opened.title() == request.module.TITLE  # nothing of the data has run
    context.close()


@pytest.fixture(params=["light", "dark"])
def phone(page, request) -> Iterator:
    """The page on a phone, by day and by night; at the end it is as wide as the phone and of the right colours."""
    page.emulate_media(color_scheme=request.param)
    page.set_viewport_size({"width": 390, "height": 844})
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(background[4:-1].split(",")[0]) > 128) == (request.param == "light")
