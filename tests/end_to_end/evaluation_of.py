"""Run by torchrun or alone: two evaluations, one after the other, by a model of a folder.

    evaluation_of.py FOLDER

The records are FOLDER/train.jsonl, the model is FOLDER/export; what is found goes to FOLDER/found-<ranks>.json. Records
hang as `test_workers.Treacherous` says.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from tests.end_to_end.test_workers import Treacherous  # noqa: E402
from tests.unit.data.test_loader import LIMITS, record_set  # noqa: E402
from train.commands.options import compose_options  # noqa: E402
from train.data.workers import Workers  # noqa: E402
from train.engine.accelerator import close, make_accelerator, world_size  # noqa: E402
from train.engine.evaluator import Evaluator  # noqa: E402
from train.engine.measuring import measure_alike  # noqa: E402
from train.families.registry import find  # noqa: E402


def main(folder: Path) -> None:
    """Measure and evaluate."""
    accelerator = make_accelerator(compose_options(["run.precision=fp32", "run.threads=1"])[0])
    family = find(folder / "export")
    processor = Treacherous(family.load_processor(folder / "export"), folder / "tries")
    records = record_set(folder, processor, workers=Workers(1, limit_s=2))
    measured, bad = measure_alike({"data.eval": records}, None, accelerator)["data.eval"]
    evaluator = Evaluator(
        accelerator,
        records,
        measured,
        LIMITS,
        max_records=0,
        generate=True,
        metrics=["exact_match"],
        max_new_tokens=2,
        batch_size=3,
    )
    model = family.load_model(folder / "export").to(accelerator.device)
    found = [asdict(evaluation) for _ in range(2) if (evaluation := evaluator.evaluate(model))]
    if accelerator.is_main_process:
        said = {"measured": measured.lengths.tolist(), "types": measured.types, "unmeasured": [n.line for n in bad]}
        (folder / f"found-{world_size()}.json").write_text(json.dumps(said | {"evaluations": found}))
    close(accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
