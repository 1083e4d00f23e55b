"""The plan's memory: summed as torch's own tracker sums it, shared out as the engines do."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from tests.builders import make_batch, mixed_samples
from tests.runs import SAMPLE, forget_accelerator, write_records, write_small_model
from train.commands.main import main
from train.commands.options import compose_options
from train.config import Engine, Options
from train.families.registry import find
from train.modules.objectives import NextToken
from train.preflight import memory
from train.preflight.memory import measure_step
from train.preflight.plan import GIB, gpu_memory

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    "mid-size": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "vocab_size": 8_000},
}


def model_of(size: str, folder: Path) -> Path:
    model = write_small_model(folder)
    config = json.loads((model / "config.json").read_text())
    config |= SIZES[size]
    config["audio_config"]["output_dim"] = config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    return model


def options_of(model: Path, *words: str) -> Options:
    return compose_options([f"model.random_from={model}", "engine=none", *words])[0]


def batch_of(model: Path):
    return make_batch(mixed_samples(find(model).config(model)))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("tiny", []),
        ("tiny", ["run.activation_checkpointing=full"]),
        ("mid-size", ["engine=zero2", "run.precision=bf16"]),
    ],
)
def test_bytes_are_those_of_torchs_own_tracker(
    size: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_ROUND", 1)  # as the tracker counts on a CPU
    model = model_of(size, tmp_path)
    batch = batch_of(model)
    options = options_of(model, *words)
    found = measure_step(options, find(model), model, batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake = memory._fake_model(options, find(model), model, mode)
    inputs = memory._fake_batch(batch, mode)
    trained = list(fake.parameters())
    tracker = MemTracker()
    tracker.track_external(*trained)
    with tracker:
        masters = None if "engine=zero2" in words else memory._masters(options, trained, mode)
        for _ in range(2):
            loss = NextToken().loss(fake, inputs)
            loss.total.backward()
            del loss
            tracker.reset_mod_stats()  # else it refuses a second call
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert (masters is None) == ("engine=zero2" in words)
    assert found.peak == pytest.approx(peak, rel=0.01)


def test_weights_and_gradients_by_hand(tmp_path: Path) -> None:
    model = model_of("mid-size", tmp_path)
    skeleton = find(model).skeleton(model)
    values = sum(parameter.numel() for parameter in skeleton.parameters())
    buffers = sum(buffer.nbytes for buffer in skeleton.buffers())
    # bytes of a weight, of a master weight kept apart, of a gradient
    for words, (weight, master, gradient) in (
        (["run.precision=fp32"], (4, 0, 4)),
        (["run.precision=bf16"], (2, 4, 4)),
        (["engine=zero2"], (2, 0, 2)),
    ):
        found = measure_step(options_of(model, "run.precision=bf16", *words), find(model), model, batch_of(model))
        assert found.weights == pytest.approx(weight * values + buffers, rel=0.01)
        assert found.masters == pytest.approx(master * values, rel=0.01)
        assert found.gradients == pytest.approx(gradient * values, rel=0.01)
        assert found.trained == values
        assert found.activations > 0


def test_engines_share_out_what_they_say() -> None:
    one = memory.Measured(
        weights=2 * GIB,
        masters=0,
        gradients=2 * GIB,
        peak=5 * GIB,
        trained=GIB,
        largest_group=GIB // 2,
        by_muon=GIB // 2,
        quantizable=GIB // 2,
    )
    options = compose_options([])[0]

    def parts(engine: str, gpus: int) -> list[float]:
        changed = deepcopy(options)
        changed.engine.name = Engine(engine)
        made = gpu_memory(changed, one, gpus)
        return [made.weights, made.optimizer, made.gradients, made.activations, made.update]

    assert parts("none", 1) == [2, 8, 2, 1, 0]
    assert parts("ddp", 4) == [2, 8, 2, 1, 0]
    assert parts("zero1", 4) == [2, 3, 2, 1, 0.5]
    assert parts("zero2", 4) == [2, 3, 0.5, 1, 0.5]
    assert parts("zero2_offload", 4) == [2, 0, 0.5, 1, 0]
    gathered = 2 * 10**9 / GIB
    assert parts("zero3", 4) == pytest.approx([0.5 + gathered, 3, 0.5, 1, 0.5])
    options.lora.load_in_4bit = True
    options.run.precision = type(options.run.precision).bf16
    nf4 = 0.5 + 1 / 64 + 4 / (64 * 256)
    assert parts("none", 1)[0] == pytest.approx(2 - 0.5 * (2 - nf4))
    made = gpu_memory(options, replace(one, peak=4 * GIB), 1)
    assert made.total == pytest.approx(made.tensors * 1.07 + 0.82)


def test_the_command_says_what_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=files", f"data.train=[{{path: {SAMPLE / 'heldout.jsonl'}}}]", "data.workers=0", "tracker=none"]
    main(["plan", *words, "data.max_tokens=1024", "data.cache=null", "run.epochs=1", "--mfu", "0.4"])
    said = capsys.readouterr().out
    assert "activations and loss, largest pack" in said
    assert "at an MFU of 40 % (given)" in said
    # 19,478 tokens in packs of at most 1,024
    assert "work: 20 steps, 19,478 tokens" in said
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--gpus", "0"])
    assert "--gpus is 0; it must be at least 1" in str(ended.value.code)


def test_three_real_steps_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget_accelerator()
    model = write_small_model(tmp_path)
    words = [f"model.random_from={model}", *write_records(tmp_path), "engine=none", "data.workers=0"]
    main(["plan", *words, "data.max_tokens=256", "run.packs_per_step=1", "tracker=none", "--measure"])
    said = capsys.readouterr().out
    steps, whole = re.search(r"work: (\d+) steps, .*; (\S+) seconds, measured", said).groups()  # type: ignore[union-attr]
    assert float(re.search(r"at its peak +(\S+) GiB", said)[1]) > 0.1  # type: ignore[index]
    seconds = float(re.search(r"a step +(\S+) s", said)[1])  # type: ignore[index]
    # packs are about equally full
    assert float(whole) == pytest.approx(int(steps) * seconds, rel=0.5)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--measure", "--gpus", "2"])
    assert "--measure runs the steps here" in str(ended.value.code)
