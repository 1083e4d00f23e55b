"""A certificate passes for every family; a fault planted in one promise fails its line, and no other."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.runs import ROOT, build_here, forget_accelerator, write_small_model, write_small_qwen_omni
from tests.unit.data.builders import png, wav
from train.certificate.certify import certify
from train.certificate.exported import EXPORT, TRANSFORMERS, VLLM, export_lines
from train.certificate.gradients import MICRO_BATCHES, PACKED
from train.certificate.lines import Line, table
from train.certificate.resumed import FROZEN, RESUMED
from train.commands.main import main
from train.commands.options import read_options
from train.engine import build as building
from train.engine.engines import Engine
from train.engine.state import WholeState
from train.engine.step import TrainStep
from train.export.checkpoint_reader import MOMENTS
from train.families.registry import find
from train.modules.attention import Segments
from train.modules.packed import PackedModel
from train.run_folder import RunFolder
from train.sources import load_processor, open_records

put_back: list[Any] = []
"""What is called after a test that changed files."""

NAMES = [PACKED, MICRO_BATCHES, RESUMED, FROZEN, EXPORT, TRANSFORMERS, VLLM]
LORA = ["lora=lora", "lora.rank=2", "modules.tune_vision_encoder=false", "modules.tune_audio_encoder=false"]


def write_small_text_model(folder: Path, name: str) -> Path:
    model = folder / "model"
    shutil.copytree(ROOT / "data" / name, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    (model / "config.json").write_text(json.dumps(config))
    return model


def write_records(folder: Path, *, media: bool) -> Path:
    """Eight records of unequal length; with images, clips, both and neither."""
    lines = []
    for number in range(8):
        content: dict[str, Any] = {"text": f"What is this, and why {'so very ' * number}?"}
        if media and number % 2:
            (folder / f"{number}.png").write_bytes(png(28 + 9 * number, 40, color=(20 * number, 90, 30)))
            content["image"] = f"{number}.png"
        if media and number % 4 > 1:
            (folder / f"{number}.wav").write_bytes(wav(0.3 + 0.1 * number))
            content["audio"] = f"{number}.wav"
        answer = " ".join(["red", "blue", "a kettle"][: 1 + number % 3])
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"conversations": turns}))
    file = folder / "records.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def finished_run(folder: Path, model: Path, *words: str, media: bool) -> RunFolder:
    run = build_here(
        [
            *(f"model={model.parent.name}", f"model.random_from={model}", "data=files", "data.eval=[]"),
            *(f"data.train={write_records(folder, media=media)}", "data.max_tokens=512", "data.cache=null"),
            *("run.max_steps=2", "run.epochs=2", "run.packs_per_step=2", f"run.dir={folder / 'run'}", *words),
        ]
    )
    run.trainer.fit()
    run.export()
    forget_accelerator()
    return run.folder


def certificate(run: RunFolder) -> dict[str, Line]:
    forget_accelerator()
    return {line.name: line for line in certify(read_options(run.config), run)}


def outcome(lines: dict[str, Line]) -> dict[str, bool | None]:
    return {name: line.passed for name, line in lines.items()}


@pytest.fixture(scope="module", autouse=True)
def light_garbage() -> Iterator[None]:
    """Each trial collects garbage several times; nothing that was there before is looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Adapters beside projectors that learn in full; both encoders are frozen."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    return finished_run(folder, write_small_model(folder), *LORA, media=True)


@pytest.mark.parametrize("family", ["tiny", "tiny_instruct", "tiny_minicpm", "tiny_qwen_omni"])
def test_it_passes_for_every_family(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    folder.mkdir()
    if family == "tiny":
        model = write_small_model(folder)
    elif family == "tiny_qwen_omni":
        model = write_small_qwen_omni(folder)
    else:
        model = write_small_text_model(folder, family)
    run = finished_run(folder, model, media=family in ("tiny", "tiny_qwen_omni"))
    lines = certificate(run)
    assert list(lines) == NAMES
    assert {name for name, line in lines.items() if line.passed is False} == set(), table(list(lines.values()))
    for name in (PACKED, MICRO_BATCHES):
        assert 0 < (lines[name].figure or 0) < 1e-5
    assert lines[RESUMED].figure == 0.0
    if family.startswith(("tiny_instruct", "tiny_minicpm")):
        assert lines[FROZEN].why == "nothing is frozen"
    assert lines[EXPORT].passed
    said = json.loads(run.certificate.read_text())
    assert [line["name"] for line in said["lines"]] == NAMES
    assert set(said["lines"][0]) == {"name", "figure", "tolerance", "passed", "why"}
    assert said["step"] == 2
    assert not list(run.path.glob(".certify-*"))


def test_the_command_prints_a_table_and_ends_well(lora_run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    forget_accelerator()
    with pytest.raises(SystemExit) as ended:
        main(["certify", str(lora_run.path)])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    heading, *rows = said.splitlines()
    assert heading.split() == ["figure", "tolerance"]
    assert [row.startswith(name) for row, name in zip(rows, NAMES, strict=False)] == [True] * 7
    assert rows[3].split("  ")[0] == FROZEN
    assert "passed" in rows[3]
    assert len({row.index("passed") for row in rows if "passed" in row}) == 1


def leak(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """Each token of a pack sees all before it, of other records too."""

    class OneSegment(Segments):
        @classmethod
        def of_cu_seqlens(cls, cu_seqlens: torch.Tensor, device: torch.device) -> Segments:
            return Segments.of([int(cu_seqlens[-1])], device)

    monkeypatch.setattr("train.modules.packed.Segments", OneSegment)


def mean_of_micro_batches(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """The loss is the mean of the micro-batches' means, as in the published example."""
    whole = TrainStep.__call__

    def counted(self: TrainStep, step: int, batches: Any, bad_records: int = 0) -> Any:
        self.number = len(batches)  # type: ignore[attr-defined]
        return whole(self, step, batches, bad_records)

    def mean(self: TrainStep, batch: Any, weight: float, *, is_last: bool) -> torch.Tensor:
        loss = self.objective.loss(self.engine.model, batch)
        own = self.number * self.objective.weight(batch)  # type: ignore[attr-defined]
        self.engine.backward(loss.total / own, is_last=is_last)
        return loss.each

    monkeypatch.setattr(TrainStep, "__call__", counted)
    monkeypatch.setattr(TrainStep, "_forward_backward", mean)


def forgotten_moment(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """The mean of squared gradients is not restored."""
    load = WholeState._load

    def without(self: WholeState, saved: Any, kinds: tuple[str, ...]) -> None:
        load(self, saved, kinds)
        for parameter in self.parameters.values():
            state = self.optimizers.state_of(self.masters[parameter])
            if MOMENTS[1] in state:
                state[MOMENTS[1]].zero_()

    monkeypatch.setattr(WholeState, "_load", without)


def moved_frozen_weights(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """What is frozen is rounded on the way into the engine."""
    make = building._make_engine

    def rounding(options: Any, accelerator: Any, model: Any, groups: Any) -> Engine:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        return make(options, accelerator, model, groups)

    monkeypatch.setattr(building, "_make_engine", rounding)


def tensor_off(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """One value of one tensor of the export is not what was trained."""
    [file] = run.export.glob("*.safetensors")
    tensors = load_file(file)
    kept = file.read_bytes()
    tensors["llm.model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    put_back.append(lambda: file.write_bytes(kept))


def other_logits(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> None:
    """What answers are computed by here is not what transformers computes."""
    logits = PackedModel.logits
    calls = iter(range(1000))
    monkeypatch.setattr(PackedModel, "logits", lambda self, batch: logits(self, batch) * (1 + 1e-3 * (next(calls) % 2)))


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        (leak, PACKED),
        (mean_of_micro_batches, MICRO_BATCHES),
        (forgotten_moment, RESUMED),
        (moved_frozen_weights, FROZEN),
        (tensor_off, EXPORT),
        (other_logits, TRANSFORMERS),
    ],
)
def test_a_fault_fails_its_line_and_no_other(
    plant: Any, line: str, lora_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lora_run)
    try:
        lines = certificate(lora_run)
    finally:
        while put_back:
            put_back.pop()()
    expected = dict.fromkeys(NAMES, True) | {VLLM: None} | {line: False}
    assert outcome(lines) == expected, table(list(lines.values()))


def test_what_is_not_there_is_skipped(lora_run: RunFolder, tmp_path: Path) -> None:
    """A run that was stopped before its end has no export yet."""
    options = read_options(lora_run.config)
    records = open_records(options, options.data.train, load_processor(options, find(lora_run.export), lora_run.export))
    lines = export_lines(options, lora_run.initial_model, RunFolder(tmp_path), records)
    assert [(line.name, line.passed) for line in lines] == [(EXPORT, None), (TRANSFORMERS, None), (VLLM, None)]
    assert "there is no export yet" in lines[0].why


def test_a_table_is_aligned() -> None:
    lines = [Line("a", 1e-7, 1e-5, True, "x"), Line("longer", None, None, None, "y"), Line("b", 2.0, 0.0, False, "z")]
    assert table(lines).splitlines() == [
        "        figure  tolerance",
        "a        1e-07      1e-05  passed   x",
        "longer       -          -  skipped  y",
        "b            2          0  FAILED   z",
    ]
