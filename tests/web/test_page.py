"""The page in Chromium, at a server of its own process."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished_runs import Place
from ledgers import signal_set

from kronos_qlib.data.demo_market import write_demo_market
from kronos_qlib.ingest.selection import read_instrument
from kronos_qlib.live.ledger import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.long]  # make test-web
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SERVER = """
import socket, sys, uvicorn
from pathlib import Path
from kronos_qlib.web.app import make_app
from kronos_qlib.web.settings import ServerSettings
market, model, uploads, ledger, token, store, runs, sockets = *sys.argv[1:8], socket.socket()
sockets.bind(("127.0.0.1", 0)), sockets.listen(128)
port = sockets.getsockname()[1]
stores, models = {"market": Path(market), "other": Path(store)}, {"tiny": model, "nano": "nano"}
settings = ServerSettings(stores, models, Path(uploads), ledger, runs, token or None, port=port, exchange="XSHG")
app = make_app(settings)
print(port, flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([sockets])
"""


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_market(tmp_path_factory.mktemp("store") / "market", instruments=12, days=160)


def serve(folder: Path, market: Path, checkpoint: Path, runs: Place, token: str = "") -> Iterator[str]:
    ledger = f"sqlite:///{folder}/ledger.db"
    Ledger(ledger).record(signal_set(store=str(market)), region="cn")
    arguments = [str(market), str(checkpoint), str(folder / "uploads"), ledger, token, str(runs.store), runs.uri]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, market: Path, checkpoint: Path, runs: Place) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("server"), market, checkpoint, runs)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: make test-web installs it where apt can")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def refused() -> list[str]:
    """Paths of requests that a test expects to fail: the console tells of them too."""
    return []


@pytest.fixture
def page(browser, server: str, refused: list[str]) -> Iterator:
    """The page, ready; at the end there was no error on its console, and no request that left the host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append((message.type, message.text, message.location["url"])))
    page.on("pageerror", lambda error: said.append(("error", str(error), "")))
    page.on("request", lambda request: asked.append(request.url))
    open_page(page, server)
    yield page
    wrong = [each for each in said if each[0] in ("error", "warning")]
    assert [each for each in wrong if not is_expected(each, refused)] == []
    assert [url for url in asked if not url.startswith((server, "blob:", "data:"))] == []
    context.close()


def is_expected(said: tuple[str, str, str], refused: list[str]) -> bool:
    _, text, url = said
    return text.startswith("Failed to load resource") and any(path in url for path in refused)


def until(page, expression: str, seconds: float = 30.0) -> None:
    """Wait until an expression holds; playwright's own way needs `eval`, which the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"{expression} does not hold within {seconds} s"
        page.wait_for_timeout(30)


def open_page(page, server: str) -> None:
    page.goto(server)
    until(page, "document.getElementById('instrument').value !== ''")


DIGEST = "document.getElementById('chart').dataset.digest"


def forecast(page, **values: str) -> None:
    """Ask for a forecast other than the one that is shown, and wait until it is drawn."""
    for name, value in ({"lookback": "30", "horizon": "5", "samples": "8"} | values).items():
        page.fill(f"#{name}", value)
    before = page.evaluate(DIGEST)
    page.click("#ask")
    until(page, f"({DIGEST} ?? null) !== {json.dumps(before)}")


def test_a_forecast_of_the_demo_market_is_shown(page):
    forecast(page, at="2018-07-02")
    cards = page.inner_text("#figures")
    assert "Probability up" in cards and "last value" in cards and "historical volatility" in cards
    assert page.locator("#chart .trace.boxes").count() >= 2, "the candles seen, and those that came"
    assert page.locator("#table tbody tr").count() == 5
    assert "predict_paths_batch" in page.locator("#snippet").text_content()
    assert page.evaluate("document.getElementById('chart')._fullLayout.xaxis.type") == "linear", "no gaps of weekends"


def test_a_setting_that_is_changed_changes_the_forecast(page):
    forecast(page)
    before = page.inner_text("#figures")
    forecast(page, seed="7", temperature="1.5")
    assert page.inner_text("#figures") != before


def test_overlays_and_colours_are_chosen(page):
    forecast(page)
    for box in ("#show-sma", "#show-bollinger", "#show-rsi", "#red-up"):
        page.check(box)
    names = "document.getElementById('chart').data.map(trace => trace.name)"
    until(page, f"{names}.includes('RSI 14')")
    assert {"SMA 20", "Bollinger 20, 2σ"} <= set(page.evaluate(names))
    rise = page.evaluate("document.getElementById('chart').data[0].increasing.line.color")
    assert rise == "#C8322B"
    page.uncheck("#show-paths")
    until(page, f"!{names}.includes('paths')")


def test_a_long_forecast_shows_its_first_paths_and_is_cancelled(page):
    page.select_option("#model", "nano")
    for name, value in {"samples": "1000", "horizon": "90", "lookback": "10"}.items():
        page.fill(f"#{name}", value)
    page.click("#ask")
    until(page, "!document.getElementById('cancel').disabled")
    until(page, "document.getElementById('chart').data?.some(trace => trace.name === 'median')")
    assert page.is_enabled("#cancel"), "the others are still drawn"
    page.click("#cancel")
    until(page, "document.getElementById('state').textContent === 'Cancelled.'")
    page.select_option("#model", "tiny")
    forecast(page)


def test_a_forecast_survives_a_reload(page, server: str):
    forecast(page, seed="11")
    shown = page.inner_text("#figures")
    page.reload()
    until(page, "document.getElementById('figures').textContent !== ''")
    assert page.inner_text("#figures") == shown and page.input_value("#seed") == "11"


def test_a_good_file_is_forecast_and_a_bad_one_is_explained(page, market: Path, tmp_path: Path, refused: list[str]):
    refused.append("/api/uploads")
    name = "<script>alert(1)</script>"
    bars = read_instrument(f"{market}:DEMO0002").bars.rename_axis("date")
    good, bad = tmp_path / "mine & <b>.csv", tmp_path / "bad.csv"
    bars.assign(symbol="DEMO0002").to_csv(good)
    bad.write_text(f"{name},x\n1,2\n")
    page.fill("#lookback", "30")
    page.set_input_files("#file", str(good))
    page.wait_for_selector("#chart .plot-container")
    assert "mine & <b>.csv" in page.inner_text("#source")
    page.set_input_files("#file", str(bad))
    page.wait_for_selector("#alert:not([hidden])")
    assert "names no column of a bar" in page.inner_text("#alert") and name in page.inner_text("#alert")
    page.click("#tab-data")
    page.wait_for_selector("#uploads details")
    assert "mine & <b>.csv" in page.inner_text("#uploads")
    page.click("#uploads summary")
    page.click("#uploads button >> text=What ingest finds")
    page.wait_for_selector("#check h3")
    assert "units:" in page.inner_text("#check .findings") and "adjust" in page.inner_text("#check .findings")
    page.click("#tab-forecast")
    with page.expect_response("**/api/uploads"):
        page.click("#tab-data")
    page.wait_for_timeout(100)
    assert page.locator("#uploads details[open]").count() == 1, "it stays open"


def test_files_are_downloaded(page):
    forecast(page)
    with page.expect_download() as csv:
        page.click("#csv")
    lines = Path(csv.value.path()).read_text().splitlines()
    assert lines[0].startswith("time,q50") and len(lines) == 6
    with page.expect_download() as png:
        page.click("#png")
    assert Path(png.value.path()).read_bytes().startswith(b"\x89PNG")


def test_a_market_is_ranked_sorted_filtered_and_leads_to_a_forecast(page):
    page.click("#tab-market")
    for name, value in {"lookback": "20", "horizon": "3", "samples": "4"}.items():
        page.fill(f"#market-{name}", value)
    page.fill("#top", "2")
    page.click("#rank")
    page.wait_for_selector("#market-table tbody tr")
    assert page.locator("tr.top").count() == 2 and page.locator("#market-table .spark").count() > 5
    page.focus("#sort-instrument")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "sort-instrument"
    names = page.locator("#market-table button.plain").all_inner_texts()
    assert names == sorted(names)
    assert [each.strip() for each in page.locator("#market-table th[scope=row]").all_inner_texts()] == names
    page.check("[aria-label='Watch DEMO0003']")
    page.check("#watched")
    assert page.locator("#market-table tbody tr").count() == 1
    page.click("#market-table button.plain")
    page.wait_for_selector("#chart .plot-container")
    assert page.input_value("#instrument") == "DEMO0003" and page.is_visible("#panel-forecast")


def test_a_finished_run_ranks_the_market(page):
    page.click("#tab-market")
    page.select_option("#market-store", "other")
    page.fill("#market-at", "2018-07-18")
    page.wait_for_selector("#market-model optgroup option", state="attached")
    option = page.locator("#market-model optgroup option", has_text="lightgbm").get_attribute("value")
    page.select_option("#market-model", option)
    page.click("#tab-forecast")
    with page.expect_response("**/api/runs"):
        page.click("#tab-market")
    page.wait_for_timeout(100)
    assert page.input_value("#market-model") == option, "it stays chosen"
    assert page.is_disabled("#market-samples"), "a run has settings of its own"
    page.click("#rank")
    page.wait_for_selector("#market-table tbody tr", timeout=90_000)
    assert "lightgbm" in page.inner_text("#market-state") and "In the ledger" in page.inner_text("#market-state")
    page.click("#market-table button.plain >> nth=0")
    page.wait_for_selector("#chart .plot-container")


def test_runs_are_compared_in_a_frame(page):
    page.click("#tab-runs")
    page.wait_for_selector("#runs-table input")
    for box in page.locator("#runs-table input").all():
        box.check()
    page.click("#tab-ledger")
    with page.expect_response("**/api/runs"):
        page.click("#tab-runs")
    page.wait_for_timeout(100)
    assert all(box.is_checked() for box in page.locator("#runs-table input").all())
    page.click("#runs-form button.main")
    page.wait_for_selector("#report iframe", timeout=90_000)
    frame = page.frame_locator("#report iframe")
    assert "kronos" in frame.locator("body").inner_text() and "lightgbm" in frame.locator("body").inner_text()
    assert page.get_attribute("#report iframe", "sandbox") == "allow-scripts"


def test_of_two_rankings_the_later_one_is_shown(page):
    left = []
    page.on("request", lambda request: left.append(request.url) if request.method == "DELETE" else None)
    page.click("#tab-market")
    page.select_option("#market-model", "nano")
    for name, value in {"lookback": "20", "horizon": "60", "samples": "200"}.items():
        page.fill(f"#market-{name}", value)
    page.click("#rank")
    until(page, "!document.getElementById('market-cancel').disabled")
    page.select_option("#market-model", "tiny")
    for name, value in {"horizon": "3", "samples": "2"}.items():
        page.fill(f"#market-{name}", value)
    page.click("#rank")
    page.wait_for_selector("#market-table tbody tr")
    assert "by tiny" in page.inner_text("#market-state") and page.is_disabled("#market-cancel")
    assert len(left) == 1 and "/api/market/" in left[0], "the other is cancelled"
    page.fill("#market-horizon", "9")  # what the form says now is not what was ranked
    page.click("#market-table button.plain >> nth=0")
    page.wait_for_selector("#chart .plot-container")
    assert page.input_value("#horizon") == "3" and page.input_value("#model") == "tiny"


def test_a_watchlist_is_ranked(page):
    page.click("#tab-market")
    page.select_option("#universe", label="watchlist")
    page.click("#rank")
    page.wait_for_selector("#alert:not([hidden])")
    assert "watchlist is empty" in page.inner_text("#alert")
    for name, value in {"lookback": "20", "horizon": "3", "samples": "2"}.items():
        page.fill(f"#market-{name}", value)
    page.select_option("#universe", "demo")
    page.click("#rank")
    page.wait_for_selector("#market-table tbody tr")
    for box in page.locator("#market-table input").all()[:2]:
        box.check()
    page.select_option("#universe", label="watchlist")
    page.click("#rank")
    until(page, "document.querySelectorAll('#market-table tbody tr').length === 2")


def test_a_stream_that_breaks_is_opened_again(page, refused: list[str]):
    refused.append("/events")
    broken = [lambda route: route.abort(), lambda route: route.fulfill(content_type="text/event-stream", body="")]
    page.route("**/events", lambda route: broken.pop()(route) if broken else route.continue_())
    page.select_option("#model", "nano")
    forecast(page, seed="31", samples="300", horizon="60")
    assert not broken and page.inner_text("#state").startswith("Done")
    assert not page.is_visible("#progress") and page.is_disabled("#cancel")


def test_a_question_whose_server_is_gone_fails_in_words(page, refused: list[str]):
    refused += ["/events", "/api/forecasts"]
    page.select_option("#model", "nano")
    page.route("**/events", lambda route: route.abort())
    page.route(
        "**/api/forecasts/*", lambda route: route.abort() if route.request.method == "GET" else route.continue_()
    )
    page.click("#ask")
    page.wait_for_selector("#alert:not([hidden])")
    assert "does not answer" in page.inner_text("#alert") and page.inner_text("#state") == "Failed."
    assert not page.is_visible("#progress") and page.is_disabled("#cancel")


def test_an_answer_that_comes_late_does_not_take_the_newer_ones_place(page):
    left, waiting = [], []
    page.on("request", lambda request: left.append(request.url) if request.method == "DELETE" else None)
    page.route("**/api/forecasts", lambda route: route.continue_() if waiting else waiting.append(route))
    page.fill("#seed", "51")
    page.click("#ask")
    while not waiting:
        page.wait_for_timeout(30)
    forecast(page, seed="52")
    shown = page.inner_text("#figures")
    waiting[0].continue_()
    page.wait_for_timeout(1000)
    assert page.inner_text("#figures") == shown and len(left) == 1


def test_small_numbers_keep_their_digits(page):
    shown = "import('/page/dom.js').then(dom => [0.00001234, 1.087654, -0.5, 1234567].map(value => dom.number(value)))"
    assert page.evaluate(shown) == ["0.00001234", "1.08765", "−0.5", "1,234,567"]


def test_a_tab_that_is_opened_again_shows_what_came_meanwhile(page):
    page.click("#tab-ledger")
    page.wait_for_selector("#sets tbody tr")
    before = page.locator("#sets tbody tr").count()
    page.click("#tab-forecast")
    forecast(page, at="2018-07-03", seed="41")
    page.click("#tab-ledger")
    until(page, f"document.querySelectorAll('#sets tbody tr').length === {before + 1}")


def test_a_tab_is_where_the_page_starts(page):
    page.click("#tab-market")
    page.reload()
    page.wait_for_selector("#market-model optgroup option", state="attached")
    assert page.is_visible("#panel-market") and page.locator("#market-model option").count() > 2


def test_a_tab_that_could_not_be_read_is_read_again(page, refused: list[str]):
    refused.append("/api/ledger")
    page.route("**/api/ledger", lambda route: route.abort(), times=1)
    page.click("#tab-ledger")
    page.wait_for_selector("#alert:not([hidden])")
    page.click("#tab-ledger")
    page.wait_for_selector("#sets tbody tr")
    assert not page.is_visible("#alert")


def test_an_answer_without_returns_is_shown(page):
    def change(route) -> None:
        status = json.loads(route.fetch().text().split("data: ")[-1])
        for name in ("median_return", "range_50", "range_90"):
            del status["result"]["figures"][name]
        status["result"]["came"]["time"][0] = "2018-07-01"
        route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(status)}\n\n")

    page.route("**/events", change)
    forecast(page, at="2018-07-02", seed="61")
    assert page.locator("#figures dd:not(.note)").all_inner_texts()[1:4] == ["–", "–", "–"]
    came = "document.getElementById('chart').data.find(trace => trace.name === 'what came').x"
    assert page.evaluate(came) == [2, 3, 4, 5], "a bar of another time has no place"


def test_the_ledger_is_shown(page):
    page.click("#tab-ledger")
    page.click("[aria-label^='Open kronos_csi300']")
    page.wait_for_selector("#set table")
    with page.expect_response("**/api/ledger"):
        page.click("#tab-ledger")
    assert page.locator("#set tbody tr").count() == 6 and "kronos_csi300" in page.inner_text("#set")


def test_a_forecast_is_kept_and_what_came_is_filled_in(page):
    forecast(page, at="2018-07-02", seed="23")
    assert "In the ledger: set" in page.inner_text("#state")
    page.click("#tab-ledger")
    page.click("#record")
    until(page, "document.getElementById('ledger-state').textContent.includes('filled in')", 90)
    assert "returns that have come" in page.inner_text("#verdicts")
    judged = page.inner_text("#judgements")
    page.route("**/api/ledger", lambda route: route.fulfill(json=route.fetch().json() | {"judgements": []}))
    page.click("#tab-forecast")
    with page.expect_response("**/api/ledger"):
        page.click("#tab-ledger")
    page.wait_for_timeout(100)
    assert page.inner_text("#judgements") == judged


def test_a_store_is_checked(page):
    page.click("#tab-data")
    page.click("#stores button")
    page.wait_for_selector("#check table")
    assert "0 errors" in page.inner_text("#check-state")


def test_theme_and_language_are_chosen_and_kept(page, server: str):
    forecast(page)
    page.select_option("#theme", "dark")
    page.select_option("#language", "zh")
    assert page.inner_text("#ask") == "预测" and page.evaluate("document.documentElement.lang") == "zh"
    until(page, "document.getElementById('chart').layout.paper_bgcolor === '#16181C'")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.inner_text("#tab-market") == "市场"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(22, 24, 28)"
    page.select_option("#theme", "auto")
    until(page, f"{ground} === 'rgb(255, 255, 255)'")
    page.emulate_media(color_scheme="dark")
    until(page, f"{ground} === 'rgb(22, 24, 28)'")


def test_both_languages_have_every_text(page):
    missing = page.evaluate(
        """async () => {
        const found = [], {text} = await import('/page/strings.js');
        for (const language of ['en', 'zh']) {
            document.documentElement.lang = language;
            for (const each of document.querySelectorAll('[data-text], [data-label]'))
                for (const key of [each.dataset.text, each.dataset.label])
                    if (key && text(key) === key) found.push(key);
        }
        return found;
    }"""
    )
    assert missing == []


def test_everything_is_done_with_the_keyboard(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#panel-market")
    page.keyboard.press("End")
    assert page.is_visible("#panel-data")
    page.keyboard.press("Home")
    page.focus("#samples")
    page.keyboard.press("Control+A")
    page.keyboard.type("6")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chart .plot-container")
    page.focus("#csv")
    with page.expect_download():
        page.keyboard.press("Enter")
    page.focus(".skip")
    seen, place = [], "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
    while not page.evaluate("document.activeElement === document.body"):  # as it is after the last element
        seen.append(page.evaluate(place))
        assert len(set(seen)) == len(seen), "nothing holds the focus"
        page.keyboard.press("Tab")
    last = "[...document.querySelectorAll('*')].indexOf(document.querySelector('#snippet-details summary'))"
    assert len(seen) > 30 and seen[-1] == page.evaluate(last), "it reaches the last element"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(page, theme: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.select_option("#theme", theme)
    forecast(page, at="2018-07-02")
    for tab in ("forecast", "market", "runs", "ledger", "data"):
        page.click(f"#tab-{tab}")
        if tab == "runs":
            page.wait_for_selector("#runs-table tbody tr")
        if tab == "market":
            page.fill("#market-samples", "2")
            page.click("#rank")
            page.wait_for_selector("#market-table tbody tr")
        if tab == "ledger":
            page.click("[aria-label^='Open kronos_csi300']")
            page.wait_for_selector("#set table")
        found = axe.run(page).response["violations"]
        told = [(each["id"], [node["target"] for node in each["nodes"]][:3]) for each in found]
        assert told == [], (tab, told)


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    forecast(page, at="2018-07-02")
    for tab in ("forecast", "market", "runs", "ledger", "data"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab


def test_the_token_is_entered_once(browser, tmp_path: Path, market: Path, checkpoint: Path, runs: Place):
    token = "correct-horse-battery"
    for address in serve(tmp_path, market, checkpoint, runs, token):
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector("#token-dialog[open]")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        page.wait_for_selector("#token-dialog[open]")
        page.fill("#token", token)
        page.keyboard.press("Enter")
        until(page, "document.getElementById('instrument').value !== ''")
        page.reload()
        until(page, "document.getElementById('instrument').value !== ''")
        assert not page.is_visible("#token-dialog") and context.cookies() == []
        context.close()


def test_a_server_is_ended_in_the_middle_of_a_forecast(tmp_path: Path, market: Path, checkpoint: Path, runs: Place):
    for address in serve(tmp_path, market, checkpoint, runs):
        question = {"source": "market", "instrument": "DEMO0001", "model": "nano", "samples": 1000, "horizon": 90}
        request = urllib.request.Request(
            f"{address}/api/forecasts", json.dumps(question).encode(), {"Content-Type": "application/json"}
        )
        assert urllib.request.urlopen(request).status == 202
        started = time.monotonic()
    assert time.monotonic() - started < 15
