"""The thinker of Qwen2.5-Omni."""

from pathlib import Path

from tokenizers import Tokenizer

from tiny_models.model_folder import INITIAL_STD, PATCH, ModelFolder, byte_level_tokenizer, llm_config, texts
from train.families.qwen_omni.template import CHAT_TEMPLATE_JINJA, DEFAULT_SYSTEM_PROMPT

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)

NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""By which transformers' own processor finds them."""

PREPROCESSOR_CONFIG = {
    "processor_class": "Qwen2_5OmniProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "feature_extractor_type": "WhisperFeatureExtractor",
    "min_pixels": 56**2,
    "max_pixels": 112**2,
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "n_fft": 400,
    "chunk_length": 300,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_value": 0.0,
    "return_attention_mask": True,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Qwen2_5OmniProcessor",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "extra_special_tokens": NAMED_TOKENS,
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
}


def qwen_omni(data: Path) -> ModelFolder:
    found = texts(data / "sample/train.jsonl") + 2 * [DEFAULT_SYSTEM_PROMPT]
    tokenizer = byte_level_tokenizer(found, SPECIAL_TOKENS)
    configs = {
        "config": qwen_omni_config(tokenizer),
        "generation_config": ends(tokenizer) | {"do_sample": False},
        "preprocessor_config": PREPROCESSOR_CONFIG,
        "tokenizer_config": TOKENIZER_CONFIG,
    }
    return ModelFolder(tokenizer, CHAT_TEMPLATE_JINJA, configs)


def ends(tokenizer: Tokenizer) -> dict:
    """The tokens that end an answer, and the one that fills up a row."""
    end, padding = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    return {"eos_token_id": [end, padding], "pad_token_id": padding}


def qwen_omni_config(tokenizer: Tokenizer) -> dict:
    """The thinker of Qwen2.5-Omni; heads, windows and positions in three rows as published, all else small."""
    text = llm_config(tokenizer)
    text = {name: value for name, value in text.items() if name not in ("dtype", "head_dim")}
    text |= {"rope_theta": 1e6, "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}}
    text |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **ends(tokenizer)}
    names = {"audio_token_index": "<|AUDIO|>", "image_token_index": "<|IMAGE|>", "video_token_index": "<|VIDEO|>"}
    names |= {"audio_start_token_id": "<|audio_bos|>", "audio_end_token_id": "<|audio_eos|>"}
    names |= {"vision_start_token_id": "<|vision_bos|>", "vision_end_token_id": "<|vision_eos|>"}
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "dtype": "float32",
        "enable_audio_output": False,
        "thinker_config": {
            "model_type": "qwen2_5_omni_thinker",
            "initializer_range": INITIAL_STD,
            **{key: tokenizer.token_to_id(name) for key, name in names.items()},
            "text_config": {"model_type": "qwen2_5_omni_text", **text},
            "vision_config": {
                "model_type": "qwen2_5_omni_vision_encoder",
                "depth": 3,
                "hidden_size": 96,
                "num_heads": 3,
                "intermediate_size": 256,
                "out_hidden_size": 128,
                "patch_size": PATCH,
                "window_size": 56,
                "fullatt_block_indexes": [2],
                "initializer_range": INITIAL_STD,
            },
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "d_model": 96,
                "encoder_layers": 3,
                "encoder_attention_heads": 3,
                "encoder_ffn_dim": 256,
                "output_dim": 128,
                "initializer_range": INITIAL_STD,
            },
        },
    }
