"""MiniCPM as a Llama that computes the same function, and back.

The muP scales go into the weights they act on: the embedding is multiplied by `scale_emb`; what ends a layer's
attention and MLP by `scale_depth` / √layers; the head, which then is a matrix of its own, is divided by the hidden size
over `dim_model_base`.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.errors import CheckpointError
from train.modules.text import MiniCPMConfig

Config = Mapping[str, Any]
"""What stands in a config.json."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BRANCH_ENDS = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
_SCALES = ("scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings")
_KEPT = "minicpm"
"""Key of the Llama form's config.json under which the scales are kept for the way back."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Conversion:
    """Another form of a family's models.

    read: config.json, and a function that reads a weight by name, to what the others take.
    weights: (name, value, what `read` gave) to the values that take its place, by name.
    config: what `read` gave to the new config.json.
    """

    read: Callable[[Config, Callable[[str], Tensor]], Config]
    weights: Callable[[str, Tensor, Config], dict[str, Tensor]]
    config: Callable[[Config], dict[str, Any]]


def llama_weights(name: str, value: Tensor, config: Config) -> dict[str, Tensor]:
    """A weight of MiniCPM in the Llama form; products are made in float32."""
    mup = _mup(config)
    if name == EMBEDDING:
        head = {HEAD: _scaled(value, 1 / mup.logits_scaling)} if mup.tie_word_embeddings else {}
        return {name: _scaled(value, mup.scale_emb), **head}
    if name == HEAD:
        return {} if mup.tie_word_embeddings else {name: _scaled(value, 1 / mup.logits_scaling)}
    return {name: _scaled(value, mup.residual_multiplier) if name.endswith(_BRANCH_ENDS) else value}


def llama_config(config: Config) -> dict[str, Any]:
    """The config.json of the Llama form."""
    mup = _mup(config)
    left = {name: value for name, value in config.items() if name not in (*_SCALES, "auto_map")}
    return left | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        _KEPT: {name: getattr(mup, name) for name in _SCALES},
    }


def minicpm_config(config: Config) -> dict[str, Any]:
    """The config.json of MiniCPM, from that of a Llama form; one that was made elsewhere has MiniCPM-2B's scales."""
    left = {name: value for name, value in config.items() if name != _KEPT}
    published = MiniCPMConfig()
    scales = {name: getattr(published, name) for name in _SCALES} | config.get(_KEPT, {})
    return left | {"architectures": ["MiniCPMForCausalLM"], "model_type": MiniCPMConfig.model_type, **scales}


def minicpm_weights(name: str, value: Tensor, config: Config) -> dict[str, Tensor]:
    """A weight of MiniCPM; `config` is its own."""
    mup = _mup(config)
    if name == EMBEDDING:
        return {name: _scaled(value, 1 / mup.scale_emb)}
    if name == HEAD:
        return {} if mup.tie_word_embeddings else {name: _scaled(value, mup.logits_scaling)}
    return {name: _scaled(value, 1 / mup.residual_multiplier) if name.endswith(_BRANCH_ENDS) else value}


def read_llama_form(config: Config, weight: Callable[[str], Tensor]) -> Config:
    """MiniCPM's config.json; its head is the embedding only if the Llama form's still is, up to its scale."""
    made = minicpm_config(config)
    mup = _mup(made)
    embedding, head = weight(EMBEDDING), weight(HEAD)
    of_embedding = embedding.float() / (mup.scale_emb * mup.logits_scaling)
    is_tied = torch.allclose(head.float(), of_embedding, rtol=2 * torch.finfo(head.dtype).eps, atol=0)
    return made | {"tie_word_embeddings": is_tied}


MINICPM_TO_LLAMA = Conversion(lambda config, _: config, llama_weights, llama_config)
LLAMA_TO_MINICPM = Conversion(read_llama_form, minicpm_weights, dict)


def convert(folder: Path, out: Path, conversion: Conversion) -> None:
    """Write a model folder in another form, shard by shard; side files are copied.

    Raises CheckpointError where weights are missing.
    """
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"'{folder}' has no weights (*.safetensors), so there is nothing to convert")

    def weight(name: str) -> Tensor:
        for shard in shards:
            with safe_open(shard, "pt") as held:
                if name in held.keys():  # noqa: SIM118  (not a mapping)
                    return held.get_tensor(name)
        raise CheckpointError(f"'{folder}' has no weight '{name}' (in *.safetensors), so it cannot be converted")

    config = conversion.read(json.loads((folder / "config.json").read_text(encoding="utf-8")), weight)
    out.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    total = 0
    for shard in shards:
        with safe_open(shard, "pt") as held:
            weights = [conversion.weights(name, held.get_tensor(name), config) for name in held.keys()]  # noqa: SIM118
            made = {name: value for values in weights for name, value in values.items()}
            save_file(made, out / shard.name, metadata=held.metadata())
        places |= dict.fromkeys(made, shard.name)
        total += sum(value.nbytes for value in made.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(conversion.config(config), indent=2), encoding="utf-8")
    for file in folder.iterdir():
        if file.is_file() and not (out / file.name).exists() and file.name != _INDEX:
            shutil.copyfile(file, out / file.name)


def _mup(config: Config) -> MiniCPMConfig:
    return MiniCPMConfig(**{name: value for name, value in config.items() if name != "model_type"})


def _scaled(value: Tensor, factor: float) -> Tensor:
    return (value.to(torch.float32) * factor).to(value.dtype)
