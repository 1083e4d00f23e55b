"""Does changing the recordings of training help under noise? WER on clean and noisy speech and on other voices, with
`data.augment` and without.

    python benchmarks/noise.py [--seeds 2] [--json FILE]

Each run trains the tiny model from nothing on the phrases of data/speech, all of it in full. The held-out phrases are
made here, as data/make_speech.py makes its own, but more of them, so that one word does not decide. Needs espeak-ng.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from random import Random

from measure import finish, print_table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
from make_sample import PITCHES, VOICES, Clip  # noqa: E402 (beside the makers, not installed)
from make_speech import NOISE_DB, SPEEDS, Recording, phrase, record  # noqa: E402

CHANGES = {
    "none": [],
    "noise": ["data.augment={noise_db: [0, 20]}"],
    "noise and speed": ["data.augment={noise_db: [0, 20], speed: [0.9, 1, 1.1]}"],
}
OTHER_VOICES = ("en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-rp")
"""Accents that data/speech does not have."""
HELD_OUT: dict[str, tuple[Sequence[str], bool]] = {
    "clean": (VOICES, False),
    "noisy": (VOICES, True),
    "other voices": (OTHER_VOICES, False),
}
"""Voices of each set, and whether there is noise in it."""


def make_held_out(folder: Path, count: int) -> Path:
    """So many phrases of each set, spoken into a folder; the file of their records."""
    rng, lines = Random("noise.py"), []
    recordings: dict[str, Recording] = {}
    for kind, (voices, is_noisy) in HELD_OUT.items():
        for number, voice in zip(range(count), cycle(voices), strict=False):
            clip = Clip(phrase(rng), voice, rng.choice(SPEEDS), rng.choice(PITCHES))
            path = f"{kind}-{number}.opus"
            noise_db = rng.uniform(*NOISE_DB) if is_noisy else None
            recordings[path] = Recording(clip, noise_db, seed=len(recordings))
            lines.append(json.dumps(record(kind, path, clip.text)) + "\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: recordings[path].save(folder / path), recordings))
    file = folder / "heldout.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def trained(changes: list[str], seed: int, epochs: int, held_out: Path) -> dict[str, float]:
    """The word error rates of a run's last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        # The long recordings do not fit into 1,024 tokens, and are left out.
        words = ["+recipe=full", "data=speech", "data.max_tokens=1024", f"run.epochs={epochs}", f"run.seed={seed}"]
        words += [f"data.eval={held_out}"]
        words += ["eval.before_training=false", "eval.every=0", "eval.metrics=[wer]", "eval.max_new_tokens=8"]
        words += ["engine=none", "tracker=none", "checkpoint.save_every=0", f"run.dir={run}", *changes]
        subprocess.run([sys.executable, "train/main.py", *words], cwd=ROOT, check=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {kind: f"eval/wer/{kind}" for kind in HELD_OUT}
    [last] = [line for line in lines if names["clean"] in line][-1:]
    return {kind: last[name] for kind, name in names.items()}


def main() -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="runs with each kind of change")
    parser.add_argument("--epochs", type=int, default=48, help="passes over the 600 phrases")
    parser.add_argument("--phrases", type=int, default=600, help="held-out phrases of each set, three words each")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        held_out = make_held_out(Path(folder), chosen.phrases)
        rows = [
            {"changes": name, "seed": seed, **trained(words, seed, chosen.epochs, held_out)}
            for seed in range(chosen.seeds)
            for name, words in CHANGES.items()
        ]
    print_table(rows)
    finish({"runs": rows}, chosen.json)


if __name__ == "__main__":
    main()
