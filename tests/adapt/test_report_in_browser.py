"""The report in a real browser: it sorts and filters, fits any screen, is legible, and asks nobody for anything."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from made_report import END_TO_END, FROM_CACHE, OF_ONE_SEED, nineteen_methods

from adapt.report.page import write_report
from adapt.report.reported_rows import ReportedRows

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
N_METHODS = len(FROM_CACHE) + len(END_TO_END)

# The lowest ratio of contrast (WCAG 2) of a text on the page, and that text.
LOWEST_CONTRAST = """() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.]+/g).map(Number), scale = text.startsWith("color(") ? 1 : 255;
    return { rgb: parts.slice(0, 3).map((part) => part / scale), alpha: parts.length > 3 ? parts[3] : 1 };
  };
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const { rgb, alpha } = parse(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return rgb;
    }
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script, title")) continue;
    if (element.closest("svg") && element.tagName !== "text") continue;
    const color = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [luminance(parse(color).rgb), luminance(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent.trim()]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""

# Texts of drawings that reach beyond their drawing.
CLIPPED = """() => [...document.querySelectorAll(".drawing svg")].flatMap((svg) => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const box = text.getBoundingClientRect();
    return box.width && (box.left < frame.left - 1 || box.right > frame.right + 1
      || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
  }).map((text) => text.textContent);
})"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("nineteen")
    return write_report(run_dir, ReportedRows.of_run(run_dir, nineteen_methods(run_dir)), config_text="name: x\n" * 40)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser: Any, report: Path) -> Iterator[Callable[..., Any]]:
    """Open the report on a screen; what the browser complains of, and what it loads, is refused at the end."""
    contexts, complaints, requests = [], list[str](), list[str]()

    def open_on(screen: dict[str, int], **options: Any) -> Any:
        contexts.append(browser.new_context(viewport=screen, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_on
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:") and url != report.as_uri()] == []


def column(page: Any, name: str) -> tuple[Any, list[str]]:
    """The header of a column of the table of methods, and the texts of its visible cells."""
    table = page.locator("table.sortable").first
    headers = [" ".join(text.split()) for text in table.locator("thead th").all_text_contents()]
    index = headers.index(name)
    cells = table.locator(f"tbody tr:not([hidden]) > :nth-child({index + 1})").all_text_contents()
    return table.locator("thead th").nth(index), [" ".join(text.split()) for text in cells]


def test_a_click_on_a_header_sorts_numbers_as_numbers(open_page: Callable[..., Any]) -> None:
    page = open_page(WIDE)
    header, before = column(page, "trained")
    for direction, sign in (("descending", -1), ("ascending", 1)):
        header.locator("button").click()
        _, after = column(page, "trained")
        numbers = [sign * int(text.replace(",", "")) for text in after]
        assert numbers == sorted(numbers)
        assert sorted(after) == sorted(before)
        assert header.get_attribute("aria-sort") == direction
    assert page.locator("table.sortable").first.locator("[aria-sort]").count() == 1


def test_unknown_values_come_last_in_both_directions(open_page: Callable[..., Any]) -> None:
    page = open_page(WIDE)
    header, _ = column(page, "break even epochs")
    for _ in range(2):
        header.locator("button").click()
        _, values = column(page, "break even epochs")
        assert values[-len(END_TO_END) :] == ["–"] * len(END_TO_END)
        assert "–" not in values[: len(FROM_CACHE)]


def test_names_sort_by_the_keyboard_and_rows_stay_whole(open_page: Callable[..., Any]) -> None:
    page = open_page(WIDE)
    _, names = column(page, "method")
    rows = set(zip(names, column(page, "trained")[1], strict=True))
    header, _ = column(page, "method")
    header.locator("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    _, after = column(page, "method")
    assert after == sorted(names, reverse=True)
    assert set(zip(after, column(page, "trained")[1], strict=True)) == rows


def test_text_and_choice_filter_the_table(open_page: Callable[..., Any]) -> None:
    page = open_page(WIDE)
    filters = page.locator(".filters").first
    filters.locator("select").select_option("end-to-end")
    assert len(column(page, "method")[1]) == len(END_TO_END)
    assert filters.locator("output").text_content() == f"{len(END_TO_END)} of {N_METHODS}"
    filters.locator("input").fill("LoRa")
    assert [text.split()[0] for text in column(page, "method")[1]] == ["lora"]
    filters.locator("select").select_option("")
    filters.locator("input").fill("")
    assert len(column(page, "method")[1]) == N_METHODS


@pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_never_scrolls_sideways_and_every_column_can_be_reached(
    open_page: Callable[..., Any], screen: dict[str, int]
) -> None:
    page = open_page(screen)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = page.locator(".scroll.tall").first
    box.evaluate("(each) => { each.scrollLeft = 1e6; each.scrollTop = 1e6; }")
    last, first = box.locator("thead th").last.bounding_box(), box.locator("tbody th").first.bounding_box()
    frame = box.bounding_box()
    assert last["x"] + last["width"] <= frame["x"] + frame["width"] + 1
    assert first["x"] == pytest.approx(frame["x"], abs=1)  # the first column stays
    assert last["y"] == pytest.approx(frame["y"], abs=1)  # and so does the header


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(WIDE, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    ratio, text = page.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text
    assert page.evaluate(CLIPPED) == []
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert is_dark is (scheme == "dark")


def test_charts_stand_two_by_two_or_one_below_the_other(open_page: Callable[..., Any]) -> None:
    for screen, columns in ((WIDE, 2), (PHONE, 1)):
        figures = open_page(screen).locator(".charts").first.locator("figure").all()
        places = [figure.bounding_box() for figure in figures]
        assert len(places) == 4
        assert len({round(place["x"]) for place in places}) == columns


def test_methods_of_one_seed_are_marked(open_page: Callable[..., Any]) -> None:
    _, names = column(open_page(WIDE), "method")
    assert {text.split()[0] for text in names if text.endswith("n=1")} == set(OF_ONE_SEED)


def test_without_scripts_it_is_a_plain_page(open_page: Callable[..., Any]) -> None:
    page = open_page(PHONE, java_script_enabled=False)
    assert len(column(page, "method")[1]) == N_METHODS
    assert not page.locator(".filters").first.is_visible()
    assert page.locator("th button").count() == 0


def test_the_browser_runs_no_other_script(browser: Any, report: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(report.as_uri())
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = true';"
        " document.body.append(s); }"
    )
    assert page.evaluate("window.ran") is None
    context.close()


def test_the_page_is_small(report: Path) -> None:
    assert report.stat().st_size < 2 * 2**20
