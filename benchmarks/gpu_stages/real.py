"""The published model through the real step: speed, memory and waits of each way to train it."""

import gc
import json
import re
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from real_size import SIZES, write_records, write_settings
from step import batches_of, figures_of, useful_flops
from torch import Tensor, nn

from gpu_stages.figures import Setting, Skipped, figure
from train.commands.options import compose_options
from train.data.collate import collate
from train.engine.accelerator import close
from train.engine.build import Run, build
from train.engine.peak import peak_of
from train.families.family import Family
from train.families.registry import find
from train.schema import IGNORE_INDEX, Batch, Media, Sample


@dataclass(frozen=True)
class Way:
    """A way to train: the option words beside the usual ones, and what is accepted and predicted of it on an H200.

    The limits are of one GPU at 4 billion parameters; None where there is none.
    """

    words: tuple[str, ...]
    tokens_per_s: float | None = None
    mfu: float | None = None
    peak_gib: float | None = None
    predicted_gib: float | None = None
    needs_package: str = ""

    @property
    def is_compiled(self) -> bool:
        return "run.compile=true" in self.words


_CHECKPOINTING, _NONE = "run.activation_checkpointing=full", "run.activation_checkpointing=none"
_FULL = "lora=none"
_LORA = ("lora=lora", "modules.tune_vision_encoder=false", "modules.tune_audio_encoder=false")
_QLORA = ("lora=qlora", *_LORA[1:])

WAYS = {
    "LoRA, checkpointing": Way((*_LORA, _CHECKPOINTING), tokens_per_s=9000, peak_gib=11.1, predicted_gib=10.7),
    "LoRA": Way((*_LORA, _NONE), tokens_per_s=12_000, peak_gib=28.5, predicted_gib=27.4),
    "QLoRA, checkpointing": Way(
        (*_QLORA, _CHECKPOINTING), peak_gib=8.1, predicted_gib=7.5, needs_package="bitsandbytes"
    ),
    "full, checkpointing": Way((_FULL, _CHECKPOINTING), mfu=0.22, predicted_gib=72.9),
    "full": Way((_FULL, _NONE), mfu=0.28, predicted_gib=115.7),
    "full, compiled": Way((_FULL, _NONE, "run.compile=true"), mfu=0.45),
}
"""The one place that knows the words of each way."""


def write_base(setting: Setting) -> Path:
    """The model's folder, made once. Its file of weights is a hole of the right size, which takes no disk."""
    folder = setting.folder / "model"
    if not folder.exists():
        write_settings(SIZES[setting.size], folder)
        header: dict[str, Any] = {}
        end = 0
        for name, empty in find(folder).skeleton(folder).state_dict().items():
            begin, end = end, end + 2 * prod(empty.shape)
            header[name] = {"dtype": "BF16", "shape": list(empty.shape), "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        write_records(setting.folder / "data")
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Within, a model that is loaded gets random weights where it lies: zeros would take the device less power."""
    load = Family.load_model

    def load_random(self: Family, *arguments: Any, **options: Any) -> Any:
        model = load(self, *arguments, **options)
        fill(model)
        return model

    Family.load_model = load_random  # type: ignore[method-assign]
    try:
        yield
    finally:
        Family.load_model = load  # type: ignore[method-assign]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights as an initialisation draws them: norms one, biases zero, matrices normal."""
    for part in model.modules():
        is_norm = "norm" in type(part).__name__.lower()
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float(is_norm and name == "weight"))


@contextmanager
def built(setting: Setting, words: Sequence[str], name: str) -> Iterator[Run]:
    """A run of the real model that is ready to start; nothing is left of it on the device afterwards."""
    base = write_base(setting)
    records = setting.folder / "data" / "records.jsonl"
    given = ["model=megrez_3b_omni", f"model.path={base}", "engine=none", "tracker=none", "data=files"]
    given += [f"data.train=[{{path: {records}}}]", "data.eval=[]", "data.workers=0", "checkpoint.save_every=0"]
    given += ["run.epochs=100", "run.packs_per_step=1", "optim.warmup_ratio=0", "data.cache=null"]
    given += [] if setting.device == "cuda" else ["run.precision=fp32", "run.threads=1"]
    given.append(f"run.dir={setting.folder / re.sub(r'[^a-zA-Z]+', '-', name)}")
    with random_weights():
        run = build(*compose_options([*given, *words]))
    try:
        run.trainer.train_step.engine.model.train()
        run.trainer.train_step.work = lambda _: 0.0  # the packs here are not the run's own
        yield run
    finally:
        run.trainer.let_go()
        close(run.accelerator)
        del run
        free(setting)


def free(setting: Setting) -> None:
    """Give back what nothing holds, and count peaks anew."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def packs_of(setting: Setting, folder: Path) -> list[Batch]:
    """Packs of the workload, for the model in a folder."""
    if setting.size == "tiny":
        return [heaviest(setting, folder)]
    config: Any = find(folder).config(folder)
    packs, _ = batches_of(config, 8, 0)
    return [_pinned(setting, pack) for pack in packs]


def heaviest(setting: Setting, folder: Path) -> Batch:
    """The pack that takes the most memory: two records of 16 slices each, clips of 30 and 10.8 s, 4,096 tokens."""
    config: Any = find(folder).config(folder)
    side, slices, clips = (32, 16, (3000, 1080)) if setting.size == "4b" else (4, 1, (40, 20))
    tokens = setting.of_size(2048, 192)
    samples = []
    for frames in clips:
        sizes = torch.full((slices, 2), side)
        patches = torch.randint(0, 256, (slices * side**2, 3 * config.patch_size**2), dtype=torch.uint8)
        places = frames // 2 // config.audio_arguments()["avg_pool"] + 2
        image_places = torch.arange(64 * slices)
        media: dict[Any, Media] = {
            "image": Media(patches, sizes, image_places),
            "audio": Media(
                torch.randn(frames, config.audio_arguments()["n_mels"]),
                torch.tensor([frames]),
                torch.arange(places) + len(image_places),
            ),
        }
        ids = torch.randint(2, config.vocab_size, (tokens,))
        is_learned = torch.arange(tokens) >= len(image_places) + places
        labels = ids.where(is_learned, IGNORE_INDEX)
        samples.append(Sample(ids, torch.arange(tokens), labels, is_learned.float(), media))
    return _pinned(setting, collate(samples, [0, 0], [0, 1]))


def _pinned(setting: Setting, batch: Batch) -> Batch:
    return batch.pin_memory() if setting.device == "cuda" else batch


def measure(setting: Setting, name: str) -> list[dict[str, Any]]:
    """Tokens a second, MFU, waits and peak memory of a way."""
    way = WAYS[name]
    if way.is_compiled and setting.device == "cpu":
        raise Skipped("compiling takes minutes on a CPU")
    if way.needs_package and not find_spec(way.needs_package):
        raise Skipped(f"{way.needs_package} is not installed")
    with built(setting, way.words, name) as run:
        packs = packs_of(setting, run.base)
        figures = _speed(setting, run, way, packs)
        figures += _memory(setting, run, way)
        return figures + (_silent(setting, run, packs[0]) if name == "LoRA" else [])


def _speed(setting: Setting, run: Run, way: Way, packs: Sequence[Batch]) -> list[dict[str, Any]]:
    step = run.trainer.train_step
    seconds, waits = [], []
    warm_up = 3 if way.is_compiled else 1
    for number in range(warm_up + setting.of_size(3, 1)):
        setting.synchronize()
        began = time.perf_counter()
        result = step(number, packs)
        setting.synchronize()
        seconds.append(time.perf_counter() - began)
        waits.append(result.device_wait_s)
        if not result.updated:
            raise RuntimeError(f"step {number} was left out: its gradient is not finite")
    second = statistics.median(seconds[warm_up:])
    figures = [
        setting.speed("tokens", result.tokens / second, "1/s", at_least=way.tokens_per_s or 0),
        setting.speed("step", second, "s"),
        setting.speed("waiting for the device", statistics.median(waits[warm_up:]) / second, "share of the step"),
        setting.speed("loss", result.loss, "nats"),
    ]
    peak = peak_of(torch.cuda.get_device_name()) if setting.device == "cuda" else None
    if way.mfu is not None and peak:
        needed = useful_flops(find(run.base).skeleton(run.base), packs)  # type: ignore[arg-type]
        figures.append(setting.speed("MFU", needed / second / (peak * 1e12), "share", at_least=way.mfu))
    return figures


def _memory(setting: Setting, run: Run, way: Way) -> list[dict[str, Any]]:
    """The peak of a step of two micro-batches of the heaviest pack."""
    pack = heaviest(setting, run.base)
    if setting.device != "cuda":
        return []
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run.trainer.train_step(99, [pack, pack])
    peak = torch.cuda.max_memory_allocated() / 2**30
    limits = {} if way.peak_gib is None else {"at_most": way.peak_gib}
    figures = [setting.speed("peak memory, heaviest pack", peak, "GiB", **limits)]
    if way.predicted_gib:
        share = peak / way.predicted_gib
        figures.append(setting.speed("peak memory, measured / predicted", share, "", at_least=0.97, at_most=1.03))
    return figures


def _silent(setting: Setting, run: Run, pack: Batch) -> list[dict[str, Any]]:
    """Forward and backward where torch turns every wait for the device into an error."""
    if setting.device != "cuda":
        return []
    step = run.trainer.train_step
    setting.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step._forward_backward(pack.to(run.accelerator.device), 1000.0, is_last=True)
        fault = ""
    except RuntimeError as error:
        fault = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        step.engine.update(is_finite=False)
    if fault:
        print(f"a wait for the device: {fault}", flush=True)
    return [figure("forward and backward without a wait", float(not fault), "1 = silent", at_least=1)]


def padded(setting: Setting) -> list[dict[str, Any]]:
    """Forward and backward over the same records the plain, padded way and ours; both without checkpointing."""
    chosen = Namespace(size=setting.size, device=setting.device, packs=setting.of_size(4, 1), repeats=1, seed=0)
    chosen.ways, chosen.peak_tflops = ["all"], None
    ways = {row["way"]: row for row in figures_of(chosen)["ways"]}
    free(setting)
    return [
        setting.speed("faster than the padded way", ways["all"]["speed_ratio"], "times", at_least=5),
        setting.speed("peak memory, padded", ways["plain"]["peak_gib"], "GiB"),
        setting.speed("peak memory, packed", ways["all"]["peak_gib"], "GiB"),
    ]


def saving(setting: Setting) -> list[dict[str, Any]]:
    """How long training waits for a save of LoRA's weights; the second one finds its memory touched."""
    with built(setting, WAYS["LoRA"].words, "saving") as run:
        pack = heaviest(setting, run.base)
        stalls = []
        for number in range(2):
            run.trainer.train_step(number, [pack])
            run.trainer.position = replace(run.trainer.position, step=number + 1)
            setting.synchronize()
            began = time.perf_counter()
            run.trainer.save()
            stalls.append(time.perf_counter() - began)
            run.trainer.checkpoints.finish()
        return [setting.speed("a save's stall", max(stalls), "s", at_most=0.3)]


def generation(setting: Setting) -> list[dict[str, Any]]:
    """Tokens a second of greedy answers to text, for one prompt and for 32 at a time."""
    family = find(write_base(setting))
    device, dtype = torch.device(setting.device), torch.bfloat16 if setting.device == "cuda" else torch.float32
    model = family.load_model(write_base(setting), dtype=dtype, device=device).eval()
    fill(model)
    figures = []
    new = setting.of_size(64, 4)
    for count, accepted in ((1, 35), (32, 1000)):
        prompts = _prompts(model.config.vocab_size, count).to(device)
        model.generate(prompts, max_new_tokens=2, do_sample=False)
        setting.synchronize()
        began = time.perf_counter()
        answers = model.generate(prompts, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        setting.synchronize()
        rate = sum(map(len, answers)) / (time.perf_counter() - began)
        figures.append(setting.speed(f"generation, batch {count}", rate, "tokens/s", at_least=accepted))
    del model
    free(setting)
    return figures


def _prompts(words: int, count: int) -> Batch:
    def sample() -> Sample:
        ids: Tensor = torch.randint(2, words, (100,))
        return Sample(ids, torch.arange(100), torch.full((100,), IGNORE_INDEX), torch.zeros(100))

    return collate([sample() for _ in range(count)], [0] * count, list(range(count)))
