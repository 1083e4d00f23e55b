"""MiniCPM-2B."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny_models.model_folder import MAX_VOCABULARY, ModelFolder, corpus, llm_config, texts
from train.families.minicpm.template import MINICPM_TEMPLATE_JINJA

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

TOKENIZER_CONFIG = {
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

GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "do_sample": False}


def minicpm(data: Path) -> ModelFolder:
    tokenizer = llama_tokenizer(texts(data / "text/train.json"))
    configs = {
        "config": minicpm_config(tokenizer),
        "generation_config": GENERATION_CONFIG,
        "tokenizer_config": TOKENIZER_CONFIG,
    }
    return ModelFolder(tokenizer, MINICPM_TEMPLATE_JINJA, configs)


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
    first = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*first, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


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
