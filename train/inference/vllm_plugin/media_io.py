"""Recordings of vLLM's requests, decoded by the function that decodes those of training.

vLLM's own decoders read eight and more channels out of memory that is not theirs, and which of them decodes depends on
what is installed.
"""

from pathlib import Path

import numpy as np
from vllm import envs
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.audio import AudioMediaIO

from train.data.audio import SAMPLE_RATE, load_clip
from train.schema import MediaSource


class ClipIO(AudioMediaIO):
    """Encoded recordings as (float32 (samples,), 16 kHz)."""

    def load_bytes(self, data: bytes) -> tuple[np.ndarray, int]:
        """An encoded recording; BadRecord (a ValueError) if it cannot be decoded."""
        self._validate_encoded_size(len(data))
        return _decoded(data)

    def load_file(self, filepath: Path) -> tuple[np.ndarray, int]:
        """A file; BadRecord (a ValueError) if it cannot be decoded."""
        self._validate_encoded_size(filepath.stat().st_size)
        return _decoded(str(filepath))


def _decoded(source: MediaSource) -> tuple[np.ndarray, int]:
    return load_clip(source, int(envs.VLLM_MAX_AUDIO_DECODE_DURATION_S * SAMPLE_RATE)), SAMPLE_RATE


@MEDIA_CONNECTOR_REGISTRY.register("http")  # vLLM's default
class Connector(MediaConnector):
    """Fetches media as vLLM does. It stands in for vLLM's own only where the model served is ours."""

    def fetch_audio(self, audio_url: str) -> tuple[np.ndarray, int | float]:
        """The recording of a request."""
        return self.load_from_url(audio_url, self._clip_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)

    async def fetch_audio_async(self, audio_url: str) -> tuple[np.ndarray, int | float]:
        """The recording of a request."""
        return await self.load_from_url_async(audio_url, self._clip_io(), fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)

    def _clip_io(self) -> ClipIO:
        return ClipIO(**self.media_io_kwargs.get("audio", {}))
