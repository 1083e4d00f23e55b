"""Makes the folder of the tiny model: its configuration and tokenizer, without weights.

    python data/make_tiny.py [--sample data/sample] [--out data/tiny]

The model has the architecture of Megrez-3B-Omni with about 2.3 million parameters. Its byte-level tokenizer
knows the words of the sample as single tokens, and spells any other text in bytes.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train.data.chat import CHAT_TEMPLATE_JINJA, DEFAULT_SYSTEM_PROMPT

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

MAX_VOCABULARY = 1000
"""Upper limit of the vocabulary, before the special tokens."""

QUERIES = 8
"""Token places of one slice."""
PATCH = 14
INITIAL_STD = 0.08
"""Of random weights: about 1/√width, so that a layer hands on as much as it gets."""


def texts(sample: Path) -> Iterator[str]:
    """Every text of the training records, and those of the template."""
    for line in (sample / "train.jsonl").read_text(encoding="utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:
            yield turn["content"].get("text", "")
    yield from TEMPLATE_TEXTS


def corpus(sample: Path) -> list[str]:
    """The texts, and each word of them at the beginning of a text and after a space."""
    found = list(texts(sample))
    words = sorted({word for text in found for word in re.findall(r"\w+", text)})
    return found + 2 * (list(TEMPLATE_TEXTS) + words + [f" {word}" for word in words])


def make_tokenizer(sample: Path) -> Tokenizer:
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
    tokenizer.train_from_iterator(corpus(sample), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict:
    return {
        "architectures": ["MegrezO"],
        "model_type": "megrezo",
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
        "rope_theta": 5e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": INITIAL_STD,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|turn_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
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
            "avg_pool": 2,
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
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "MegrezOProcessor",
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the folder of the tiny model, without weights.")
    parser.add_argument("--sample", type=Path, default=Path("data/sample"), help="folder of the sample data")
    parser.add_argument("--out", type=Path, default=Path("data/tiny"), help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args.sample)
    tokenizer.save(str(args.out / "tokenizer.json"))
    for name, content in {
        "config.json": model_config(tokenizer),
        "generation_config.json": generation_config(tokenizer),
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }.items():
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (args.out / "chat_template.jinja").write_text(CHAT_TEMPLATE_JINJA, encoding="utf-8")
    print(f"{args.out}: {tokenizer.get_vocab_size()} tokens, {len(SPECIAL_TOKENS)} of them special")


if __name__ == "__main__":
    main()
