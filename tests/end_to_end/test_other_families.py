"""A short run of the other omni families' tiny models: they learn, are exported, evaluated and asked."""

import json
from pathlib import Path

import pytest

from tests.runs import SAMPLE, losses, succeed, write_records
from train.commands.main import main

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module", params=["tiny_qwen_omni", "tiny_gemma4"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["+recipe=full", f"model={request.param}", *write_records(folder, train=40), f"run.dir={folder / 'run'}"]
    succeed([*words, "tracker=none", "data.max_tokens=512", "run.max_steps=40", "run.epochs=40"])
    return folder / "run"


def test_it_learns(run: Path) -> None:
    found = losses(run)
    assert len(found) == 40
    assert sum(found[-4:]) < 0.25 * sum(found[:4])


def test_its_export_is_evaluated_and_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = run / "export"
    assert json.loads((export / "export.json").read_text())["ok"]
    records, said = run.parent / "eval.jsonl", tmp_path / "said.jsonl"
    flags = ["--root", str(SAMPLE), "--max-new-tokens", "8", "--predictions", str(said)]
    main(["evaluate", str(run), str(records), *flags])
    assert len(said.read_text().splitlines()) == 6
    image, clip = SAMPLE / "images/heldout/0001.png", SAMPLE / "audio/heldout/0001.opus"
    asked = ["chat", str(export), "--image", str(image), "--audio", str(clip), "What color is the object?"]
    capsys.readouterr()
    main([*asked, "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip()
