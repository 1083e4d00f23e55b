"""What our own model answers to conversations, to compare other engines with; and conversations as OpenAI messages."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train.data.collate import collate
from train.schema import IGNORE_INDEX, Part, Record

_MEDIA_TYPES = {"image": "image/png", "audio": "audio/wav"}
"""Engines look at the bytes, not at these."""


@torch.no_grad()
def own_answers(model: Any, processor: Any, conversations: Sequence[Record], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers, each conversation alone: `prompt_ids`, `prompt_logprobs` (from the second on), `ids`, `logprobs`.

    An answer's first tokens are those of `generate`, and all log-probabilities those of one forward.
    """
    answers = []
    for conversation in conversations:
        prompt = processor.encode(conversation, generation_prompt=True)
        [ids] = model.generate(collate([prompt], [0], [0]), max_new_tokens=max_tokens, do_sample=False)
        tokens = torch.cat([prompt.input_ids, ids])
        nothing = torch.zeros(len(tokens))
        labels = torch.full_like(tokens, IGNORE_INDEX)
        answered = replace(prompt, input_ids=tokens, labels=labels, loss_weights=nothing)
        logprobs = model.logits(collate([answered], [0], [0])).float().log_softmax(-1)
        chosen = logprobs[:-1].gather(1, tokens[1:, None]).squeeze(1).tolist()
        learned_from = len(prompt.input_ids) - 1
        answers.append(
            {
                "prompt_ids": prompt.input_ids.tolist(),
                "prompt_logprobs": chosen[:learned_from],
                "ids": ids.tolist(),
                "logprobs": chosen[learned_from:],
            }
        )
    return answers


def openai_messages(conversation: Record) -> list[dict[str, Any]]:
    """The conversation as an OpenAI request has it, media as data URLs."""
    return [{"role": turn.role, "content": [_item(part) for part in turn.parts]} for turn in conversation.turns]


def _item(part: Part) -> dict[str, Any]:
    if part.kind == "text":
        return {"type": "text", "text": part.content}
    file = part.content if isinstance(part.content, bytes) else Path(part.content).read_bytes()
    url = f"data:{_MEDIA_TYPES[part.kind]};base64,{b64encode(file).decode()}"
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}}
