"""What all that looks at a run before it begins needs first: its model's folder, its records and their lengths."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from train.announce import SILENCE_S
from train.checks.chosen import model_folder
from train.config import Options
from train.data.lengths import LengthCache
from train.data.loader import StepPlan
from train.data.record_set import BadNote, Measured, RecordSet
from train.engine.build_data import flops_of, length_cache, make_plan, read_speeds
from train.engine.terminal import progress_bar
from train.families.family import Family
from train.families.registry import find
from train.schema import Processor
from train.sources import load_processor, open_records


@dataclass
class Prepared:
    """A run that has not begun: options, model folder, records."""

    options: Options
    folder: Path
    family: Family
    processor: Processor
    sets: dict[str, RecordSet]
    """by the option that names them: data.train, and data.eval where there is one"""

    @cached_property
    def measured(self) -> dict[str, tuple[Measured, list[BadNote]]]:
        """Lengths of the records of each set, and why others cannot be used; as training measures and keeps them."""
        return self._measure(self.sets, length_cache(self.options, self.folder))

    def plan(self, measured: Measured | None = None) -> StepPlan:
        """The steps of the run. measured: of data.train, where that is known already."""
        flops = flops_of(self.options, self.family, self.folder)
        records, measured = self.sets["data.train"], measured or self.measured["data.train"][0]
        speeds = read_speeds(self.options, self.folder, records, measured, self._measure)
        return make_plan(self.options, flops, records, measured, speeds)

    @staticmethod
    def _measure(sets: Mapping[str, RecordSet], cache: LengthCache | None) -> dict[str, tuple[Measured, list[BadNote]]]:
        found = {}
        for name, records in sets.items():
            with progress_bar(f"measuring {name}: record", len(records), delay_s=SILENCE_S) as bar:
                found[name] = records.measure(cache, bar.update)
        return found


def prepare(options: Options) -> Prepared:
    """Open what the options name. Raises OmniTuneError where that is not there, or cannot be read."""
    folder = Path(model_folder(options)[1])
    family = find(folder)
    processor = load_processor(options, family, folder)
    sources = {"data.train": options.data.train, "data.eval": options.data.eval}
    sets = {name: open_records(options, given, processor) for name, given in sources.items() if given}
    return Prepared(options, folder, family, processor, sets)
