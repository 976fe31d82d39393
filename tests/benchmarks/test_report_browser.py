"""The page of benchmarks.report in a browser: it draws itself, loads nothing, sorts, filters, opens, keeps its state."""

import pytest

from benchmarks import report
from tests.benchmarks.files import rows, run_directory, write

pytestmark = pytest.mark.slow  # a browser
HOSTILE = "<img src=x onerror=\"document.title='run'\"></script><script>document.title='run'</script>"
TITLE = "Learning with noisy labels: results"


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The page of made-up results: accuracies that sort otherwise as text, a hostile method, a run directory, a cross table."""
    folder = tmp_path_factory.mktemp("report")
    ours = rows(92, 94)
    content = ours + rows(80, 81, method="CE") + rows(9, 9.5, method="low") + rows(100, 100, method=HOSTILE)
    of_sfa = {"method": "SFA", "paper": "sfa"}
    content += rows(88, 89, table="grid", profile="short", dataset="cifar100", **of_sfa)
    content += rows(93, 93.1, table="cross", **of_sfa) + rows(50, 51, method="AFM", table="cross")
    write(folder / "a.csv", content)
    for place, curve in ((0, [50, 70, 92]), (2, [52, 72, 94])):
        run_directory(folder / "runs" / str(place), ours[place : place + 2], curve)
    out = folder / "page.html"
    report.main([str(folder / "a.csv"), "--runs", str(folder / "runs"), "--out", str(out)])
    return out.as_uri()


def methods(page) -> list[str]:
    return page.locator("#table tr.row .toggle").all_inner_texts()


def toggle(page, method: str):
    return page.locator("#table .toggle", has_text=method)


def test_the_page_draws_its_rows_and_panels(page):
    assert methods(page).count("Me-Momentum") == 1
    assert page.locator("#count").inner_text() == "7 of 7 rows"
    assert page.locator("#panels .panel").count() == 2
    assert page.locator("#time-panels .bar i").count() == 14
    assert "7 measured rows" in page.locator("#lede").inner_text()


def test_a_hostile_method_is_only_text(page):
    assert HOSTILE in methods(page)
    assert page.locator("img").count() == 0
    toggle(page, "onerror").click()
    assert page.locator("tr.details").count() == 1 and page.locator("img").count() == 0
    page.locator("#f-method").select_option(HOSTILE)
    assert methods(page) == [HOSTILE]


def test_it_sorts_numbers_as_numbers_and_says_so(page):
    button = page.locator('[data-sort="last"]')
    heading = page.locator("th", has=button)
    assert heading.get_attribute("aria-sort") == "none"
    button.click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert methods(page)[0] == HOSTILE and methods(page)[-1] == "low"  # as text 9 would come before 100
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert heading.get_attribute("aria-sort") == "ascending"
    assert methods(page)[0] == "low" and methods(page)[-1] == HOSTILE


def test_it_filters_by_text_and_by_choice(page):
    page.locator("#f-q").fill("me-mom symmetric")
    assert methods(page) == ["Me-Momentum"]
    assert page.locator("#count").inner_text() == "1 of 7 rows"
    page.locator("#reset").click()
    assert len(methods(page)) == 7
    page.locator("#f-profile").select_option("short")
    assert methods(page) == ["SFA"]
    page.locator("#f-dataset").select_option("cifar10")
    assert methods(page) == []
    assert page.locator("#table .empty").is_visible()


def test_cells_that_are_not_measured_are_hidden_until_asked_for(page):
    assert page.locator("tr.missing").count() == 0
    page.locator("#f-missing").check()
    assert page.locator("tr.missing").count() > 100
    page.locator("tr.missing .toggle").first.click()
    assert "python -m benchmarks.run " in page.locator("tr.details code").first.inner_text()


def test_an_open_row_shows_command_curves_and_log(page):
    own = toggle(page, "Me-Momentum")
    own.click()
    assert own.get_attribute("aria-expanded") == "true"
    details = page.locator(f"#{own.get_attribute('aria-controls')}")
    assert details.locator("code").first.inner_text() == "python x.py --seed 1 --out runs/1"
    assert details.locator("figure path").first.get_attribute("d").count("L") == 2  # three epochs
    captions = details.locator("figcaption").all_inner_texts()
    assert captions[0] == "test accuracy by epoch (%)" and captions[1].startswith("quality of the selection")
    assert details.locator("details.log").count() == 2
    details.locator("details.log summary").first.click()
    third = details.locator("details.log").first.locator("tbody tr").nth(2)
    third.wait_for()  # a log is drawn when it is opened
    assert third.locator("td").all_inner_texts() == ["3", "92", "0.123457"]
    toggle(page, "CE").click()
    assert "there is no log" in page.locator("tr.details", has_text="there is no log").inner_text()
    own.click()
    assert page.locator("tr.details").count() == 1


def test_the_command_is_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    toggle(page, "Me-Momentum").click()
    button = page.locator("tr.details .copy").nth(1)
    button.click()
    page.wait_for_function("button => button.textContent === 'copied'", arg=button.element_handle())
    assert page.evaluate("navigator.clipboard.readText()") == "python x.py --seed 2 --out runs/2"


def test_the_hash_keeps_the_state(page, address):
    page.locator("#f-q").fill("cifar10")
    page.locator("#f-paper").select_option("me_momentum")
    page.locator("#f-metric").select_option("best")
    page.locator('[data-sort="method"]').click()
    toggle(page, "Me-Momentum").click()
    left, place = methods(page), page.evaluate("location.hash")
    assert len(left) == 5
    page.goto("about:blank")
    page.goto(address + place)
    assert methods(page) == left
    assert page.locator("tr.details").count() == 1
    assert page.locator("#f-q").input_value() == "cifar10"
    assert page.locator("#f-metric").input_value() == "best"
    assert page.locator('th[aria-sort="ascending"]').inner_text().startswith("method")
    page.goto("about:blank")
    page.goto(address + "#sort=nonsense&metric=none&open=x&paper=nobody")
    assert methods(page) == []
    page.goto(address)


def test_a_comparable_published_figure_is_coloured_and_the_best_of_all_methods_is_bold(page):
    row = page.locator("tr.row", has=page.locator(".toggle", has_text="Me-Momentum"))
    cell = row.locator('[data-label="vs published"]')
    difference = cell.locator(".diff")
    assert difference.get_attribute("class") == "diff" and "rgba" in difference.get_attribute("style")
    assert cell.inner_text().startswith("+0.24")  # 93 against the 92.76 of a secondary source
    assert row.locator('[data-label="published"] .badge').inner_text() == "secondary"
    assert page.locator("#cross-table td.best").all_inner_texts() == ["93.05 ± 0.07"]


def test_the_page_fits_a_phone(phone):
    toggle(phone, "Me-Momentum").click()
    phone.locator("details.log summary").first.click()
    phone.locator("#f-sort").select_option("last")
    assert methods(phone)[-1] == "low"
