"""Makes the folders of the tiny models: configuration and tokenizer, without weights.

    python data/make_tiny.py [--data data]

They have the architectures of Megrez-3B-Omni (`tiny`), Megrez-3B-Instruct (`tiny_instruct`), MiniCPM-2B
(`tiny_minicpm`), the thinker of Qwen2.5-Omni (`tiny_qwen_omni`) and Gemma 4 (`tiny_gemma4`). Their tokenizers know the
words of the samples as single tokens, and spell any other text in bytes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.data.readers import open_source
from train.families.gemma4.template import CHAT_TEMPLATE_JINJA as GEMMA_TEMPLATE_JINJA
from train.families.megrezo.template import CHAT_TEMPLATE_JINJA, DEFAULT_SYSTEM_PROMPT
from train.families.minicpm.template import MINICPM_TEMPLATE_JINJA
from train.families.qwen_omni.template import CHAT_TEMPLATE_JINJA as QWEN_OMNI_TEMPLATE_JINJA
from train.families.qwen_omni.template import DEFAULT_SYSTEM_PROMPT as QWEN_OMNI_SYSTEM_PROMPT

SPECIAL_TOKENS = (
    *("<|eos|>", "<|unk|>", "<|pad|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>"),
    *("<|image_start|>", "<|image_end|>", "<|image_pad|>"),
    *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    *("<|function_start|>", "<|function_end|>"),
    *("<|slice_start|>", "<|slice_end|>", "<|image_id_start|>", "<|image_id_end|>"),
)
TEMPLATE_TEXTS = (
    DEFAULT_SYSTEM_PROMPT,
    "将语音转化为文字。",
    "Audio 1: \n",
    *("system", "user", "assistant", "observation"),
)
"""What the chat template and the prompts of the published model add to a record's own texts."""

QWEN_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)
QWEN_NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
"""By which transformers' own processor finds them."""

GEMMA_SPECIAL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"),
    *("<|image>", "<|image|>", "<image|>", "<|audio>", "<|audio|>", "<audio|>", "<|video|>"),
)
GEMMA_NAMED_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
}
"""By which transformers' own processor finds them."""

LLAMA_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

MAX_VOCABULARY = 1000
"""Upper limit of the vocabulary, before the special tokens."""

QUERIES = 8
"""Token places of one slice."""
PATCH = 14
INITIAL_STD = 0.08
"""Of random weights: about 1/√width, so that a layer hands on as much as it gets."""


def texts(file: Path) -> list[str]:
    """Every text of a file of records."""
    source = open_source(file)
    records = [source[row] for row in range(len(source))]
    turns = [turn for record in records for turn in record.get("messages") or record["conversations"]]
    contents = [turn["content"] for turn in turns]
    return [content if isinstance(content, str) else content.get("text", "") for content in contents]


def corpus(found: list[str]) -> list[str]:
    """The texts and the template's, and each word of them at the beginning of a text and after a space."""
    found = [*found, *TEMPLATE_TEXTS]
    words = sorted({word for text in found for word in re.findall(r"\w+", text)})
    return found + 2 * (list(TEMPLATE_TEXTS) + words + [f" {word}" for word in words])


def byte_level_tokenizer(found: list[str], special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """Byte-level BPE that keeps every text as it is; the special tokens follow the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(found), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    return tokenizer


def llama_tokenizer(found: list[str]) -> Tokenizer:
    """BPE in the manner of sentencepiece: special tokens and bytes come first, and a text begins with a space."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    learner.train_from_iterator(
        corpus([*found, "<用户>", "<AI>"]), trainers.BpeTrainer(vocab_size=MAX_VOCABULARY, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    first = [*LLAMA_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*first, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA_SPECIAL_TOKENS])
    return tokenizer


def llm_config(tokenizer: Tokenizer) -> dict:
    """What the models have in common."""
    return {
        "dtype": "float32",
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "initializer_range": INITIAL_STD,
    }


def megrez_config(tokenizer: Tokenizer) -> dict:
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
        **megrez_config(tokenizer),
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


def instruct_config(tokenizer: Tokenizer) -> dict:
    """The Llama alone."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **megrez_config(tokenizer)}


def minicpm_config(tokenizer: Tokenizer) -> dict:
    """MiniCPM's scales as published, but that of the logits: 4 as for a model a quarter as wide."""
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        **llm_config(tokenizer),
        "num_key_value_heads": 4,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 32,
    }


def qwen_ends(tokenizer: Tokenizer) -> dict:
    """The tokens that end an answer, and the one that fills up a row."""
    end, padding = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    return {"eos_token_id": [end, padding], "pad_token_id": padding}


def qwen_omni_config(tokenizer: Tokenizer) -> dict:
    """The thinker of Qwen2.5-Omni; heads, windows and positions in three rows as published, all else small."""
    text = llm_config(tokenizer)
    text = {name: value for name, value in text.items() if name not in ("dtype", "head_dim")}
    text |= {"rope_theta": 1e6, "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default"}}
    text |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **qwen_ends(tokenizer)}
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


QWEN_PREPROCESSOR_CONFIG = {
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


def gemma4_config(tokenizer: Tokenizer) -> dict:
    """Gemma 4: both kinds of layers, two that reuse keys and values, the table, the capped logits; all else small."""
    ids = {name: tokenizer.token_to_id(name) for name in GEMMA_SPECIAL_TOKENS}
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


GEMMA_PROCESSOR_CONFIG = {
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


def megrez_tokenizer_config(**more: str) -> dict:
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


MINICPM_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "model_max_length": 4096,
    "clean_up_tokenization_spaces": False,
}


def megrez_generation_config(tokenizer: Tokenizer) -> dict:
    return {
        "eos_token_id": [tokenizer.token_to_id("<|turn_end|>"), tokenizer.token_to_id("<|eos|>")],
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
        "do_sample": False,
    }


MINICPM_GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}


def write(folder: Path, tokenizer: Tokenizer, chat_template: str, **configs: dict) -> None:
    """Write a model folder; `configs` by the names of their files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    print(f"{folder}: {tokenizer.get_vocab_size()} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folders of the tiny models, without weights.")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the samples")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write the models' folders to")
    args = parser.parse_args()

    tokenizer = byte_level_tokenizer(texts(args.data / "sample/train.jsonl"))
    write(
        args.out / "tiny",
        tokenizer,
        CHAT_TEMPLATE_JINJA,
        config=omni_config(tokenizer),
        generation_config=megrez_generation_config(tokenizer),
        preprocessor_config=PREPROCESSOR_CONFIG,
        tokenizer_config=megrez_tokenizer_config(processor_class="MegrezOProcessor"),
    )
    found = texts(args.data / "sample/train.jsonl") + 2 * [QWEN_OMNI_SYSTEM_PROMPT]
    tokenizer = byte_level_tokenizer(found, QWEN_SPECIAL_TOKENS)
    write(
        args.out / "tiny_qwen_omni",
        tokenizer,
        QWEN_OMNI_TEMPLATE_JINJA,
        config=qwen_omni_config(tokenizer),
        generation_config=qwen_ends(tokenizer) | {"do_sample": False},
        preprocessor_config=QWEN_PREPROCESSOR_CONFIG,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Qwen2_5OmniProcessor",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": QWEN_NAMED_TOKENS,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
        },
    )
    tokenizer = byte_level_tokenizer(texts(args.data / "sample/train.jsonl") + 2 * ["model"], GEMMA_SPECIAL_TOKENS)
    begin = ("<bos>", tokenizer.token_to_id("<bos>"))
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [begin])
    write(
        args.out / "tiny_gemma4",
        tokenizer,
        GEMMA_TEMPLATE_JINJA,
        config=gemma4_config(tokenizer),
        generation_config={
            "eos_token_id": [tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("<turn|>")],
            "pad_token_id": tokenizer.token_to_id("<pad>"),
            "bos_token_id": tokenizer.token_to_id("<bos>"),
            "do_sample": False,
        },
        processor_config=GEMMA_PROCESSOR_CONFIG,
        tokenizer_config={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "Gemma4Processor",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_special_tokens": GEMMA_NAMED_TOKENS,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
        },
    )
    found = texts(args.data / "text/train.json")
    tokenizer = byte_level_tokenizer(found + texts(args.data / "websearch/train.jsonl"))
    write(
        args.out / "tiny_instruct",
        tokenizer,
        CHAT_TEMPLATE_JINJA,
        config=instruct_config(tokenizer),
        generation_config=megrez_generation_config(tokenizer),
        tokenizer_config=megrez_tokenizer_config(),
    )
    tokenizer = llama_tokenizer(found)
    write(
        args.out / "tiny_minicpm",
        tokenizer,
        MINICPM_TEMPLATE_JINJA,
        config=minicpm_config(tokenizer),
        generation_config=MINICPM_GENERATION_CONFIG,
        tokenizer_config=MINICPM_TOKENIZER_CONFIG,
    )


if __name__ == "__main__":
    main()
