"""What vLLM makes of conversations, for `omnitune certify`: run by the Python of an environment with vLLM.

    python -m train.inference.vllm_plugin.score MODEL CONVERSATIONS.json ANSWERS.json

CONVERSATIONS.json lists conversations of OpenAI messages. For each, ANSWERS.json has the prompt's token ids, and the
log-probabilities of all of them but the first, in fp32.
"""

import json
import sys
from pathlib import Path

import psutil
import torch
from vllm import LLM, SamplingParams

_SHARE = 0.8
"""Of the memory that is free, vLLM may take this share."""


def memory_share() -> float:
    """What vLLM may take of all memory, of the GPU or else of the host: others use some of it, `certify` itself too."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    return _SHARE * free / total


def main(model: str, conversations: str, answers: str) -> None:
    """Read the conversations, and write what was made of them."""
    llm = LLM(model, dtype="float32", enforce_eager=True, gpu_memory_utilization=memory_share())
    messages = json.loads(Path(conversations).read_text(encoding="utf-8"))
    found = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    written = []
    for request in found:
        ids = list(request.prompt_token_ids)
        distributions = zip(request.prompt_logprobs, ids, strict=True)
        written.append({"ids": ids, "log_probabilities": [of[token].logprob for of, token in distributions if of]})
    Path(answers).write_text(json.dumps(written), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
