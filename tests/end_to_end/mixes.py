"""The product of engines, modalities on each rank, frozen modules and ways of tuning, and a part of it."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product

from train.config import MODULES, Engine

ENGINES = [str(engine) for engine in Engine if engine is not Engine.none]
KINDS = ("text", "typed_picture", "speech", "spoken_picture", "nothing")
"""What a rank's pack holds: text alone, images, recordings, both; or no sample at all."""

MIXES = [mix for mix in product(KINDS, KINDS) if mix != ("nothing", "nothing")]
FREEZES = [flags for flags in product((False, True), repeat=len(MODULES)) if any(flags)]


@dataclass(frozen=True)
class Setting:
    """A built run, and the steps that it makes: what rank 0 and rank 1 hold in each."""

    engine: str
    tuned: tuple[str, ...]
    lora: bool
    mixes: tuple[tuple[str, str], ...]

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation ends the run: in a quarter of the settings, under every engine."""
        return {"vision_proj", "audio_proj"} <= set(self.tuned)

    def words(self) -> list[str]:
        """The Hydra words of the run; with LoRA every tuned module learns through adapters."""
        lora = ["lora=lora", "lora.dropout=0", f"lora.modules=[{','.join(self.tuned)}]"] if self.lora else []
        return [f"engine={self.engine}", *(f"modules.tune_{name}={name in self.tuned}" for name in MODULES), *lora]

    def alone(self) -> "Setting":
        """The same steps in one process."""
        return Setting("none", self.tuned, self.lora, self.mixes)

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def full_product() -> Iterator[Setting]:
    """Everything: each engine × mix × freeze × tuning, half the mixes of a setting in one run.

    Not all in one: after some thirty updates Adam has made more than 1e-4 of the rounding in small gradients.
    """
    half = len(MIXES) // 2
    for freeze, lora, engine in product(FREEZES, (False, True), ENGINES):
        for mixes in (MIXES[:half], MIXES[half:]):
            yield Setting(engine, _names(freeze), lora, tuple(mixes))


def all_pairs(seed: int) -> Iterator[Setting]:
    """A sample in which any two values of different factors meet.

    The mixes are dealt into as many hands as there are engines. Each freeze meets each engine and each hand, and from
    freeze to freeze an engine takes the next hand.
    """
    mixes = random.Random(seed).sample(MIXES, len(MIXES))
    hands = [tuple(mixes[start :: len(ENGINES)]) for start in range(len(ENGINES))]
    for number, freeze in enumerate(FREEZES):
        for index, engine in enumerate(ENGINES):
            lora = (index + number // len(ENGINES)) % 2 == 1
            yield Setting(engine, _names(freeze), lora, hands[(index + number) % len(hands)])


def pairs_of(settings: list[Setting]) -> set[tuple]:
    """The pairs of values of different factors that the settings contain."""
    found = set()
    for setting in settings:
        for mix in setting.mixes:
            values = (("engine", setting.engine), ("tuned", setting.tuned), ("lora", setting.lora), ("mix", mix))
            found |= {(a, b) for a in values for b in values if a[0] < b[0]}
    return found


def _names(flags: tuple[bool, ...]) -> tuple[str, ...]:
    return tuple(name for name, flag in zip(MODULES, flags, strict=True) if flag)
