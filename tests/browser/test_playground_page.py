"""The playground in a real browser: Debian's chromium, without a head, driven by Playwright."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from helpers import ROOT, START_SECONDS

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
pytest.importorskip("gradio", reason="needs the package gradio")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium")]

WAIT = 60_000  # milliseconds, for a busy machine
WATCH = """() => {
    window.seen = [];
    new MutationObserver(() => {
        const text = document.querySelector('#shown .text');
        if (text && text.dataset.masks && window.seen.at(-1) !== +text.dataset.masks) {
            window.seen.push(+text.dataset.masks);
        }
    }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def served(tiny_checkpoint, base_dir, tmp_path_factory):
    """The address of a running playground, with an AR base beside it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("playground") / "log"
    command = [sys.executable, "-m", "tools.playground", str(tiny_checkpoint), "--base", str(base_dir("llama"))]
    command += ["--port", str(port), "--max_tokens", "100"]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.3)
        yield address, log
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, served):
    opened = browser.new_page()
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.goto(served[0])
    opened.wait_for_selector("#write", timeout=WAIT)
    opened.evaluate(WATCH)
    yield opened
    opened.close()
    assert not troubles


def write(page, text: str) -> None:
    page.locator("#prompt textarea").fill(text)
    page.click("#write")


def finished(page) -> None:
    page.wait_for_selector('#shown .text[data-masks="0"]', timeout=WAIT)


def test_a_text_is_typed_and_watched_step_by_step(page):
    write(page, "The <b>Fox</b> & a [MASK:7] went to the [MASK:3]")
    finished(page)
    assert page.evaluate("window.seen") == list(range(10, -1, -1)), "every step is seen, once and in order"
    text = page.locator("#shown .text").inner_text()
    assert text.startswith("The <b>Fox</b> & a"), "typed text is shown as text, not run as HTML"
    assert page.locator("#shown .text b").count() == 0
    assert "10 tokens · 10 model calls (NFE) · 1.00 tokens a call" in page.locator("#facts").inner_text()
    page.wait_for_function("document.querySelector('#base_facts').innerText.includes('does not see')", timeout=WAIT)
    assert page.locator("#base .text").inner_text().startswith("The <b>Fox</b> & a")


def test_the_slider_goes_back_to_every_step(page):
    write(page, "Once upon a time [MASK:6]")
    finished(page)
    slider = page.locator("#step input[type=number]")
    last = None
    for step in (0, 1, 3, 6):
        slider.fill(str(step))
        slider.press("Enter")
        page.wait_for_selector(f'#shown .text[data-masks="{6 - step}"]', timeout=WAIT)
        text = page.locator("#shown .text").inner_text()
        assert text.count("░") == 6 - step and text != last
        last = text


def test_colours_are_of_confidence_or_of_the_step(page):
    write(page, "Once upon a time [MASK:5]")
    finished(page)
    colours = "[...document.querySelectorAll('#shown .found')].map(e => e.style.background)"
    first = page.evaluate(colours)
    page.locator("#colour label", has_text="step").click()
    page.wait_for_function("document.querySelector('.legend').innerText.includes('last')", timeout=WAIT)
    second = page.evaluate(colours)
    assert len(first) == len(second) == 5 and first != second and len(set(second)) == 5
    title = page.locator("#shown .found").first.get_attribute("title")
    assert re.fullmatch(r"probability [01]\.\d\d, step \d", title)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MASK:101]", "101 tokens in gaps are more than this page writes at a time (100)"),
        ("x" * 4001, "4,001 characters are more than this page takes (4,000); shorten it"),
        ("The Fox and the Crow. " * 150 + "[MASK:3]", "tokens with the gaps, but the model takes 256"),
    ],
)
def test_a_text_that_is_too_long_is_refused_in_words(page, text, message):
    write(page, text)
    page.wait_for_selector("#facts .trouble", timeout=WAIT)
    assert message in page.locator("#facts").inner_text()
    write(page, "Once [MASK:2]")
    finished(page)
    assert "2 tokens" in page.locator("#facts").inner_text(), "and the page goes on"


def test_contradictory_settings_are_shown_as_text(page):
    page.locator("#steps input").fill("-4")
    write(page, "Once [MASK:2]")
    page.wait_for_selector("#facts .trouble", timeout=WAIT)
    assert "steps is -4, expected a number of steps from 1 on" in page.locator("#facts").inner_text()


def test_an_emptied_control_is_named_and_a_whole_temperature_is_a_number(page):
    page.locator("#steps input").fill("")
    write(page, "Once [MASK:2]")
    page.wait_for_selector("#facts .trouble", timeout=WAIT)
    page.locator("#steps input").fill("0")
    page.locator("#temperature input[type=number]").fill("2")
    write(page, "Once [MASK:3]")
    finished(page)
    assert "3 tokens" in page.locator("#facts").inner_text()


def test_two_users_at_once_see_their_own_texts(browser, served):
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page in pages:
        page.goto(served[0])
        page.wait_for_selector("#write", timeout=WAIT)
        page.evaluate(WATCH)
    for page, text in zip(pages, ("The Fox [MASK:40]", "A Crow [MASK:41]")):
        write(page, text)
    for page, text, count in zip(pages, ("The Fox", "A Crow"), (40, 41)):
        finished(page)
        assert page.evaluate("window.seen") == list(range(count, -1, -1))
        assert page.locator("#shown .text").inner_text().startswith(text)
        page.context.close()


def test_it_listens_to_this_machine_alone(served):
    address, log = served
    port = int(address.rsplit(":", 1)[1].strip("/"))
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = {entry[1] for entry in listening if entry[3] == "0A" and int(entry[1].split(":")[1], 16) == port}
    assert ends == {f"0100007F:{port:04X}"}, "127.0.0.1, and no other address"
    assert "Traceback" not in log.read_text()
