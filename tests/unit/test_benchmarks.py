"""The benchmarks run, write what they promise, and compare ways that give the same loss and gradients."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import make_batch, media_of, mixed_samples, tiny_megrezo

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = ("measure", "workload", "plain", "step", "data", "loss", "dummies", "resume")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of benchmarks/ by its short name, as a script there does; leaves no trace of it."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = {name: sys.modules.pop(name, None) for name in OURS}
    yield importlib.import_module
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module:
            sys.modules[name] = module
    torch.set_num_threads(threads)


def figures(module: ModuleType, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a script writes as JSON."""
    file = tmp_path / "figures.json"
    module.main([*arguments, "--json", str(file)])
    written = json.loads(file.read_text())
    assert set(written.pop("setting")) == {"device", "cores", "torch", "date"}
    return written


def test_step_reports_every_way(load: Any, tmp_path: Path) -> None:
    written = figures(load("step"), tmp_path, "--size", "tiny", "--packs", "1", "--peak-tflops", "1")
    assert set(written) == {
        *("size", "records", "tokens", "supervised_tokens", "patches", "frames", "ways", "mfu"),
    }
    assert [row["way"] for row in written["ways"]] == list(load("step").WAYS)
    for row in written["ways"]:
        assert set(row) == {
            *("way", "seconds", "supervised_tokens_per_s", "speed_ratio", "promised_ratio"),
            *("share_of_promise", "tflop", "peak_gib", "loss"),
        }
        assert row["loss"] == pytest.approx(written["ways"][0]["loss"], rel=1e-5)
    assert 0.97 * 4096 < written["tokens"] <= 4096


def test_data_reports_its_figures(load: Any, tmp_path: Path) -> None:
    heldout = BENCHMARKS.parent / "data/sample/heldout.jsonl"
    few = ["--decoded", "10", "--planned", "4000", "--texts", "100", "--times", "2"]
    written = figures(load("data"), tmp_path, "--records", str(heldout), *few)
    assert set(written) >= {
        *("headers_records_per_s", "headers_cached_records_per_s", "decode_records_per_s", "doctor_records_per_s"),
        *("cores", "wall_one_process_records_per_s", "wall_all_cores_records_per_s"),
        *("wall_all_cores_first_start_records_per_s", "wall_all_cores_cached_records_per_s"),
        *("texts", "texts_records_per_s", "resident_measuring_mib", "resident_planning_mib"),
        *("plan_s", "packs", "pack_fill", "plan_mib", "plan_peak_mib"),
        *("balance_steps", "balance_max_over_mean_p50", "balance_max_over_mean_p99", "assign_ms_per_step"),
    }


def test_dummies_and_resume_report_their_figures(load: Any, tmp_path: Path) -> None:
    written = figures(load("dummies"), tmp_path, "--size", "tiny", "--repeats", "1")
    assert set(written) == {"size", "tokens", "without_s", "with_s", "ratio"}
    written = figures(load("resume"), tmp_path, "--size", "tiny", "--records", "4000")
    assert [row["step"] for row in written["finding"]] == [10, 100_000]
    assert written["finding"][1]["packs_epoch"] > 0
    assert set(written["saving"]) == {"parameters", "file_mib", "stall_s", "write_s", "check_s", "load_s"}


def test_loss_compares_both_ways(load: Any, tmp_path: Path) -> None:
    written = figures(load("loss"), tmp_path, "--size", "tiny", "--chunk", "64")
    assert set(written) == {
        *("tokens", "hidden", "vocabulary", "chunk", "ways", "time_ratio", "memory_ratio"),
    }
    chunked, full = written["ways"]
    assert chunked["loss"] == pytest.approx(full["loss"], rel=1e-6)


@pytest.mark.parametrize("saving", ["packing", "images", "clips", "head", None])
def test_the_plain_way_has_the_same_loss_and_gradients(load: Any, saving: str | None) -> None:
    plain = load("plain")
    model = tiny_megrezo().eval()
    samples = mixed_samples(model.config)
    for sample in samples:
        sample.loss_weights = (sample.loss_weights > 0).float()
    batch = make_batch(samples)

    def gradients(savings: Any) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = plain.loss_sum(model, batch, savings)
        loss.backward()

        return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, wanted = gradients(plain.Savings(True, True, True, True))
    found_loss, found = gradients(plain.Savings(**{saving: True} if saving else {}))
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_counted_work_is_what_torch_counts(load: Any, name: str) -> None:
    """Torch counts attention over all pairs of tokens, the future's too."""
    step = load("step")
    config = step.model_config("tiny")
    model = step.build(config, "cpu")
    packs, fours = step.batches_of(config, 1, 0)
    batches, savings = (packs, step.WAYS[name]) if name == "all" else (fours, step.WAYS[name])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.forward_backward(model, batches, savings, "cpu")
    rows = [step._rows(batch.cu_seqlens.diff(), savings.packing) for batch in batches]
    future = 6 * model.config.hidden_size * model.config.num_hidden_layers * sum((row**2).sum() for row in rows)
    assert step.counted_flops(model, batches, savings) + future == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_workload_is_what_it_says(load: Any) -> None:
    workload = load("workload")
    drawn = workload.draw(20_000, seed=3)
    lengths = drawn.lengths()
    shares = np.bincount(drawn.kind) / len(drawn.kind)
    assert shares == pytest.approx(list(workload.SHARES.values()), abs=0.02)
    assert lengths[:, 0].max() <= 4096
    has_image, has_clip = lengths[:, 1] > 0, lengths[:, 2] > 0
    assert (has_image == np.isin(drawn.kind, [0, 3])).all()
    assert (has_clip == np.isin(drawn.kind, [1, 3])).all()


def test_samples_have_the_lengths_that_were_drawn(load: Any) -> None:
    drawn = load("workload").draw(30, seed=1)
    for record, lengths in enumerate(drawn.lengths()):
        sample = drawn.sample(record, vocabulary=100, mel_bins=8)
        assert (
            len(sample.input_ids),
            len(media_of(sample, "image").values),
            len(media_of(sample, "audio").values),
        ) == tuple(lengths)
        assert sum(height * width for height, width in media_of(sample, "image").sizes.tolist()) == lengths[1]
        assert len(media_of(sample, "image").places) == 64 * len(media_of(sample, "image").sizes)
        assert int((sample.labels >= 0).sum()) == drawn.answer[record]
        places = torch.cat([media_of(sample, "image").places, media_of(sample, "audio").places])
        assert len(places.unique()) == len(places)
        assert not len(places) or int(places.max()) < lengths[0] - drawn.answer[record]
