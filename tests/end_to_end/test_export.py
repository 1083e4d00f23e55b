"""What was trained, its export here, and its export with its own code where this project is not: they agree.

The last one runs in an environment that `tests/environments.sh plain` makes.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train.auto  # noqa: F401
from tests.end_to_end import agreement
from tests.runs import (
    SAMPLE,
    build_here,
    clean_environment,
    environment_python,
    trained_model,
    write_records,
    write_small_model,
)
from train.commands.main import main as omnitune
from train.engine.build import Run
from train.export.model_folder import write_random_model

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(1200)]

RECIPES = {"full": ["+recipe=full"], "lora": ["+recipe=lora", "lora.dropout=0"]}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def words(folder: Path, out: str) -> list[str]:
    return [
        *write_records(folder, train=16, held_out=2),
        f"run.dir={folder / out}",
        "run.max_steps=2",
        "checkpoint.save_every=0",
        "data.max_tokens=256",
        "optim.warmup_ratio=0",
        "eval.generate=false",
    ]


@pytest.fixture(scope="module")
def plain() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the Python of an environment of torch, transformers, Pillow and soundfile alone, in an empty folder."""
    python = environment_python("plain")

    def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = clean_environment() | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        command = [str(python), *map(str, arguments)]
        return subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where each recipe's run lies."""
    return {name: tmp_path_factory.mktemp(name) / "run" for name in RECIPES}


@pytest.fixture(scope="module")
def said(
    plain: Callable, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By recipe, what the trained model says, its export, and its export in the plain environment."""
    found: dict[str, dict[str, Any]] = {}
    for name, recipe in RECIPES.items():
        folder = folders[name]
        run = build_here([*recipe, *words(folder.parent, "run"), "run.precision=fp32", "export.with_code=true"])
        run.trainer.fit()
        trained = trained_model(run)
        run.export()
        processor = run.records.processor
        exported = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
        found[name] = {
            "trained": agreement.answers(trained, processor, agreement.held_out()),
            "exported": agreement.answers(exported, processor, agreement.held_out()),
        }
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    exports = {name: folder / "export" for name, folder in folders.items()}
    done = plain(elsewhere, agreement.__file__, elsewhere / "said.json", *exports.values())
    assert done.returncode == 0, done.stderr[-3000:]
    there = json.loads((elsewhere / "said.json").read_text())
    assert not {"train", "soxr", "av", "peft", "accelerate", "hydra"} & set(there["modules"])
    for name, export in exports.items():
        found[name]["plain"] = there[str(export)]
    return found


@pytest.mark.parametrize("where", ["exported", "plain"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_export_says_what_the_trained_model_says(recipe: str, where: str, said: dict[str, dict[str, Any]]) -> None:
    assert len(said[recipe]["trained"]) == 20
    for expected, found in zip(said[recipe]["trained"], said[recipe][where], strict=True):
        assert found["prompt"] == expected["prompt"]
        assert found["greedy"] == expected["greedy"]
        assert len(expected["greedy"]) == agreement.NEW_TOKENS
        assert found["log_probabilities"] == pytest.approx(expected["log_probabilities"], abs=1e-4)


CHAT = """
import sys, numpy, soundfile
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
def ask(audio):
    content = {"text": "What color is the object?", "image": sys.argv[2], "audio": audio}
    return model.chat([{"role": "user", "content": content}], sampling=False, max_new_tokens=4, temperature=0)
print(repr(ask(sys.argv[3])))
soundfile.write("telephone.wav", numpy.zeros(8000), 8000)
try:
    ask("telephone.wav")
except ValueError as error:
    print(error)
"""


def test_chat_needs_this_project_as_little(
    said: dict[str, Any], folders: dict[str, Path], plain: Callable, tmp_path: Path
) -> None:
    image, recording = SAMPLE / "images/heldout/0001.png", SAMPLE / "audio/heldout/0001.opus"
    done = plain(tmp_path, "-c", CHAT, folders["full"] / "export", image, recording)
    assert done.returncode == 0, done.stderr[-3000:]
    answer, refusal = done.stdout.splitlines()
    content = {"text": "What color is the object?", "image": str(image), "audio": str(recording)}
    here = AutoModelForCausalLM.from_pretrained(folders["full"] / "export").eval()
    assert answer == repr(here.chat([{"role": "user", "content": content}], max_new_tokens=4))
    assert "it has 8000 samples a second, and soxr, which would resample it, is not installed" in refusal
    assert "`pip install soxr`" in refusal


def test_the_command_checks_by_other_records_where_the_runs_are_gone(
    said: dict[str, Any], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folders["lora"]
    held_out = (run.parent / "eval.jsonl").rename(tmp_path / "moved.jsonl")
    words = ["export", str(run), "--out", str(tmp_path / "out"), "--with-code"]
    with pytest.raises(SystemExit, match=r"there is no file '.*eval.jsonl'; name one with --data"):
        omnitune(words)
    omnitune([*words, "--data", str(held_out), "--root", str(SAMPLE)])
    assert "exported" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert (report["mode"], report["step"], report["records"], report["ok"]) == ("lora, merged", 2, 2, True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in (run / "export").iterdir()}
    with pytest.raises(SystemExit, match="is there already"):
        omnitune([*words, "--data", str(held_out), "--root", str(SAMPLE)])


def published(folder: Path) -> Path:
    """A small base as it would be published: bfloat16 in two shards, code for another transformers, foreign files."""
    random = folder / "random"
    write_random_model(write_small_model(folder), random, seed=0)
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(random / "model.safetensors").items()}
    (random / "model.safetensors").unlink()
    base = random.rename(folder / "published")
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(weights)}
    for shard in SHARDS:
        save_file(
            {name: weights[name] for name in weights if weight_map[name] == shard}, base / shard, {"format": "pt"}
        )
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in ("config.json", "preprocessor_config.json"):
        classes = {
            "AutoModelForCausalLM": "modeling_megrezo.MegrezO",
            "AutoProcessor": "processing_megrezo.MegrezOProcessor",
        }
        settings = json.loads((base / name).read_text()) | {"auto_map": classes, "dtype": "bfloat16", "foreign": [1, 2]}
        (base / name).write_text(json.dumps(settings))
    (base / "modeling_megrezo.py").write_text("raise ImportError('this is for another transformers')\n")
    (base / "assets").mkdir()
    (base / "assets" / "logo.bin").write_bytes(b"\0\1")
    return base


def test_a_published_layout_comes_out_as_it_went_in(tmp_path: Path) -> None:
    base = published(tmp_path)
    how = ["+recipe=lora", "lora.modules=[llm]", "modules.tune_vision_proj=false", "modules.tune_audio_proj=false"]
    run: Run = build_here([*how, *words(tmp_path, "run"), f"model.path={base}", "run.precision=bf16"])
    run.trainer.fit()
    export = run.export()

    own = {"export.json", "adapter"}
    assert {path.name for path in export.iterdir()} == {path.name for path in base.iterdir()} | own
    for file in base.rglob("*"):
        if file.is_file() and file.name not in SHARDS:
            assert (export / file.relative_to(base)).read_bytes() == file.read_bytes()
    changed = 0
    for shard in SHARDS:
        before, after = load_file(base / shard), load_file(export / shard)
        assert list(after) == list(before)
        for name, value in after.items():
            assert value.dtype == torch.bfloat16
            is_adapted = name.startswith("llm.model.layers") and "norm" not in name
            assert is_adapted or value.equal(before[name])
            changed += not value.equal(before[name])
    assert changed == 2 * 7
    report = json.loads((export / "export.json").read_text())
    assert report["ok"]
    assert report["dtype"] == "bfloat16"
