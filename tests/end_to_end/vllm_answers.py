"""Run by the vLLM environment's Python: what vLLM's offline API makes of conversations, any model folder's.

vllm_answers.py MODEL CONVERSATIONS.json ANSWERS.json TOKENS OPTIONS

CONVERSATIONS.json lists conversations of OpenAI messages, and OPTIONS is a JSON object, of the model's processor. All
are answered greedily in float32, with TOKENS tokens, as one batch, then in reverse order from vLLM's caches. For each
conversation ANSWERS.json has

    prompt_ids, prompt_logprobs   of all tokens of the prompt but the first
    ids, logprobs                 of the answer
    cached_ids, cached_logprobs   the same of the second time
    cached_tokens                 how many tokens of the prompt came from the cache
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main(model: str, conversations: str, answers: str, tokens: str, options: str) -> None:
    """Answer the conversations, and write what was answered."""
    processing = {"mm_processor_kwargs": json.loads(options)} if json.loads(options) else {}
    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=4096, block_size=32, **processing)
    messages = json.loads(Path(conversations).read_text(encoding="utf-8"))
    greedy: dict[str, Any] = {"temperature": 0.0, "min_tokens": int(tokens), "max_tokens": int(tokens), "logprobs": 0}
    first = llm.chat(messages, SamplingParams(**greedy, prompt_logprobs=0), use_tqdm=False)
    second = llm.chat(messages[::-1], SamplingParams(**greedy), use_tqdm=False)[::-1]
    written = []
    for request, again in zip(first, second, strict=True):
        prompt = list(request.prompt_token_ids)
        distributions = zip(request.prompt_logprobs, prompt, strict=True)
        ids, logprobs = answer(request)
        cached_ids, cached_logprobs = answer(again)
        written.append(
            {
                "prompt_ids": prompt,
                "prompt_logprobs": [of[token].logprob for of, token in distributions if of],
                "ids": ids,
                "logprobs": logprobs,
                "cached_ids": cached_ids,
                "cached_logprobs": cached_logprobs,
                "cached_tokens": again.num_cached_tokens,
            }
        )
    Path(answers).write_text(json.dumps(written))


def answer(request: Any) -> tuple[list[int], list[float]]:
    """Tokens and their log-probabilities."""
    [output] = request.outputs
    ids = list(output.token_ids)
    return ids, [of[token].logprob for of, token in zip(output.logprobs, ids, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
