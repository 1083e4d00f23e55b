"""Does changing the recordings of training help under noise? WER on clean and noisy speech, with `data.augment` and
without.

    python benchmarks/noise.py [--seeds 2] [--json FILE]

Each run trains the tiny model from nothing on the phrases of data/speech, all of it in full.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import finish, print_table

ROOT = Path(__file__).resolve().parents[1]
CHANGES = {"none": [], "noise and speed": ["data.augment={noise_db: [0, 20], speed: [0.9, 1, 1.1]}"]}
FIGURES = ("eval/wer/clean", "eval/wer/noisy")


def trained(changes: list[str], seed: int, epochs: int) -> dict[str, float]:
    """The word error rates of a run's last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        # The long recordings do not fit into 1,024 tokens, and are left out.
        words = ["+recipe=full", "data=speech", "data.max_tokens=1024", f"run.epochs={epochs}", f"run.seed={seed}"]
        words += ["eval.before_training=false", "eval.every=0", "eval.metrics=[wer]", "eval.max_new_tokens=8"]
        words += ["engine=none", "tracker=none", "checkpoint.save_every=0", f"run.dir={run}", *changes]
        subprocess.run([sys.executable, "train/main.py", *words], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [last] = [line for line in lines if FIGURES[0] in line][-1:]
    return {name: last[name] for name in FIGURES}


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="runs with each kind of change")
    parser.add_argument("--epochs", type=int, default=24, help="passes over the 600 phrases")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    rows = [
        {"changes": name, "seed": seed, **trained(words, seed, chosen.epochs)}
        for seed in range(chosen.seeds)
        for name, words in CHANGES.items()
    ]
    print_table(rows)
    finish({"runs": rows}, chosen.json)


if __name__ == "__main__":
    main()
