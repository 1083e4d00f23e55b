"""What it costs that both towers run in every training step: text alone, with their dummy inputs and without.

python benchmarks/dummies.py [--json FILE]
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import finish, measured, print_table, use_one_core
from step import DRAWN, WAYS, build, forward_backward, model_config
from workload import draw

from train.config import DataOptions
from train.data.collate import collate
from train.data.plan import Limits, plan_epoch
from train.families.megrezo.model import MegrezOConfig
from train.schema import Batch


def text_pack(config: MegrezOConfig, seed: int) -> Batch:
    """A full pack of the workload's records that have neither image nor recording."""
    options, workload = DataOptions(), draw(DRAWN, seed)
    limits = Limits(options.max_tokens, {"image": options.max_patches, "audio": options.max_frames})
    texts = np.flatnonzero((workload.image < 0) & (workload.hundredths == 0))
    pack = plan_epoch(workload.lengths(), [texts], [1.0], limits, seed=seed, epoch=0)[0]
    bins = config.audio_arguments()["n_mels"]
    samples = [workload.sample(record, vocabulary=config.vocab_size, mel_bins=bins) for record in pack]
    return collate(samples, [0] * len(samples), pack)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "cpu", "4b"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="times that each way runs; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    chosen = parser.parse_args(arguments)
    use_one_core()
    config = model_config(chosen.size)
    model, packs = build(config, chosen.device), [text_pack(config, seed=0)]
    run = partial(forward_backward, model, packs, WAYS["all"], chosen.device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(chosen.repeats + 1):
        for with_dummies in seconds:
            model.train(with_dummies)  # nothing else in the model asks whether it trains
            _, cost = measured(run, chosen.device)
            if repeat:  # the first pays for what is set up at first use
                seconds[with_dummies].append(cost.seconds)
                print(f"{with_dummies=}: {cost.seconds:.2f} s", file=sys.stderr, flush=True)
    without, with_them = (statistics.median(seconds[way]) for way in (False, True))
    figures: dict[str, Any] = {"tokens": len(packs[0].input_ids), "without_s": without, "with_s": with_them}
    figures["ratio"] = with_them / without
    print_table([figures])
    finish({"size": chosen.size, **figures}, chosen.json, chosen.device)


if __name__ == "__main__":
    main()
