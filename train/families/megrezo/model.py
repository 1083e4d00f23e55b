"""Megrez-3B-Omni: a Llama that reads images and recordings, over flat packs.

Parameter names are those of the published checkpoint. Letters for shapes are those of `schema`.
"""

from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, initialization

from train.families.megrezo.audio import AudioEncoder, sinusoids
from train.families.megrezo.geometry import pool_factor
from train.families.megrezo.resampler import CrossAttention, Resampler
from train.families.megrezo.supported import audio_faults, vision_faults
from train.families.megrezo.vision import VisionTower
from train.model_settings import count_faults, kind_faults, refuse
from train.modules.llm import build_llm
from train.modules.packed import PackedModel
from train.modules.supported import llm_faults
from train.modules.towers import Tower
from train.schema import Kind

_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 980,
    "layer_norm_eps": 1e-6,
}
_WHISPER_LARGE_V3 = {
    "n_mels": 128,
    "n_ctx": 1500,
    "n_state": 1280,
    "n_head": 20,
    "n_layer": 32,
    "output_dim": 2560,
    "avg_pool": True,
    "add_audio_bos_eos_token": True,
}


class MegrezOConfig(LlamaConfig):
    """Configuration with the published layout: the Llama's keys on top, one dict for each tower.

    Without arguments it is Megrez-3B-Omni. Keys that it does not know are kept, and saved again. CheckpointError names
    each value that the model does not implement.
    """

    model_type = "megrezo"
    default_theta = 5_000_000.0

    vocab_size: int = 122_880
    hidden_size: int = 2560
    intermediate_size: int = 7168
    num_hidden_layers: int = 32
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 10
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 120_005
    query_num: int = 64
    """Q: token places of one slice."""
    patch_size: int = 14
    vision_batch_size: int = 8
    """Kept for the published code; here all slices go through the tower at once."""
    drop_vision_last_layer: bool = False
    """Whether the vision tower has one layer less than `vision_config` says."""
    vision_config: dict = field(default_factory=lambda: dict(_SIGLIP_SO400M))
    audio_config: dict = field(default_factory=lambda: dict(_WHISPER_LARGE_V3))

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The head is a weight of its own in every published folder; one that shares the embedding was never tried.
        faults = llm_faults(self, tie_word_embeddings=False)
        faults += count_faults(vars(self), ("query_num", "patch_size", "vision_batch_size"))
        faults += kind_faults(vars(self), bool, drop_vision_last_layer="true or false")
        faults += kind_faults(vars(self), dict, vision_config="a mapping", audio_config="a mapping") or [
            *vision_faults(_SIGLIP_SO400M | self.vision_config, self.patch_size),
            *audio_faults(_WHISPER_LARGE_V3 | self.audio_config, self.hidden_size),
        ]
        refuse(faults)

    def llama_config(self) -> LlamaConfig:
        """The Llama's part, as a configuration of its own. (vLLM would take the name `llm_config` for a setting.)"""
        names = {item.name for item in fields(LlamaConfig)} - {"architectures", "transformers_version"}
        return LlamaConfig(**{name: value for name, value in self.to_dict().items() if name in names})

    def vision_arguments(self) -> dict[str, Any]:
        """Arguments of `VisionTower`."""
        arguments = _chosen(_SIGLIP_SO400M, self.vision_config)
        arguments["num_hidden_layers"] -= self.drop_vision_last_layer
        return arguments

    def audio_arguments(self) -> dict[str, Any]:
        """Arguments of `AudioEncoder`."""
        arguments = _chosen(_WHISPER_LARGE_V3, self.audio_config)
        return arguments | {"avg_pool": pool_factor(arguments["avg_pool"])}


def _chosen(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: given.get(name, default) for name, default in defaults.items()}


class Vision(Tower):
    """Vision tower and resampler: patches (P, 3·patch²) and slice sizes (S, 2) to token embeddings (S·Q, D)."""

    def __init__(self, config: MegrezOConfig):
        super().__init__()
        arguments = config.vision_arguments()
        self.vpm = VisionTower(**arguments)
        self.resampler = Resampler(
            num_queries=config.query_num, embed_dim=config.hidden_size, kv_dim=arguments["hidden_size"]
        )

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Features of each patch: (P, the tower's width)."""
        return self.vpm(values, sizes)

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings of each slice: (S·Q, D)."""
        return self.resampler(features, sizes)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the vision tower."""
        return self.vpm.parameters()

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A slice of one black patch."""
        patch = self.vpm.embeddings.patch_embedding.kernel_size[0]
        return torch.zeros(1, 3 * patch**2, dtype=torch.uint8, device=device), torch.tensor([[1, 1]])


class Audio(Tower):
    """Audio tower: log-mel frames (F, B) and clips' frames (C,) to token embeddings (places, D)."""

    def __init__(self, config: MegrezOConfig):
        super().__init__()
        self.audio = AudioEncoder(**config.audio_arguments())

    def features(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Pooled frames of each clip: (F // 2 // pooling, the encoder's width)."""
        return self.audio.features(values, sizes)

    def connect(self, features: Tensor, sizes: Tensor) -> Tensor:
        """Token embeddings of each clip, begin and end embeddings included."""
        return self.audio.connect(features, sizes)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """All but the projection and the begin and end embeddings."""
        projector = {id(parameter) for parameter in self.audio.projector_parameters()}
        return (parameter for parameter in self.audio.parameters() if id(parameter) not in projector)

    def dummy(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A clip that gives one frame."""
        frames = 2 * self.audio.avg_pool
        return torch.zeros(frames, self.audio.conv1.in_channels, device=device), torch.tensor([frames])


class MegrezO(PackedModel, GenerationMixin):  # type: ignore[misc]  # `generate` takes more
    """Megrez-3B-Omni over packs of samples."""

    config_class = MegrezOConfig
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "VisionLayer", "AudioBlock"]  # noqa: RUF012

    def __init__(self, config: MegrezOConfig):
        super().__init__(config)
        self.llm = build_llm(config.llama_config())
        self.vision = Vision(config)
        self.audio = Audio(config)
        self.post_init()

    @property
    def towers(self) -> dict[Kind, Tower]:
        """The tower of each kind of media."""
        return {"image": self.vision, "audio": self.audio}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Random weights of the towers' own kinds; transformers' rule (normal, std 0.02) for the rest."""
        if isinstance(module, Resampler):
            # A LayerNorm follows: small queries would only be thrown about by the first optimizer steps.
            nn.init.normal_(module.query)
            nn.init.trunc_normal_(module.kv_proj.weight, std=0.02)
            nn.init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)
        elif isinstance(module, CrossAttention):
            # Gain 4: queries begin by attending to different places, where gain 1 averages all patches.
            nn.init.xavier_uniform_(module.in_proj_weight, gain=4.0)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, AudioEncoder):
            initialization.copy_(module.positional_embedding, sinusoids(*module.positional_embedding.shape))
        else:
            super()._init_weights(module)
