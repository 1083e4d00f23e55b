"""MFU: the operations that torch counts in a real step, over its seconds and the device's peak."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.runs import build_here, metrics, write_records
from train.config import MODULES, Options, Precision
from train.data.collate import collate
from train.engine.peak import peak_flops, peak_of
from train.families.registry import find
from train.schema import KINDS

RANK = 1
"""Of adapters: what they add, which is left out, is then two percent of this small model's work."""
TEXT = ("model=tiny_instruct", "data=text", "data.eval=[]", "run.max_steps=2", "run.packs_per_step=2", "run.threads=1")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_the_peak_is_the_data_sheets(name: str, tflops: float | None) -> None:
    assert peak_of(name) == tflops


def test_a_known_peak_is_for_bf16_on_a_gpu_and_the_option_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    options = Options()
    assert peak_flops(options, torch.device("cuda", 0)) == 121e12
    assert peak_flops(options, torch.device("cpu")) is None
    options.run.precision = Precision.fp32
    assert peak_flops(options, torch.device("cuda", 0)) is None
    options.run.peak_tflops = 60
    assert peak_flops(options, torch.device("cuda", 0)) == peak_flops(options, torch.device("cpu")) == 60e12


def counted(run: Any) -> float:
    """Operations of the first step, forward and backward, as torch counts them.

    Two things are not needed, and taken off: the future half of the attention, and the logits made twice.
    """
    model = run.trainer.train_step.engine.model.train()
    batches = next(iter(run.trainer.steps_from(0, 0))).batches
    config = run.trainer.train_step.engine.model.config
    passes = 2 if run.options.lora.modules else 3
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(batch=batch).loss_sum.backward()
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches]).double()
    future = 2 * config.hidden_size * config.num_hidden_layers * float((lengths**2).sum()) * passes
    again = 2 * config.vocab_size * config.hidden_size * sum(len(batch.targets) for batch in batches)
    return counter.get_total_flops() - future - again


@pytest.mark.parametrize("tuning", ["none", "lora"])
def test_mfu_is_what_torch_counts_over_time_and_peak(tuning: str, tmp_path: Path) -> None:
    few = [f"lora.rank={RANK}"] if tuning == "lora" else []
    run = build_here([*TEXT, f"lora={tuning}", *few, f"run.dir={tmp_path}", "run.precision=fp32", "run.peak_tflops=2"])
    needed = counted(run)
    run.trainer.train_step.engine.model.zero_grad()
    assert run.trainer.fit()
    lines = metrics(tmp_path)
    assert lines[0]["mfu"] * lines[0]["time/step_s"] * 2e12 == pytest.approx(needed, rel=0.05)
    assert 0 <= lines[0]["time/device_wait_s"] < lines[0]["time/step_s"]


def test_a_cpu_has_no_mfu_of_its_own(tmp_path: Path) -> None:
    run = build_here([*TEXT, "lora=none", f"run.dir={tmp_path}"])
    assert run.trainer.fit()
    assert "mfu" not in metrics(tmp_path)[0]


def test_media_count_too(tmp_path: Path) -> None:
    """The work of the packs at hand, by their own tokens, patches and frames; a pack of nothing needs none."""
    words = [*write_records(tmp_path), "model=tiny", "data.eval=[]", "run.max_steps=1", f"run.dir={tmp_path / 'run'}"]
    run = build_here([*words, "lora=none"])
    batches = next(iter(run.trainer.steps_from(0, 0))).batches
    flops = find(run.base).flops(find(run.base).skeleton(run.base), MODULES)
    expected = 0.0
    for batch in batches:
        lengths = batch.cu_seqlens.diff().double()
        expected += flops.token * float(lengths.sum()) + flops.token_squared * float((lengths**2).sum())
        expected += sum(flops.unit[kind] * batch.units(kind) for kind in KINDS) + flops.head * len(batch.targets)
    assert {kind for batch in batches for kind in batch.media} == set(KINDS)
    assert sum(map(run.trainer.train_step.work, batches)) == pytest.approx(expected)
    assert run.trainer.train_step.work(collate([], [], [])) == 0
