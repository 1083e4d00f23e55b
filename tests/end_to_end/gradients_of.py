"""Run by torchrun: one step's gradients of given packs under an engine, gathered to a file.

    torchrun ... gradients_of.py OUT '[[[0, 1], [2]], [[3], []]]' WORDS...

The JSON gives each rank its packs of record indices.
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from safetensors.torch import save_file  # noqa: E402

from train.commands.options import compose_options  # noqa: E402
from train.data.loader import RecordSet  # noqa: E402
from train.engine.accelerator import close  # noqa: E402
from train.engine.build import build  # noqa: E402
from train.families.registry import find  # noqa: E402
from train.sources import source_specs  # noqa: E402


def main(out: str, packs_of_ranks: str, *words: str) -> None:
    """Compute the gradients and save those of rank 0 (they are equal on all)."""
    options, resolved = compose_options(list(words))
    run = build(options, resolved)
    step = run.trainer.train_step
    engine = step.engine
    gradients = {}

    def keep(**_: object) -> None:
        for name, parameter in run.accelerator.unwrap_model(engine.model).named_parameters():
            if parameter.requires_grad:
                gradients[name] = gradient(parameter).detach().float().cpu().clone()

    if hasattr(engine, "masters"):

        def gradient(parameter):
            return engine.masters[parameter].grad

        engine.update = keep
    else:
        from deepspeed.utils import safe_get_full_grad as gradient

        engine.model.step = keep
        engine.model.get_global_grad_norm = lambda: 0.0

    records = RecordSet(
        source_specs(options.data.train),
        find(run.base).load_processor(run.base),
        max_tokens=4096,
        too_long="quarantine",
    )
    mine = json.loads(packs_of_ranks)[int(os.environ.get("RANK", "0"))]
    engine.model.train()
    result = step(0, [records.batch(pack)[0] for pack in mine])
    if run.accelerator.is_main_process:
        save_file(gradients, out, metadata={"loss": repr(result.loss)})
    close(run.accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
