"""What the folders of the tiny models share: their form, texts, byte-level tokenizer, and sizes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from train.data.readers import open_source
from train.families.megrezo.template import DEFAULT_SYSTEM_PROMPT

TEMPLATE_TEXTS = (
    DEFAULT_SYSTEM_PROMPT,
    "将语音转化为文字。",
    "Audio 1: \n",
    *("system", "user", "assistant", "observation"),
)
"""What the chat template and the prompts of the published model add to a record's own texts."""

MAX_VOCABULARY = 1000
"""Upper limit of the vocabulary, before the special tokens."""

PATCH = 14

INITIAL_STD = 0.08
"""Of random weights: about 1/√width, so that a layer hands on as much as it gets."""


@dataclass(frozen=True)
class ModelFolder:
    """A model without weights; `configs` by the names of their files."""

    tokenizer: Tokenizer
    chat_template: str
    configs: dict[str, dict]

    def write(self, folder: Path) -> None:
        """Write the files into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in self.configs.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        print(f"{folder}: {self.tokenizer.get_vocab_size()} tokens")


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


def byte_level_tokenizer(found: list[str], special_tokens: tuple[str, ...]) -> Tokenizer:
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
