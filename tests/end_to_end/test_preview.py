"""`omnitune preview` in a real browser: what the page says is learned is what `labels` say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import playwright.sync_api as playwright
import pytest
import soundfile
from PIL import Image

from tests.end_to_end.browser import opened
from tests.runs import launch
from train.commands.options import compose_options
from train.preflight.prepare import prepare
from train.schema import IGNORE_INDEX

pytestmark = pytest.mark.end_to_end

HOSTILE = (
    """</span><script>document.title='taken'</script><img src=x onerror="document.title='taken'">"><svg onload=1>"""
)

RECORDS: list[dict[str, Any]] = [
    {
        "type": "turns",
        "conversations": [
            {"role": "user", "content": {"text": "这是什么？", "image": ["wide.png", "small.png"]}},
            {"role": "assistant", "content": "一个红色的圆。😀"},
            {"role": "user", "content": {"audio": "stereo.wav"}},
            {"role": "assistant", "content": "red", "weight": 0.5},
            {"role": "user", "content": "Again?"},
            {"role": "assistant", "content": "not learned", "weight": 0},
        ],
    },
    {
        "type": "llava",
        "image": ["small.png", "wide.png"],
        "conversations": [
            {"from": "human", "value": "Compare <image> and\n<image>."},
            {"from": "gpt", "value": "They\ndiffer."},
        ],
    },
    {
        "type": "<img src=x onerror=alert(1)>",
        "messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}],
    },
    {"type": "long", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xyz " * 2000}]},
    {"conversations": [{"role": "user", "content": {"text": HOSTILE, "image": f"{HOSTILE}.png"}}]},
    {"messages": [{"role": "user", "content": {"audio": "long.wav"}}, {"role": "assistant", "content": "red"}]},
]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("preview")
    shades = np.linspace(0, 255, 3 * 700 * 300).reshape(300, 700, 3).astype(np.uint8)
    Image.fromarray(shades).save(folder / "wide.png")
    Image.new("RGB", (40, 40), "red").save(folder / "small.png")
    tone = 0.4 * np.sin(np.arange(44_100) / 20)
    soundfile.write(folder / "stereo.wav", np.stack([tone, tone], axis=1), 44_100)
    soundfile.write(folder / "long.wav", np.zeros(16_000 * 10, np.float32), 16_000)
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return [
        *("+recipe=full", "tracker=none", "data=files", f"data.train={folder / 'records.jsonl'}", "data.workers=1"),
        *(
            "data.max_tokens=3000",
            "data.too_long=cut_text",
            "data.long_audio=cut",
            "data.cache=null",
            "run.packs_per_step=2",
        ),
    ]


@pytest.fixture(scope="module")
def page(
    browser: "playwright.Browser", words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["playwright.Page"]:
    """The page, opened from its file, on a machine without a network."""
    file = tmp_path_factory.mktemp("page") / "page.html"
    done = launch(["omnitune", "preview", *words, "--out", str(file)], script="-m")
    assert done.returncode == 0, done.stderr
    with opened(browser, file, width=390) as page:
        yield page


def test_the_page_shows_what_labels_say(page: "playwright.Page", words: list[str]) -> None:
    records = prepare(compose_options(words)[0]).sets["data.train"]
    shown = {
        section.get_attribute("data-record"): section.evaluate(
            """section => [...section.querySelectorAll('[data-first]')].map(part => [
                +part.dataset.first, +part.dataset.count, part.classList.contains('learned'), +part.dataset.weight])"""
        )
        for section in page.locator("section.record").all()
    }
    assert set(shown) == {records.name_of(index) for index in (0, 1, 2, 3, 5)}
    for index in (0, 1, 2, 3, 5):
        sample = records.encode(records.record(index))
        learned, weights = [], []
        for first, count, is_learned, weight in shown[records.name_of(index)]:
            assert first == len(learned)
            learned += [is_learned] * count
            weights += [weight] * count
        assert learned == (sample.labels != IGNORE_INDEX).tolist()
        assert weights == sample.loss_weights.tolist()


def test_the_learned_text_is_what_the_assistant_says(page: "playwright.Page") -> None:
    def learned(number: int) -> str:
        spans = page.locator(f"section.record >> nth={number} >> .tokens .learned")
        return "".join(spans.all_inner_texts()).replace("↵", "")

    assert learned(0) == "一个红色的圆。😀<|turn_end|>red<|turn_end|>"
    assert learned(1) == "They\ndiffer.<|turn_end|>"
    assert learned(2) == f"{HOSTILE}<|turn_end|>"
    assert page.title() == "What the model will learn from"


def test_media_are_shown_with_what_became_of_them(page: "playwright.Page") -> None:
    first = page.locator("section.record >> nth=0")
    assert first.locator("figure").count() == 3
    notes = first.locator("figcaption").all_inner_texts()
    assert "700×300 pixels" in notes[0]
    assert "resampled from 44,100 Hz to 16,000 Hz" in notes[2]
    assert "mean of 2 channels" in notes[2]
    heard = first.locator("audio").evaluate(
        """audio => audio.readyState >= 1 ? audio.duration
            : new Promise(done => audio.addEventListener('loadedmetadata', () => done(audio.duration)))"""
    )
    assert heard == pytest.approx(1.0, abs=0.01)
    loaded = page.locator("img").evaluate_all("images => images.map(image => image.complete && image.naturalWidth > 0)")
    assert all(loaded)
    places = first.locator(".tokens .places").all_inner_texts()
    assert len(places) == first.locator("rect").count() + 1
    assert page.locator(".cut").all_inner_texts()[0].endswith("tokens were cut from its end")


def test_what_cannot_be_used_is_listed_and_nothing_overflows(page: "playwright.Page") -> None:
    assert "1 of its records cannot be used" in page.locator(".bad summary").inner_text()
    page.locator(".bad summary").click()
    assert "line 5" in page.locator(".bad li").inner_text()
    assert page.locator(".pack").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_page_that_cannot_be_written(words: list[str], tmp_path: Path) -> None:
    done = launch(["omnitune", "preview", *words, "--out", str(tmp_path / "none" / "p.html")], script="-m")
    assert done.returncode == 1
    assert "p.html' cannot be written" in done.stderr
    assert "name another file" in done.stderr
