"""A family is one folder and one registration: `fourth` goes the whole path of a run."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.runs import ROOT, build_here, losses
from tests.unit.families.fourth import FOURTH
from train.families import registry

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
NOT_THERE = ("tune_audio_encoder", "tune_audio_proj")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model of the fourth family, without weights; the family is registered."""
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, FOURTH])
    folder = tmp_path / "settings"
    shutil.copytree(ROOT / "data" / "tiny_instruct", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "fourth", "architectures": ["FourthForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_fourth_family_trains_and_is_exported(settings: Path, tmp_path: Path) -> None:
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
        turns = [{"role": "user", "content": {"image": f"{name}.png", "text": "Which?"}}]
        lines.append(json.dumps({"conversations": [*turns, {"role": "assistant", "content": name}]}))
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    run = build_here(
        [
            *("model=tiny", f"model.random_from={settings}", "data=files", "run.max_steps=2", "run.epochs=2"),
            *(f"data.train=[{{path: {tmp_path}/records.jsonl}}]", f"run.dir={tmp_path}/run", "data.cache=null"),
            *(f"modules.{name}=false" for name in NOT_THERE),
        ]
    )
    assert run.trainer.fit()
    assert len(losses(tmp_path / "run")) == 2
    export = run.export()
    assert json.loads((export / "export.json").read_text())["ok"]
    assert registry.find(export) is FOURTH
