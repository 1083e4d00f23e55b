"""Small models of the family with every parameter random, and conversations with media of odd sizes."""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image

from tests.builders import randomize
from tests.runs import ROOT
from train.export.model_folder import copy_side_files
from train.families.qwen_omni.config import QwenOmniConfig
from train.families.qwen_omni.model import Qwen2_5OmniForConditionalGeneration
from train.families.qwen_omni.processor import QwenOmniProcessor
from train.schema import Part, Record, Sample, Turn

TINY = ROOT / "data" / "tiny_qwen_omni"
RATE = 16_000


def write_model(folder: Path, *, max_pixels: int = 300 * 300) -> Path:
    """A model folder: all four kinds of weights large enough that a mistake shows, pictures up to `max_pixels`."""
    model = Qwen2_5OmniForConditionalGeneration(QwenOmniConfig.from_pretrained(TINY))
    randomize(model)
    model.save_pretrained(folder)
    copy_side_files(TINY, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_pixels": max_pixels}))
    return folder


def picture(width: int, height: int, seed: int = 0) -> bytes:
    """A picture of noise, as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def clip(samples: int, seed: int = 0) -> bytes:
    """A recording of noise at 16 kHz, as a WAV of float samples."""
    file = BytesIO()
    soundfile.write(file, sound(samples, seed), RATE, format="WAV", subtype="FLOAT")
    return file.getvalue()


def sound(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def record(*turns: tuple[str, Sequence[Any]]) -> Record:
    """A conversation; a part is a text, ("image", (width, height)) or ("audio", samples)."""
    return Record(tuple(Turn(role, tuple(_part(part, n) for n, part in enumerate(parts))) for role, parts in turns))


def _part(part: Any, seed: int) -> Part:
    if isinstance(part, str):
        return Part("text", part)
    kind, size = part
    return Part(kind, picture(*size, seed) if kind == "image" else clip(size, seed))


MIXED = [
    record(("user", ["What is it?"]), ("assistant", ["A cat."])),
    record(("user", [("image", (97, 201)), ("image", (300, 61)), "Which?"]), ("assistant", ["The second one."])),
    record(("user", [("audio", 33_333), "and", ("audio", 8_000), ("audio", 64_161)]), ("assistant", ["three"])),
    record(
        ("system", ["Be brief."]),
        ("user", ["Look: ", ("image", (150, 150)), ("audio", 49_000), "What?"]),
        ("assistant", ["A small red one."]),
        ("user", [("audio", 1_000), "And this? ", ("image", (60, 280))]),
        ("assistant", ["island"]),
    ),
    record(("user", ["Which colour has the sky?"]), ("assistant", ["blue"])),
]


def samples(processor: QwenOmniProcessor) -> list[Sample]:
    """Every mix: text, several pictures, several clips, all in several turns, text."""
    return [processor.encode(one) for one in MIXED]


def write_published(folder: Path) -> Path:
    """A model folder as published: talker and vocoder beside the thinker, several shards, the thinker in bfloat16."""
    config = json.loads((TINY / "config.json").read_text())
    rope = {"rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}, "rope_theta": 1e6}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32, "hidden_size": 64}
    talker = sizes | rope | {"embedding_size": 128, "intermediate_size": 64, "num_key_value_heads": 1}
    dit = sizes | {"look_ahead_layers": [0], "look_backward_layers": [0], "emb_dim": 32, "enc_emb_dim": 16}
    dit |= {"enc_dim": 16, "enc_channels": [16] * 4 + [48], "enc_attention_channels": 8, "enc_se_channels": 8}
    model = transformers.Qwen2_5OmniForConditionalGeneration(
        transformers.Qwen2_5OmniConfig(
            thinker_config=config["thinker_config"],
            talker_config=talker,
            token2wav_config={"dit_config": dit, "bigvgan_config": {"upsample_initial_channel": 64}},
        )
    )
    randomize(model)
    model.thinker.bfloat16(), model.talker.bfloat16()
    model.save_pretrained(folder, max_shard_size="2MB")
    torch.save({}, folder / "spk_dict.pt")
    copy_side_files(TINY, folder)
    return folder
