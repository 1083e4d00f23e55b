"""`omnitune demo` in a real browser: Chromium without a window, on a page that may load nothing from elsewhere."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gradio
import playwright.sync_api as playwright
import pytest

from tests.runs import ROOT, SAMPLE, clean_environment, write_endless_model
from train.inference.demo import said

pytestmark = pytest.mark.end_to_end

TOKENS = 60
PATIENCE_MS = 120_000
IMAGE = SAMPLE / "images/heldout/0001.png"
CLIP = SAMPLE / "audio/heldout/0001.opus"

WATCH = """() => {
    window.texts = [];
    new MutationObserver(() => {
        const last = [...document.querySelectorAll('[data-testid=bot]')].pop();
        if (last && last.textContent !== window.texts.at(-1)) window.texts.push(last.textContent);
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def address(browser: "playwright.Browser", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A served page whose model, drawn at random, says random words until its tokens are spent."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["-u", "-m", "train.commands.main", "demo", str(write_endless_model(folder)), "--temperature", "1.5"]
    log = folder / "log.txt"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [sys.executable, *words, "--max-new-tokens", str(TOKENS)],
            cwd=ROOT,
            env=clean_environment() | {"GRADIO_TEMP_DIR": str(folder / "uploads")},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        while not (found := re.search(r"http://127\.0\.0\.1:[0-9]+", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        yield found[0]
        server.terminate()
    assert "Traceback" not in log.read_text(), log.read_text()


class Page:
    """What a user does on the page."""

    def __init__(self, page: "playwright.Page"):
        self.page = page
        self.answers = page.locator("[data-testid=bot]")
        self.box = page.get_by_role("group", name="Multimedia input field").get_by_role("textbox")

    def ask(self, text: str, *files: Path) -> None:
        playwright.expect(self.page.get_by_test_id("submit-button")).to_be_visible()
        if files:
            self._attach(files)
        self.box.fill(text)
        self.box.press("Enter")

    def _attach(self, files: tuple[Path, ...]) -> None:
        """Choose files; once more where the box, which is cleared after each answer, was cleared of them too."""
        shown = playwright.expect(self.page.locator(".thumbnails .thumbnail-item"))
        for attempts_left in (2, 1, 0):
            with self.page.expect_file_chooser() as chooser:
                self.page.get_by_test_id("upload-button").click()
            chooser.value.set_files(files)
            try:
                shown.to_have_count(len(files), timeout=30_000)
                return
            except AssertionError:
                if not attempts_left:
                    raise

    def answered(self, count: int) -> str:
        """The newest of `count` answers, when it is complete."""
        playwright.expect(self.answers).to_have_count(count)
        playwright.expect(self.page.get_by_test_id("submit-button")).to_be_visible()
        return self.answers.last.inner_text()


@pytest.fixture(scope="module")
def page(browser: "playwright.Browser", address: str) -> Iterator[Page]:
    """The page, on a machine without a network."""
    outside: list[str] = []

    def local_alone(route: "playwright.Route") -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    playwright.expect.set_options(timeout=PATIENCE_MS)
    opened = browser.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    opened.route("**/*", local_alone)
    opened.goto(address)
    yield Page(opened)
    opened.close()
    assert outside == []


def test_a_conversation_with_media(page: Page) -> None:
    page.page.evaluate(WATCH)
    page.ask("What color is the object?", IMAGE, CLIP)
    assert page.answered(1)
    assert len(set(page.page.evaluate("window.texts"))) > 3  # it came in pieces
    page.ask("And what shape is it?")
    assert page.answered(2)


def test_a_broken_file_costs_its_question_alone(page: Page, tmp_path: Path) -> None:
    before = page.answers.count()
    broken = tmp_path / "broken.png"
    broken.write_text("This is no image.")
    page.ask("What is it?", broken)
    notice = page.answered(before + 1)
    assert "This cannot be answered" in notice
    assert "image 'broken.png': it begins with b'This is no i', which is no intact JPEG" in notice
    page.ask("And now?")
    assert "cannot be answered" not in page.answered(before + 2)


def test_an_answer_can_be_stopped(page: Page) -> None:
    before = page.answers.count()
    most = page.page.get_by_label("number input for Tokens")
    page.page.get_by_text("System prompt and sampling").click()
    most.fill("4000")
    most.press("Tab")
    page.ask("Tell me more.")
    playwright.expect(page.answers).to_have_count(before + 1)
    page.page.locator("button.stop-button").click()
    stopped = page.answered(before + 1)
    most.fill("20")
    most.press("Tab")
    page.ask("Shorter.")
    assert page.answered(before + 2)
    assert page.answers.nth(before).inner_text() == stopped


def test_the_model_is_told_what_was_said() -> None:
    """Turns with their media, without the question that ended in a notice."""
    bot = gradio.Chatbot()
    history = [
        {"role": "user", "content": [{"path": "a.png"}, {"path": "b.opus"}, "What?", "Who?"]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"path": "broken.png"}]},
        {"role": "assistant", "content": "It is broken.", "metadata": {"title": "This cannot be answered"}},
    ]
    assert said(bot.preprocess(bot.postprocess(history))) == [
        {"role": "user", "content": {"text": "What?\nWho?", "image": ["a.png"], "audio": ["b.opus"]}},
        {"role": "assistant", "content": {"text": "A cat.", "image": [], "audio": []}},
    ]
