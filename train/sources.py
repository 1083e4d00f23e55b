"""Options into records: the sources, and the processor that reads them."""

from itertools import count
from pathlib import Path

from train.config import Options, SourceOptions
from train.data.augment import Augmentation, Augmenter
from train.data.record_set import RecordSet, SourceSpec
from train.data.workers import Workers
from train.errors import ConfigError
from train.families.family import Family
from train.schema import Processor


def source_specs(sources: list[SourceOptions]) -> list[SourceSpec]:
    """The sources with their media folders and names filled in; a name that is taken gets a number."""
    specs: list[SourceSpec] = []
    for source in sources:
        name = first = source.name or Path(source.path).stem
        taken = {spec.name for spec in specs}
        for number in count(2):
            if name not in taken:
                break
            name = f"{first}-{number}"
        root = source.root or str(Path(source.path).parent)
        specs.append(SourceSpec(name=name, path=source.path, root=root, weight=source.weight, format=source.format))
    return specs


def load_processor(options: Options, family: Family, folder: Path) -> Processor:
    """The processor of a model folder, set as the data options say."""
    processor = family.load_processor(folder)
    processor.long_audio = str(options.data.long_audio)
    if (places := options.data.image_places) is not None:
        if not hasattr(processor, "image_places"):
            raise ConfigError([f"data.image_places: a {family.name} model has no such budget; leave it out"])
        processor.image_places = places
    if options.data.system_prompt is not None:
        processor.system_prompt = options.data.system_prompt
    return processor


def open_records(
    options: Options, sources: list[SourceOptions], processor: Processor, *, speed: float = 1.0
) -> RecordSet:
    """The records of the sources, bounded and read as the data options say; speed: at which they are measured."""
    data = options.data
    return RecordSet(
        source_specs(sources),
        processor,
        max_tokens=data.max_tokens,
        too_long=data.too_long.value,
        workers=Workers(data.workers, data.prefetch, data.decode_limit_s),
        speed=speed,
    )


def make_augmenter(options: Options) -> Augmenter | None:
    """What changes media in training; None where nothing does. OmniTuneError where torchaudio is needed and absent."""
    of_sources = augmentations(options)
    return Augmenter(of_sources, options.run.seed) if any(of_sources) else None


def augmentations(options: Options) -> list[Augmentation | None]:
    """What is changed in the media of each source of training; None where nothing is."""
    found = [Augmentation(**vars(source.augment or options.data.augment)) for source in options.data.train]
    return [settings if settings.is_on else None for settings in found]
