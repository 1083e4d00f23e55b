"""Tiny models and batches made by hand, for tests of any room. Letters for shapes: see `train.schema`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.families.megrezo.model import MegrezO, MegrezOConfig
from train.schema import IGNORE_INDEX, KINDS, Batch, Kind, Media, Sample


def tiny_config(**overrides: Any) -> MegrezOConfig:
    """The real architecture, small enough to run in milliseconds: 4 queries a slice, 16 mel bins."""
    sizes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": 1,
        "query_num": 4,
        "patch_size": 4,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 40,
        },
        "audio_config": {
            "n_mels": 16,
            "n_ctx": 60,
            "n_state": 32,
            "n_head": 2,
            "n_layer": 2,
            "output_dim": overrides.get("hidden_size", 64),
            "avg_pool": True,
            "add_audio_bos_eos_token": True,
        },
    }
    return MegrezOConfig(**sizes | overrides)


def tiny_megrezo(seed: int = 0, **overrides: Any) -> MegrezO:
    """A float32 `MegrezO` of `tiny_config`, every parameter random (no zero bias hides a mistake)."""
    torch.manual_seed(seed)
    model = MegrezO(tiny_config(**overrides))
    randomize(model)
    return model


def randomize(module: nn.Module) -> None:
    """Makes every parameter random and larger than an initialisation: norms around 1, all else around 0."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            is_scale = "Norm" in type(part).__name__ and name == "weight"
            nn.init.normal_(parameter, mean=float(is_scale), std=0.1)


def make_sample(
    config: MegrezOConfig,
    *,
    slices: Sequence[tuple[int, int]] = (),
    clips: Sequence[int] = (),
    text: int = 8,
    learned: int = 4,
    seed: int = 0,
) -> Sample:
    """A random sample: images, then recordings, each between two marker tokens, then text.

    Args:
        slices: (height, width) of each slice in patches.
        clips: mel frames of each clip, even.
        text: tokens after the media.
        learned: how many of these, the last, are learned.
    """
    random = torch.Generator().manual_seed(seed)
    pool = config.audio_arguments()["avg_pool"]
    enclosed = [config.query_num for _ in slices] + [frames // 2 // pool + 2 for frames in clips]
    places, token = [], 0
    for count in enclosed:
        places.append(torch.arange(token + 1, token + 1 + count))
        token += count + 2
    tokens = token + text
    input_ids = torch.randint(2, config.vocab_size, (tokens,), generator=random)
    is_learned = torch.arange(tokens) >= tokens - learned
    weights = torch.rand(tokens, generator=random) + 0.5
    patches = sum(height * width for height, width in slices)
    media: dict[Kind, Media] = {}
    if slices:
        media["image"] = Media(
            values=torch.randint(0, 256, (patches, 3 * config.patch_size**2), dtype=torch.uint8, generator=random),
            sizes=torch.tensor(slices, dtype=torch.int64),
            places=_cat(places[: len(slices)]),
        )
    if clips:
        media["audio"] = Media(
            values=torch.randn(config.audio_config["n_mels"], sum(clips), generator=random).T,
            sizes=torch.tensor(clips, dtype=torch.int64),
            places=_cat(places[len(slices) :]),
        )
    return Sample(
        input_ids=input_ids,
        position_ids=torch.arange(tokens),
        labels=input_ids.where(is_learned, IGNORE_INDEX),
        loss_weights=weights * is_learned,
        media=media,
    )


def make_batch(samples: Sequence[Sample]) -> Batch:
    """The samples in one flat row, put together in the plainest way."""
    lengths = [len(sample.input_ids) for sample in samples]
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    placed = list(zip(starts, samples, strict=False))
    learned = [(sample.labels != IGNORE_INDEX).nonzero().squeeze(1) for sample in samples]
    media: dict[Kind, Media] = {}
    for kind in KINDS:
        held = [(start, sample.media[kind]) for start, sample in placed if kind in sample.media]
        if held:
            media[kind] = Media(
                values=torch.cat([of.values for _, of in held]),
                sizes=torch.cat([of.sizes for _, of in held]),
                places=_cat([start + of.places for start, of in held]),
            )
    return Batch(
        input_ids=_cat([sample.input_ids for sample in samples]),
        position_ids=_cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        target_positions=_cat([start + at - 1 for start, at in zip(starts, learned, strict=False)]),
        targets=_cat([sample.labels[at] for sample, at in zip(samples, learned, strict=True)]),
        loss_weights=torch.cat([s.loss_weights[at] for s, at in zip(samples, learned, strict=True)]),
        target_sources=torch.zeros(sum(len(at) for at in learned), dtype=torch.int64),
        media=media,
        records=list(range(len(samples))),
    )


def media_of(held: Sample | Batch, kind: Kind) -> Media:
    """The media of a kind; empty where there are none."""
    nothing = torch.empty(0, dtype=torch.int64)
    return held.media.get(kind, Media(nothing, nothing, nothing))


def mixed_samples(config: MegrezOConfig, seed: int = 0) -> list[Sample]:
    """Every mix: both media, text alone, two slices, two clips (one with an odd frame), text alone."""
    return [
        make_sample(config, slices=[(3, 4)], clips=[22], text=9, seed=seed),
        make_sample(config, text=13, learned=6, seed=seed + 1),
        make_sample(config, slices=[(2, 7), (5, 3)], text=7, seed=seed + 2),
        make_sample(config, clips=[40, 10], text=13, learned=5, seed=seed + 3),
        make_sample(config, text=13, learned=2, seed=seed + 4),
    ]


def _cat(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])
