"""Gemma 4."""

from pathlib import Path

from tokenizers import Tokenizer, processors

from tiny_models.model_folder import INITIAL_STD, ModelFolder, byte_level_tokenizer, llm_config, texts
from train.families.gemma4.template import CHAT_TEMPLATE_JINJA

SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)

NAMED_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
}
"""By which transformers' own processor finds them."""

PROCESSOR_CONFIG = {
    "processor_class": "Gemma4Processor",
    "image_processor": {
        "image_processor_type": "Gemma4ImageProcessor",
        "patch_size": 12,
        "pooling_kernel_size": 3,
        "max_soft_tokens": 9,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": False,
        "resample": 3,
        "rescale_factor": 1 / 255,
    },
    "feature_extractor": {
        "feature_extractor_type": "Gemma4AudioFeatureExtractor",
        "feature_size": 128,
        "sampling_rate": 16000,
        "frame_length": 320,
        "hop_length": 160,
        "padding_value": 0.0,
        "dither": 0.0,
        "min_frequency": 0.0,
        "max_frequency": 8000.0,
        "mel_floor": 0.001,
    },
    "image_seq_length": 9,
    "audio_seq_length": 750,
    "audio_ms_per_token": 40,
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Gemma4Processor",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "extra_special_tokens": NAMED_TOKENS,
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
}


def gemma4(data: Path) -> ModelFolder:
    tokenizer = byte_level_tokenizer(texts(data / "sample/train.jsonl") + 2 * ["model"], SPECIAL_TOKENS)
    begin = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [begin])
    configs = {
        "config": gemma4_config(tokenizer),
        "generation_config": generation_config(tokenizer),
        "processor_config": PROCESSOR_CONFIG,
        "tokenizer_config": TOKENIZER_CONFIG,
    }
    return ModelFolder(tokenizer, CHAT_TEMPLATE_JINJA, configs)


def gemma4_config(tokenizer: Tokenizer) -> dict:
    """Gemma 4: both kinds of layers, two that reuse keys and values, the table, the capped logits; all else small."""
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    common = llm_config(tokenizer)
    text = {name: value for name, value in common.items() if name not in ("dtype", "hidden_act", "rms_norm_eps")}
    text |= {
        "num_key_value_heads": 1,
        "num_hidden_layers": 6,
        "layer_types": 2 * ["sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "intermediate_size": 256,
        "sliding_window": 32,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": common["vocab_size"],
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "initializer_range": INITIAL_STD,
        "tie_word_embeddings": True,
        "boi_token_id": ids["<|image>"],
        "image_token_id": ids["<|image|>"],
        "eoi_token_id": ids["<image|>"],
        "boa_token_id": ids["<|audio>"],
        "audio_token_id": ids["<|audio|>"],
        "eoa_token_index": ids["<audio|>"],
        "video_token_id": ids["<|video|>"],
        "text_config": {"model_type": "gemma4_text", **text},
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "intermediate_size": 256,
            "patch_size": 12,
            "pooling_kernel_size": 3,
            "position_embedding_size": 64,
            "use_clipped_linears": True,
            "initializer_range": INITIAL_STD,
        },
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "subsampling_conv_channels": [128, 8],
            "output_proj_dims": 128,
            "initializer_range": INITIAL_STD,
        },
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    return {
        "eos_token_id": [tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<turn|>")],
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "bos_token_id": tokenizer.token_to_id("<bos>"),
        "do_sample": False,
    }
