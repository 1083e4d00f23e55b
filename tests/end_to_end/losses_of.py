"""Run by torchrun or alone: the losses of many settings of `mixes`, one after the other in one process group.

    losses_of.py FOLDER SETTINGS.json

FOLDER holds what `test_mixes.prepare` wrote. Each line of FOLDER/losses-<ranks>.jsonl is a setting's outcome. A setting
that takes more than two minutes ends the process with every thread's stack; the first may compile operators too.
"""

import faulthandler
import gc
import json
import sys
from functools import cache
from pathlib import Path

import cpuinfo

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.end_to_end.mixes import Setting  # noqa: E402
from tests.runs import forget, forget_accelerator  # noqa: E402
from train.commands.options import compose_options  # noqa: E402
from train.engine.accelerator import close, world_size  # noqa: E402
from train.engine.build import Run, build  # noqa: E402
from train.engine.compile_locks import COMPILATION_S  # noqa: E402

LIMIT_S = 120


def main(folder: Path, settings: list[Setting]) -> None:
    """Write the losses of each setting."""
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)  # DeepSpeed asks each time it offloads, for a second or two
    words = (folder / "words.txt").read_text().split("\n")
    out = folder / f"losses-{world_size()}.jsonl"
    for number, setting in enumerate(settings):
        faulthandler.dump_traceback_later(LIMIT_S if number else LIMIT_S + COMPILATION_S, exit=True)
        forget_accelerator()
        run = build(*compose_options([*words, *setting.words(), f"run.dir={folder}/run-{world_size()}-{number}"]))
        outcome = {"setting": setting.to_dict(), **losses(run, setting)}
        if run.accelerator.is_main_process:
            with out.open("a") as file:
                file.write(json.dumps(outcome) + "\n")
        forget(run)
        if not number:
            gc.freeze()  # what is imported by now stays; to look through it after each run takes half a second
    faulthandler.cancel_dump_traceback_later()
    close(run.accelerator)


def losses(run: Run, setting: Setting) -> dict:
    """Loss and gradient norm of a step of each mix; then perhaps an evaluation, with answers of unequal length."""
    step, evaluator = run.trainer.train_step, run.trainer.evaluator
    records, types = evaluator.records, evaluator.measured.types
    model = run.accelerator.unwrap_model(step.engine.model)
    model.generation_config.eos_token_id = list(range(0, model.config.get_text_config().vocab_size, 3))
    step.engine.model.train()
    results = []
    for mix in setting.mixes:
        held = [[index for index, kind in enumerate(types) if kind == wanted] for wanted in mix]
        packs = [records.batch(indices)[0] for indices in held]
        mine = packs if world_size() == 1 else [packs[run.accelerator.process_index]]
        results.append(step(len(results), mine))
    return {
        "losses": [result.loss for result in results],
        "grad_norms": [result.grad_norm for result in results],
        "evaluation": evaluator.evaluate(step.engine.model).values if setting.evaluates else {},
    }


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        [
            Setting(item["engine"], tuple(item["tuned"]), item["lora"], tuple(map(tuple, item["mixes"])))
            for item in json.loads(Path(sys.argv[2]).read_text())
        ],
    )
