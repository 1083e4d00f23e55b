"""MiniCPM as a Llama that computes the same function, and back.

The muP scales go into the weights they act on: the embedding is multiplied by `scale_emb`; what ends a layer's
attention and MLP by `scale_depth` / √layers; the head, which then is a matrix of its own, is divided by the hidden size
over `dim_model_base`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.families.minicpm.model import MiniCPMConfig

Config = Mapping[str, Any]
"""What stands in a config.json."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BRANCH_ENDS = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
_SCALES = ("scale_emb", "scale_depth", "dim_model_base", "tie_word_embeddings")
_KEPT = "minicpm"
"""Key of the Llama form's config.json under which the scales are kept for the way back."""


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


def _mup(config: Config) -> MiniCPMConfig:
    return MiniCPMConfig(**{name: value for name, value in config.items() if name != "model_type"})


def _scaled(value: Tensor, factor: float) -> Tensor:
    return (value.to(torch.float32) * factor).to(value.dtype)
