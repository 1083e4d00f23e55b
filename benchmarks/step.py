"""Supervised tokens a second, and peak memory: the packed step against the plain way, and each saving alone.

    python benchmarks/step.py                                               # one CPU core
    python benchmarks/step.py --size 4b --device cuda --packs 4 --peak-tflops 989

Same weights, same records, same run: forward and backward over all of them, gradients accumulated. The
optimizer's update, the same in every way, is left out.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from measure import Cost, finish, measured, print_table, use_one_core
from plain import Savings, loss_sum
from torch import nn
from workload import PATCH, QUERIES, draw

from train.config import MODULES, DataOptions
from train.data.collate import collate
from train.data.plan import WINDOW, Limits, plan_epoch
from train.families.megrezo.flops import SLICE_PATCHES, megrezo_flops
from train.families.megrezo.model import MegrezO, MegrezOConfig
from train.schema import Batch, Kind

WAYS = {
    "plain": Savings(),
    "packing alone": Savings(packing=True),
    "unpadded images alone": Savings(images=True),
    "unpadded clips alone": Savings(clips=True),
    "head where supervised alone": Savings(head=True),
    "all": Savings(True, True, True, True),
}
PLAIN_BATCH = 4
"""Records of a batch in the plain way."""

DRAWN = 2 * WINDOW
"""Records that packs are filled from: two windows of the plan, so that the first hands its open packs on."""


def model_config(size: str) -> MegrezOConfig:
    """`4b` is the published model; `cpu` keeps its vocabulary and its proportions; `tiny` is for tests."""
    if size == "4b":
        return MegrezOConfig()
    width, layers, tower, tower_layers, vocabulary = {
        "cpu": (512, 8, 256, 6, 122_880),
        "tiny": (64, 2, 32, 2, 512),
    }[size]
    return MegrezOConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        eos_token_id=1,
        query_num=QUERIES,
        vision_config={
            "hidden_size": tower,
            "intermediate_size": 15 * tower // 4,
            "num_hidden_layers": tower_layers,
            "num_attention_heads": tower // 32,
            "patch_size": PATCH,
        },
        audio_config={"n_state": tower, "n_head": tower // 32, "n_layer": tower_layers, "output_dim": width},
    )


def build(config: MegrezOConfig, device: str) -> MegrezO:
    """Random weights, float32 on the CPU and bfloat16 on CUDA, with zero gradients already in their place."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MegrezO(config)
    cast(nn.Module, model).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def batches_of(config: MegrezOConfig, packs: int, seed: int) -> tuple[list[Batch], list[Batch]]:
    """The same records in full packs, and shuffled in batches of four."""
    options = DataOptions()
    workload = draw(DRAWN, seed)
    limits = Limits(options.max_tokens, {"image": options.max_patches, "audio": options.max_frames})
    plan = plan_epoch(workload.lengths(), [np.arange(DRAWN)], [1.0], limits, seed=seed, epoch=0)[:packs]
    bins = config.audio_arguments()["n_mels"]
    records = np.random.default_rng(seed).permutation([record for pack in plan for record in pack]).tolist()
    fours = [records[start : start + PLAIN_BATCH] for start in range(0, len(records), PLAIN_BATCH)]

    def batch(chosen: Sequence[int]) -> Batch:
        samples = [workload.sample(record, vocabulary=config.vocab_size, mel_bins=bins) for record in chosen]
        return collate(samples, [0] * len(samples), chosen)

    return [batch(pack) for pack in plan], [batch(four) for four in fours]


def forward_backward(model: MegrezO, batches: Sequence[Batch], savings: Savings, device: str) -> float:
    """The step's loss, the mean over its supervised tokens; its gradient is left in the parameters."""
    supervised = sum(len(batch.targets) for batch in batches)
    loss = torch.zeros((), device=device)
    for batch in batches:
        share = loss_sum(model, batch.to(device), savings) / supervised
        share.backward()
        loss += share.detach()
    return float(loss)


def take_gradient_norm(model: MegrezO) -> float:
    """The gradients' L2 norm; they are zero afterwards."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    for gradient in gradients:
        gradient.zero_()
    return norm


_SAVED: dict[Kind, str] = {"image": "images", "audio": "clips"}
"""The saving that leaves a kind's padding out."""


def counted_flops(model: MegrezO, batches: Sequence[Batch], savings: Savings) -> float:
    """Floating-point work of a way, padding and what is computed twice included.

    As `modules.flops` counts it, with attention by the lengths at hand: what is masked for being in the future
    is left out, what is masked for being padding is not.
    """
    flops = megrezo_flops(model, MODULES)
    vision, audio = model.config.vision_arguments(), model.config.audio_arguments()
    patch_pair = 12 * vision["hidden_size"] * vision["num_hidden_layers"]
    frame_pair = 12 * audio["n_state"] * audio["n_layer"]
    total = 0.0
    for batch in batches:
        tokens = _rows(batch.cu_seqlens.diff(), savings.packing)
        slices, clips = (_rows(_items(batch, kind), getattr(savings, of)) for kind, of in _SAVED.items())
        total += flops.token * tokens.sum() + flops.token_squared * (tokens**2).sum()
        total += (flops.unit["image"] - patch_pair * SLICE_PATCHES) * slices.sum() + patch_pair * (slices**2).sum()
        total += flops.unit["audio"] * 2 * clips.sum() + frame_pair * (clips**2).sum()
        # three passes; where logits are not kept, a fourth makes them again
        total += flops.head * (4 / 3 * len(batch.targets) if savings.head else tokens.sum())
    return float(total)


def _items(batch: Batch, kind: Kind) -> torch.Tensor:
    """What attends to itself in a tower: patches of each slice, encoder frames of each clip."""
    if kind not in batch.media:
        return torch.empty(0)
    sizes = batch.media[kind].sizes
    return sizes.prod(dim=1) if kind == "image" else sizes // 2


def _rows(lengths: torch.Tensor, unpadded: bool) -> np.ndarray:
    """Lengths as they are computed: their own, or the longest's."""
    own = lengths.numpy().astype(np.float64)
    return own if unpadded or not len(own) else np.full_like(own, own.max())


def useful_flops(model: MegrezO, packs: Sequence[Batch]) -> float:
    """What the step has to compute, nothing twice: the numerator of the model FLOPs utilization (MFU)."""
    flops = megrezo_flops(model, MODULES)
    again = flops.head / 3 * sum(len(batch.targets) for batch in packs)
    return counted_flops(model, packs, WAYS["all"]) - again


def measure_ways(
    model: MegrezO, inputs: dict[str, list[Batch]], repeats: int, device: str
) -> tuple[dict[str, list[Cost]], dict[str, float]]:
    """Costs and loss of each way, the ways in turn; losses and gradient norms must agree."""
    costs: dict[str, list[Cost]] = {name: [] for name in inputs}
    losses, norms = {}, {}
    for name, batches in inputs.items():  # what is set up and paged in at first use is nobody's cost
        forward_backward(model, batches[:1], WAYS[name], device)
        take_gradient_norm(model)
    for _ in range(repeats):
        for name, batches in inputs.items():
            run = partial(forward_backward, model, batches, WAYS[name], device)
            losses[name], cost = measured(run, device)
            norms[name] = take_gradient_norm(model)
            costs[name].append(cost)
            print(f"{name}: {cost.seconds:.2f} s", file=sys.stderr, flush=True)
    close = 1e-5 if model.dtype == torch.float32 else 2e-2
    for name in inputs:
        assert math.isclose(losses[name], losses["plain"], rel_tol=close), losses
        assert math.isclose(norms[name], norms["plain"], rel_tol=100 * close), norms
    return costs, losses


def figures_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    config = model_config(chosen.size)
    model = build(config, chosen.device)
    packs, fours = batches_of(config, chosen.packs, chosen.seed)
    inputs = {name: packs if WAYS[name].packing else fours for name in dict.fromkeys(["plain", *chosen.ways])}
    costs, losses = measure_ways(model, inputs, chosen.repeats, chosen.device)
    supervised = sum(len(batch.targets) for batch in packs)
    seconds = {name: statistics.median(cost.seconds for cost in of_way) for name, of_way in costs.items()}
    flops = {name: counted_flops(model, batches, WAYS[name]) for name, batches in inputs.items()}
    rows = [
        {
            "way": name,
            "seconds": seconds[name],
            "supervised_tokens_per_s": supervised / seconds[name],
            "speed_ratio": seconds["plain"] / seconds[name],
            "promised_ratio": flops["plain"] / flops[name],
            "share_of_promise": seconds["plain"] / seconds[name] / (flops["plain"] / flops[name]),
            "tflop": flops[name] / 1e12,
            "peak_gib": max(cost.peak_bytes for cost in costs[name]) / 2**30,
            "loss": losses[name],
        }
        for name in inputs
    ]
    figures: dict[str, Any] = {
        "size": chosen.size,
        "records": sum(len(batch.records) for batch in packs),
        "tokens": sum(len(batch.input_ids) for batch in packs),
        "supervised_tokens": supervised,
        "patches": sum(batch.units("image") for batch in packs),
        "frames": sum(batch.units("audio") for batch in packs),
        "ways": rows,
    }
    if chosen.peak_tflops:
        figures["mfu"] = useful_flops(model, packs) / seconds["all"] / (chosen.peak_tflops * 1e12)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "cpu", "4b"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--packs", type=int, default=2, help="packs of 4096 tokens in the step")
    parser.add_argument("--repeats", type=int, default=1, help="times that each way runs; the median counts")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to compare with the plain way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-tflops", type=float, help="the device's peak in bfloat16, for the MFU")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(arguments)
    use_one_core()
    figures = figures_of(chosen)
    print(", ".join(f"{name} {value}" for name, value in figures.items() if name != "ways"))
    print_table(figures["ways"])
    finish(figures, chosen.json, chosen.device)


if __name__ == "__main__":
    main()
