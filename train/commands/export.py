"""Make a model folder from a checkpoint of a run, or a model folder in another form."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from train.errors import CheckpointError

if TYPE_CHECKING:
    from train.config import Options
    from train.data.record_set import RecordSet
    from train.run_folder import RunFolder


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's words."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a run's folder (its newest checkpoint), or one checkpoint in it; with --as a model folder too",
    )
    parser.add_argument("--out", type=Path, help="where to write; default: export/ in the run's folder")
    extras = parser.add_mutually_exclusive_group()
    extras.add_argument("--as", dest="form", help="another form that computes the same: MiniCPM as llama, and back")
    extras.add_argument(
        "--with-code", action="store_true", help="add the model's code: loads without OmniTune (trust_remote_code=True)"
    )
    parser.add_argument("--data", type=Path, help="records to check the export by; default: the run's own")
    parser.add_argument("--push", metavar="NAME", help="upload it to the Hub as NAME (user/model), with a model card")
    parser.add_argument("--public", action="store_true", help="let --push make a public repository; default: private")
    parser.add_argument("--root", type=Path, help="folder of the media of --data; default: the file's own")


def run(chosen: argparse.Namespace) -> None:
    """Export, check, and say where to."""
    from train.export.convert import convert

    if chosen.push:
        _push(chosen)
        return
    if chosen.out:
        _check_free(chosen.out)
    if not chosen.form:
        print("exported {} to {}".format(*_export(chosen, chosen.out)))
        return
    if not chosen.out:
        raise CheckpointError("--as needs --out, the folder to write to")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=chosen.out.parent) as aside:
        folder = chosen.checkpoint
        if not (folder / "config.json").is_file():
            folder = Path(aside) / "export"
            _export(chosen, folder)
        convert(folder, chosen.form, chosen.out)
    print(f"converted to {chosen.out}")


def _push(chosen: argparse.Namespace) -> None:
    """Upload the export of a run, which is made where it is not there yet."""
    from train.export.from_checkpoint import is_export_of
    from train.export.push import Source, check_push, model_card, push
    from train.sources import source_specs

    if chosen.form:
        raise CheckpointError("--push uploads the export of a run, and not another form of it; leave out --as")
    token = check_push(chosen.push)
    checkpoint, folder, options, base = _run_of(chosen)
    out = chosen.out or folder.export
    if not is_export_of(checkpoint, out, options):
        _export(chosen, chosen.out)
    sources = []
    for held_out, given in ((False, options.data.train), (True, options.data.eval)):
        for spec in source_specs(given):
            sources.append(Source(spec.name, _count(spec.path, spec.format), held_out))
    card = model_card(options, base, folder, out, sources)
    print(f"pushed {out} to {push(out, chosen.push, card, token=token, public=chosen.public)}")


def _count(path: str, form: str) -> int | None:
    """The records of a file; None where it is gone."""
    from train.data.readers import open_source

    return len(open_source(path, form)) if Path(path).is_file() else None


def _export(chosen: argparse.Namespace, out: Path | None) -> tuple[Path, Path]:
    """Write a model folder; returns the checkpoint that it was made of, and the folder."""
    from train.export.from_checkpoint import export_checkpoint

    checkpoint, folder, options, base = _run_of(chosen)
    out = out or folder.export
    _check_free(out)
    export_checkpoint(options, base, checkpoint, out, _records(options, base, chosen.data, chosen.root))
    return checkpoint, out


def _run_of(chosen: argparse.Namespace) -> "tuple[Path, RunFolder, Options, Path]":
    """The checkpoint that is meant, its run's folder and options, and the model that the run started from."""
    from train.commands.options import read_options
    from train.export.checkpoint_reader import newest_whole
    from train.run_folder import RunFolder

    checkpoint = newest_whole(chosen.checkpoint)
    folder = RunFolder(checkpoint.parent.parent)
    if not folder.config.is_file():
        raise CheckpointError(f"'{folder.path}' has no config.yaml, so '{checkpoint}' is not a checkpoint of a run")
    options = read_options(folder.config)
    options.export.with_code |= chosen.with_code
    base = Path(options.model.path) if options.model.path else folder.initial_model
    return checkpoint, folder, options, base


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"'{out}' is no folder; name another with --out")
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"'{out}' is there already; name another folder with --out, or delete it")


def _records(options: "Options", base: Path, data: Path | None, root: Path | None) -> "RecordSet":
    """The run's held-out records, or those of training, or those of `data`."""
    from train.config import SourceOptions
    from train.families.registry import find
    from train.sources import load_processor, open_records

    sources = options.data.eval or options.data.train
    if data:
        sources = [SourceOptions(path=str(data), root=str(root) if root else None)]
    for source in sources:
        if not Path(source.path).is_file():
            raise CheckpointError(
                f"the export is checked by records, and there is no file '{source.path}'; name one with --data"
            )
    return open_records(options, sources, load_processor(options, find(base), base))
