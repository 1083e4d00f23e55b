"""A processor over the tiny tokenizer, and a model folder as it is published."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from tests.unit.data.builders import make_tokenizer
from train.families.megrezo.processor import MegrezOImageProcessor, MegrezOProcessor


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def processor(tokenizer) -> MegrezOProcessor:
    """Two queries a slice, patches of 14, so that expected values stay short."""
    return MegrezOProcessor(
        MegrezOImageProcessor(image_feature_size=2),
        WhisperFeatureExtractor(feature_size=128),
        tokenizer,
        system_prompt="",
    )


@pytest.fixture
def model_folder(tmp_path: Path, tokenizer) -> Path:
    """A model folder as it is published: no processor_config.json."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    settings = {
        "image_processor_type": "MegrezOImageProcessor",
        "processor_class": "MegrezOProcessor",
        "auto_map": {"AutoProcessor": "processing_megrezo.MegrezOProcessor"},
        "max_slice_nums": 4,
        "scale_resolution": 448,
        "patch_size": 14,
        "use_image_id": True,
        "norm_mean": [0.5, 0.5, 0.5],
    }
    audio = {"n_mels": 80, "n_ctx": 1500, "avg_pool": True, "add_audio_bos_eos_token": True}
    config = {"model_type": "megrezo", "query_num": 8, "audio_config": audio}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
