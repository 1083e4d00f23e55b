"""The main job from options to export, and what stands in a run's folder."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

import train.auto  # noqa: F401
from tests.runs import ROOT, SAMPLE, build_here, launch, losses, metrics, succeed, write_records
from train.config import MODULES
from train.export.checkpoint_reader import trained_weights

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    broken = '{"conversations": [{"role": "user", "content": {"text": "?", "image": "lost.png"}}]}\n'
    data = write_records(folder, train=40)
    with (folder / "train.jsonl").open("a") as file:
        file.write(f"\n{broken}")
    succeed(
        [
            "+recipe=full",
            *data,
            f"run.dir={folder / 'run'}",
            "run.max_steps=4",
            "checkpoint.save_every=2",
            "data.max_tokens=256",
        ]
    )
    return folder / "run"


def test_the_folder_holds_what_is_promised(run: Path) -> None:
    names = {path.name for path in run.iterdir() if path.name != ".lock"}
    assert names == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "quarantine.jsonl",
        "checkpoints",
        "initial_model",
        "predictions",
        "report.html",
        "export",
        "wandb",
    }
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["max_steps"] == 4
    assert json.loads((run / "environment.json").read_text())["world_size"] == 1
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def test_metrics_tell_each_step_and_each_evaluation(run: Path) -> None:
    lines = metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert {
        "loss",
        "loss/train",
        "grad_norm",
        "lr/llm",
        "tokens",
        "supervised_tokens",
        "time/data_wait_s",
        "time/device_wait_s",
    } <= set(lines[1])
    assert {"eval/loss", "eval/exact_match", "eval/exact_match/speech", "eval/f1", "eval/f1/speech"} <= set(lines[0])
    assert losses(run)[-1] < losses(run)[0]


def test_predictions_stand_beside_their_references(run: Path) -> None:
    files = sorted((run / "predictions").iterdir())
    assert [file.name for file in files] == ["step-000000.jsonl", "step-000004.jsonl"]
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[1].keys() == {"file", "line", "type", "prompt", "reference", "answer"}
    assert lines[1]["prompt"] == "user: <image>What color is the object?"
    assert lines[1]["reference"] == "red"
    matches = [line["answer"] == line["reference"] for line in lines]
    assert metrics(run)[-1]["eval/exact_match"] == pytest.approx(sum(matches) / 6)


def test_a_bad_record_is_quarantined_and_the_run_goes_on(run: Path) -> None:
    [line] = (run / "quarantine.jsonl").read_text().splitlines()
    note = json.loads(line)
    assert note["line"] == 41
    assert "lost.png" in note["reason"]


def test_auto_classes_load_the_trained_model(run: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run / "export")
    trained = trained_weights(run / "checkpoints" / "step-000004")
    weights = dict(model.named_parameters())
    assert len(trained) == len(weights)
    assert all(weights[name].equal(value) for name, value in trained.items())
    processor = AutoProcessor.from_pretrained(run / "export")
    assert type(processor).__name__ == "MegrezOProcessor"
    report = json.loads((run / "export" / "export.json").read_text())
    assert (report["step"], report["mode"], report["records"], report["ok"]) == (4, "full", 2, True)
    assert report["difference"]["logits"] < 1e-4


def test_the_export_gives_the_trained_models_logits(tmp_path: Path) -> None:
    data = write_records(tmp_path)
    here = build_here(["+recipe=full", *data, f"run.dir={tmp_path / 'run'}", "run.max_steps=2", "eval.generate=false"])
    here.trainer.fit()
    model = here.trainer.train_step.engine.model.eval()
    fetched = next(iter(here.trainer.steps_from(0, 0)))
    exported = AutoModelForCausalLM.from_pretrained(here.export()).eval()
    with torch.no_grad():
        assert exported.logits(fetched.batches[0]).equal(model.logits(fetched.batches[0]))


def test_an_export_lets_the_model_go_first(tmp_path: Path) -> None:
    data = write_records(tmp_path)
    here = build_here(["+recipe=full", *data, f"run.dir={tmp_path / 'run'}", "run.max_steps=1", "eval.generate=false"])
    here.trainer.fit()
    engine = here.trainer.train_step.engine
    parameters = [weakref.ref(parameter) for parameter in engine.model.parameters()]
    states = [state for optimizer in engine.optimizers.optimizers for state in optimizer.state.values()]
    moments = [weakref.ref(value) for state in states for value in state.values()]
    del engine, states
    assert len(moments) > len(parameters)
    here.export()
    assert not [held for held in (*parameters, *moments) if held() is not None]


def test_export_from_a_checkpoint_equals_the_runs_own(run: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "train.commands.main",
        "export",
        str(run),
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    mine, its = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "export"))
    assert mine.keys() == its.keys()
    assert all(mine[name].equal(its[name]) for name in mine)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in (run / "export").iterdir()}


def test_chat_answers(run: Path) -> None:
    command = [
        *(sys.executable, "-m", "train.commands.main", "chat", str(run / "export")),
        *(
            "--image",
            str(SAMPLE / "images/heldout/0001.png"),
            "--audio",
            str(SAMPLE / "audio/heldout/0001.opus"),
        ),
        *("What color is the object?", "--max-new-tokens", "4"),
    ]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.endswith("\n")


def test_a_resumed_run_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    whole = losses(run)
    data = [f"data.{name}=[{{path: {run.parent / name}.jsonl, root: {SAMPLE}}}]" for name in ("train", "eval")]
    words = [
        "+recipe=full",
        *data,
        "data.max_tokens=256",
        "run.max_steps=4",
        "tracker=none",
        "checkpoint.save_every=2",
    ]
    checkpoint = run / "checkpoints" / "step-000002"
    succeed([*words, f"run.dir={tmp_path / 'again'}", f"run.resume={checkpoint}"])
    assert losses(tmp_path / "again") == whole[2:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.max_step=3"], "there is no option 'run.max_step'; did you mean run.max_steps?"),
        (["+run.max_step=3"], "there is no option 'run.max_step'; did you mean run.max_steps?"),
        (["lora.rank=16"], "lora.rank is set, but lora.modules is empty, so all would learn in full; add lora=lora"),
        (["run.dir=pyproject.toml/run"], "run.dir: 'pyproject.toml/run' cannot be made or written to"),
        (["run.max_steps=many"], "Value 'many' of type 'str' could not be converted to Integer"),
        (["data.train=[{path: missing.jsonl}]"], "data.train[0].path: there is no file 'missing.jsonl'"),
        (["model.path=data/tiny"], "'data/tiny' has no weights (*.safetensors)"),
        (["+recipe=lora", "modules.tune_llm=false"], "LoRA has nothing to adapt"),
        ([f"modules.tune_{name}=false" for name in MODULES], "nothing is tuned: set at least one of"),
    ],
)
def test_a_fault_is_one_clear_message(words: list[str], said: str) -> None:
    done = launch(words)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_goes_on_from_anothers_export(tmp_path: Path) -> None:
    words = [*write_records(tmp_path), "run.max_steps=2", "data.max_tokens=256", "tracker=none", "eval.generate=false"]
    succeed(["+recipe=align", *words, f"run.dir={tmp_path / 'align'}"])
    succeed(["+recipe=full", *words, f"run.dir={tmp_path / 'full'}", f"model.path={tmp_path / 'align' / 'export'}"])
    assert metrics(tmp_path / "full")[0]["eval/loss"] == metrics(tmp_path / "align")[-1]["eval/loss"]
    assert not (tmp_path / "full" / "initial_model").exists()
