"""Megrez-3B-Omni and Megrez-3B-Instruct."""

from pathlib import Path

from tokenizers import Tokenizer

from tiny_models.model_folder import PATCH, ModelFolder, byte_level_tokenizer, llm_config, texts
from train.families.megrezo.template import CHAT_TEMPLATE_JINJA

SPECIAL_TOKENS = (
    *("<|eos|>", "<|unk|>", "<|pad|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>"),
    *("<|image_start|>", "<|image_end|>", "<|image_pad|>"),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<|function_start|>", "<|function_end|>"),
    *("<|slice_start|>", "<|slice_end|>", "<|image_id_start|>", "<|image_id_end|>"),
)

QUERIES = 8
"""Token places of one slice."""

PREPROCESSOR_CONFIG = {
    "image_processor_type": "MegrezOImageProcessor",
    "processor_class": "MegrezOProcessor",
    "max_slice_nums": 9,
    "scale_resolution": 112,
    "patch_size": PATCH,
    "use_image_id": True,
    "image_feature_size": QUERIES,
    "slice_mode": True,
}


def megrez_omni(data: Path) -> ModelFolder:
    tokenizer = byte_level_tokenizer(texts(data / "sample/train.jsonl"), SPECIAL_TOKENS)
    configs = {
        "config": omni_config(tokenizer),
        "generation_config": generation_config(tokenizer),
        "preprocessor_config": PREPROCESSOR_CONFIG,
        "tokenizer_config": tokenizer_config(processor_class="MegrezOProcessor"),
    }
    return ModelFolder(tokenizer, CHAT_TEMPLATE_JINJA, configs)


def megrez_instruct(data: Path) -> ModelFolder:
    found = texts(data / "text/train.json") + texts(data / "websearch/train.jsonl")
    tokenizer = byte_level_tokenizer(found, SPECIAL_TOKENS)
    configs = {
        "config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **llama_config(tokenizer)},
        "generation_config": generation_config(tokenizer),
        "tokenizer_config": tokenizer_config(),
    }
    return ModelFolder(tokenizer, CHAT_TEMPLATE_JINJA, configs)


def llama_config(tokenizer: Tokenizer) -> dict:
    """A Llama in Megrez's manner."""
    return llm_config(tokenizer) | {
        "rope_theta": 5e6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|turn_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
    }


def omni_config(tokenizer: Tokenizer) -> dict:
    """The Llama with both towers."""
    return {
        "architectures": ["MegrezO"],
        "model_type": "megrezo",
        **llama_config(tokenizer),
        "query_num": QUERIES,
        "patch_size": PATCH,
        "vision_batch_size": 8,
        "drop_vision_last_layer": False,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "intermediate_size": 256,
            "patch_size": PATCH,
            "image_size": 980,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
        "audio_config": {
            "n_mels": 128,
            "n_ctx": 1500,
            "n_state": 96,
            "n_head": 3,
            "n_layer": 3,
            "output_dim": 128,
            "avg_pool": True,
            "add_audio_bos_eos_token": True,
        },
    }


def tokenizer_config(**more: str) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **more,
        "bos_token": None,
        "eos_token": "<|turn_end|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }


def generation_config(tokenizer: Tokenizer) -> dict:
    return {
        "eos_token_id": [tokenizer.token_to_id("<|turn_end|>"), tokenizer.token_to_id("<|eos|>")],
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
        "do_sample": False,
    }
