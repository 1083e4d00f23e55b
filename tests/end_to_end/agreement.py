"""What a model says to conversations: greedy tokens, and the log-probability of every token up to them.

    python agreement.py OUT FOLDER...

writes it for model folders and held-out records as JSON, {folder: answers}. It needs no more than transformers, and
what the folder brings: copy nothing else, and run it in an environment without this project.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
RECORDS = 20
NEW_TOKENS = 8


def held_out() -> list[list[dict[str, Any]]]:
    """Messages of held-out records up to their last answer, spread over all types; media by absolute paths."""
    lines = (SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in lines[:: len(lines) // RECORDS]]
    return [[_with_paths(message) for message in record["conversations"][:-1]] for record in chosen]


def _with_paths(message: dict[str, Any]) -> dict[str, Any]:
    def absolute(value: Any) -> Any:
        return [absolute(item) for item in value] if isinstance(value, list) else str(SAMPLE / value)

    content = message["content"]
    if isinstance(content, str):
        return message
    media = {kind: absolute(content[kind]) for kind in ("image", "audio") if kind in content}
    return message | {"content": content | media}


@torch.no_grad()
def answers(model: Any, processor: Any, conversations: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of each conversation the tokens of the prompt, the greedy ones after it, and the log-probabilities of both.

    An answer goes on to NEW_TOKENS, since the first thing that a few steps of training teach is to end it at once. Its
    tokens are those of `generate`; all log-probabilities are those of one forward.
    """
    said = []
    for messages in conversations:
        batch = processor.prompts([messages], max_tokens=model.config.max_position_embeddings)
        [greedy] = model.generate(batch, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
        ids = torch.cat([batch.input_ids, greedy])
        after = batch.position_ids.max() + 1 + torch.arange(len(greedy))
        whole = replace(
            batch,
            input_ids=ids,
            position_ids=torch.cat([batch.position_ids, after.expand(*batch.position_ids.shape[:-1], -1)], dim=-1),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        )
        log_probabilities = model.logits(whole).float().log_softmax(-1)[:-1].gather(1, ids[1:, None])
        said.append(
            {
                "prompt": batch.input_ids.tolist(),
                "greedy": greedy.tolist(),
                "log_probabilities": log_probabilities.squeeze(1).tolist(),
            }
        )
    return said


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoProcessor

    said: dict[str, Any] = {}
    for folder in sys.argv[2:]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        said[folder] = answers(model, processor, held_out())
    said["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    Path(sys.argv[1]).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
