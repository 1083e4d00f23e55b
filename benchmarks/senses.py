"""Does the model see and hear? Exact match on held-out records as they are, blanked, and silenced.

    python benchmarks/senses.py outputs/full/<run>/export

With the images blanked (all grey) or the recordings silenced, the figures of the records that need
them must fall to what can be guessed from the rest.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from train.data.collate import collate
from train.data.record_set import RecordSet, SourceSpec
from train.families.family import quieten_transformers
from train.families.registry import find
from train.schema import Sample

GREY = 127
SILENCE = -1.5
"""Log-mel value of a recording of zeros."""


def blank(sample: Sample) -> None:
    """Make every image grey."""
    if "image" in sample.media:
        sample.media["image"].values.fill_(GREY)


def silence(sample: Sample) -> None:
    """Make every recording silent."""
    if "audio" in sample.media:
        sample.media["audio"].values.fill_(SILENCE)


CONDITIONS: dict[str, Callable[[Sample], None]] = {
    "as it is": lambda sample: None,
    "images blanked": blank,
    "recordings silenced": silence,
}


def exact_match(model, records: RecordSet, change: Callable[[Sample], None], batch_size: int) -> dict[str, float]:
    """Exact match by record type, and over all, with every prompt changed by `change`."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    processor = records.processor
    for start in range(0, len(records), batch_size):
        group = [records.record(i) for i in range(start, min(start + batch_size, len(records)))]
        samples = [processor.prompt(record) for record in group]
        for sample in samples:
            change(sample)
        answers = model.generate(
            collate(samples, [0] * len(samples), [0] * len(samples)), max_new_tokens=16, do_sample=False
        )
        for record, ids in zip(group, answers, strict=True):
            said = str(processor.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            for name in (record.type, "all"):
                right[name] += said == processor.reference(record).strip()
                total[name] += 1
    return {name: right[name] / total[name] for name in sorted(total)}


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a run's export/")
    parser.add_argument("--records", type=Path, default=Path("data/sample/heldout.jsonl"))
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    quieten_transformers()
    family = find(chosen.model)
    source = SourceSpec("heldout", str(chosen.records), str(chosen.records.parent))
    records = RecordSet([source], family.load_processor(chosen.model), max_tokens=10**9, too_long="quarantine")
    model = family.load_model(chosen.model).eval()
    figures = {name: exact_match(model, records, change, chosen.batch_size) for name, change in CONDITIONS.items()}
    print(f"{'type':16}" + "".join(f"{name:>22}" for name in figures))
    for kind in figures["as it is"]:
        print(f"{kind:16}" + "".join(f"{by_type[kind]:>22.2f}" for by_type in figures.values()))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
