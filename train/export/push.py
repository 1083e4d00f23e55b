"""A model folder to the Hub, with a model card made from its run."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from train.config import Options
from train.errors import OmniTuneError
from train.export.base_folder import REPORT
from train.run_folder import RunFolder
from train.wording import counted

_PRIVATE = (
    *("model.path", "model.random_from", "run.dir", "run.resume", "run.name"),
    *("data.train", "data.eval", "data.cache", "tracker"),
)
"""Options that hold paths of this machine, or nothing of the model."""

_CARD = "README.md"


@dataclass(frozen=True)
class Source:
    """Records that a model was trained or measured on."""

    name: str
    records: int | None
    """None where the file is gone"""
    held_out: bool


def check_push(name: str) -> str:
    """The token that a push takes. Raises OmniTuneError where there is none, or the name is no name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OmniTuneError(f"--push {name}: {error}") from None
    token = get_token()
    if not token:
        raise OmniTuneError(
            f"--push {name}: there is no token for {constants.ENDPOINT}; log in by `hf auth login`, or set HF_TOKEN"
        )
    return token


def push(folder: Path, name: str, card: str, *, token: str, public: bool = False) -> str:
    """Upload a model folder in one commit, with the card as its README.md; returns the repository's address.

    The repository is made where there is none, private unless `public`. Raises OmniTuneError where the Hub refuses.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents: Iterable[tuple[str, Path | bytes]] = [*files.items(), (_CARD, card.encode())]
    operations = [CommitOperationAdd(place, content) for place, content in dict(contents).items()]
    api = HfApi(token=token)
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.create_commit(address.repo_id, operations, commit_message="Export of OmniTune")
    except (HfHubHTTPError, OSError) as error:
        raise OmniTuneError(f"--push {name}: {error}; the export in '{folder}' is complete") from None
    return str(address)


def model_card(options: Options, base: Path, run: RunFolder, export: Path, sources: Iterable[Source]) -> str:
    """The card of a run's export: base and licence, data by name and count, options, metrics. It holds no path."""
    about = _front_matter(base / _CARD)
    name = _base_name(options, base)
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["omnitune"]}
    if name:
        head["base_model"] = name
    head |= {key: about[key] for key in ("license", "license_name", "license_link", "language") if key in about}
    licence = about.get("license_name") or about.get("license")
    made = json.loads((export / REPORT).read_text(encoding="utf-8"))
    start = f"`{name}`" if name else "random weights"
    steps = counted(made["step"], "step")
    data = [(one.name, "-" if one.records is None else one.records, _USE[one.held_out]) for one in sources]
    options_rows = [(f"`{key}`", f"`{value}`") for key, value in _changed(options)]
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
        f"# {name.rpartition('/')[2] or 'A model'}, {options.run.name}",
        f"Trained with OmniTune from {start}: {steps} ({made['mode']}), stored as {made['dtype']}.",
        (f"**Licence of the base:** {licence}." if licence else _UNKNOWN_LICENCE) if name else "",
        f"## Data\n\n{_table(('source', 'records', 'use'), data)}",
        _metrics(run.metrics, made["step"]),
        f"## Options that differ from the defaults\n\n{_table(('option', 'value'), options_rows)}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


_USE = {False: "trained on", True: "held out"}
_UNKNOWN_LICENCE = "**Licence of the base:** its folder does not say; look it up before you share this."


def _base_name(options: Options, base: Path) -> str:
    """The base's name on the Hub where its folder tells it, else the folder's own; "" for random weights."""
    if not options.model.path:
        return ""
    snapshot = base.absolute()
    if snapshot.parent.name == "snapshots" and snapshot.parents[1].name.startswith("models--"):
        return snapshot.parents[1].name.removeprefix("models--").replace("--", "/")
    return base.resolve().name


def _front_matter(card: Path) -> dict[str, Any]:
    """What the base's own card says of itself in its YAML head; nothing where it has none that can be read."""
    try:
        _, head, _ = card.read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _metrics(file: Path, step: int) -> str:
    """The evaluation after a step, as a table."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    for values in map(json.loads, filter(None, reversed(lines))):
        if values["step"] == step and "eval/loss" in values:
            rows = [(f"`{name}`", f"{value:.4f}") for name, value in values.items() if _is_figure(name, value)]
            return f"## Metrics on the held-out records\n\n{_table(('metric', 'value'), rows)}"
    return ""


def _is_figure(name: str, value: Any) -> bool:
    return name.startswith("eval/") and isinstance(value, float | int) and math.isfinite(value)


def _changed(options: Options) -> Iterator[tuple[str, Any]]:
    """(name, value) of options that differ from the defaults, without those that are private."""
    mine, usual = (_flat(json.loads(json.dumps(asdict(of)))) for of in (options, Options()))
    for name, value in mine.items():
        if value != usual.get(name) and not any(f"{name}.".startswith(f"{private}.") for private in _PRIVATE):
            yield name, value


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
