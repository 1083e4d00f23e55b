"""The model as vLLM runs it: this project's towers, and vLLM's Llama.

Modules have the names of the checkpoint, so that weights are loaded as they are. Letters for shapes are those of
`schema`. Under tensor parallelism vLLM splits the Llama; every rank holds the towers as a whole, and runs them.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from train.families.megrezo.model import Audio, Vision
from train.inference.vllm_plugin.processing import PLACEHOLDERS, DummyInputs, MediaProcessor, ProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class ServedMegrezO(nn.Module, SupportsMultiModal):
    """Megrez-3B-Omni for vLLM's engine."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What a chat template without places for media writes for one."""
        return PLACEHOLDERS[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_config
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.vision = Vision(config)
        with self._mark_tower_model(vllm_config, "audio"):  # type: ignore[operator]
            self.audio = Audio(config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.llm = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.llama_config(),
                architectures=["LlamaForCausalLM"],
                prefix=maybe_prefix(prefix, "llm"),
            )

    def embed_multimodal(self, **media: Any) -> tuple[Tensor, ...]:
        """Token embeddings of the images, or of the clips, of several requests: (places, D) for each.

        media: the fields of `MediaProcessor`, images or clips end to end.
        """
        if "patches" in media:
            embeddings = self.vision(media["patches"], media["slice_sizes"])
            places = media["slices_per_image"] * self.vision.resampler.num_queries
        else:
            embeddings = self.audio(media["mel"], media["clip_frames"])
            of_windows = self.audio.audio.places(media["clip_frames"])
            places = torch.stack([clip.sum() for clip in of_windows.split(media["windows_per_clip"].tolist())])
        return embeddings.split(places.tolist())

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Final hidden states of the tokens, normed: (T, D)."""
        return self.llm.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of chosen tokens, (N, V), on the rank that samples."""
        return self.llm.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors by their published names; returns the names."""
        return AutoWeightsLoader(self).load_weights(weights)
