"""The documentation names only what exists: links, files, commands with their flags, options."""

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from train.checks.check import check
from train.commands.main import COMMANDS
from train.commands.options import compose_options
from train.config import Options
from train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md", "benchmarks/README.md"),
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")),
]
GROUPS = {item.name for item in fields(Options)}
FOLDERS = ("benchmarks", "data", "docs", "recipes", "tests", "train")
MOST_LINES = 140

CODE_BLOCK = re.compile(r"^```.*?^```$|^(?: {4,}\S[^\n]*\n)+", re.M | re.S)
SHELL_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.M)
OPTION = re.compile(rf"\+{{0,2}}(?:(?:{'|'.join(GROUPS)})(?:\.\w+)*|recipe)=.*")
OPTION_NAME = re.compile(rf"(?:{'|'.join(GROUPS)})(?:\.[a-z_0-9]+)+")
OUR_FILE = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*")
FILE_NAME = re.compile(r".*\.(?:py|md|json|jsonl|jinja|yaml|parquet)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(CODE_BLOCK.sub("", text))]
    return {heading.replace(" ", "-") for heading in plain}


def broken_links(text: str, page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(CODE_BLOCK.sub("", text)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8") if file else text)):
            broken.append(target)
    return broken


def missing_files(text: str, page: Path) -> list[str]:
    """Files of the project in inline code that do not exist; NAME stands for any name."""
    named = [word for word in INLINE_CODE.findall(CODE_BLOCK.sub("", text)) if OUR_FILE.fullmatch(word)]
    return [word for word in named if "NAME" not in word and not (ROOT / word).exists()]


def shell_lines(text: str) -> list[list[str]]:
    """The words of each line in the page's blocks of shell commands, without comments."""
    lines = "\n".join(SHELL_BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        try:
            found.append(shlex.split(line, comments=True))
        except ValueError:  # a part of a here-document
            continue
    return found


class _Refused(Exception):
    pass


class _Parser(ArgumentParser):
    def error(self, message: str) -> None:
        raise _Refused(message)


def wrong_commands(text: str, page: Path) -> list[str]:
    """Lines with an `omnitune` command that its parser does not take."""
    wrong = []
    lines = shell_lines(text)
    for words in [*lines, *(code.split() for code in INLINE_CODE.findall(text) if code.startswith("omnitune "))]:
        at = [n for n, word in enumerate(words) if word.split("/")[-1] in ("omnitune", "train.commands.main")]
        if not at or words[at[0] + 1 :] in ([], ["<command>"]):
            continue
        name, *rest = words[at[0] + 1 :]
        if name == "--version":
            continue
        if name not in COMMANDS:
            wrong.append(" ".join(words))
            continue
        parser = _Parser()
        COMMANDS[name].arguments(parser)
        if words in lines:
            try:
                parser.parse_intermixed_args(rest)
            except _Refused as fault:
                wrong.append(f"{' '.join(words)}: {fault}")
        elif any(word.startswith("--") and word not in parser.format_help() for word in rest):
            wrong.append(" ".join(words))
    return wrong


def wrong_runs(text: str, page: Path) -> list[str]:
    """Lines that start training, whose options do not compose or do not pass the checks."""
    wrong = []
    for words in shell_lines(text):
        options = [word for word in words if OPTION.fullmatch(word)]
        if not options or COMMANDS.keys() & set(words):
            continue
        if "-m" in words:  # a sweep: the first value of each
            options = [re.sub(r"^([^,\[{]*),.*", r"\1", word) for word in options]
        if fault := _fault(lambda options=options: _check_all_but_paths(options)):
            wrong.append(f"{' '.join(words)}: {fault}")
    return wrong


def wrong_options(text: str, page: Path) -> list[str]:
    """Options in inline code, with a value or without, that do not exist."""
    wrong = []
    for code in INLINE_CODE.findall(CODE_BLOCK.sub("", text)):
        words = [word.strip("'") for word in (code.split() if "[{" not in code else [code])]
        options = [word for word in words if OPTION.fullmatch(word) and not word.endswith("=NAME")]
        if len(options) == 1 and options[0].endswith("="):  # a group, or an option, without a choice
            options = [] if options[0][:-1] in GROUPS else [options[0] + "null"]
        if any(word.startswith("lora.") for word in options) and "lora=lora" not in options:
            options.append("lora=lora")
        if options and (fault := _fault(lambda options=options: compose_options(options))):
            wrong.append(f"{code}: {fault}")
        if OPTION_NAME.fullmatch(code) and not FILE_NAME.fullmatch(code) and not _is_option(code):
            wrong.append(code)
    return wrong


def _check_all_but_paths(words: list[str]) -> None:
    """A page's folders and files are the reader's."""
    options, _ = compose_options(words)
    try:
        check(options)
    except ConfigError as error:
        if faults := [fault for fault in error.problems if "there is no f" not in fault]:
            raise ConfigError(faults) from None


def _fault(done: Callable[[], object]) -> str:
    try:
        done()
    except Exception as fault:
        return " ".join(str(fault).split())
    return ""


def _is_option(name: str) -> bool:
    kind: object = Options()
    for part in name.split("."):
        if not is_dataclass(kind) or not hasattr(kind, part):
            return False
        kind = getattr(kind, part)
    return True


CHECKS = [broken_links, missing_files, wrong_commands, wrong_runs, wrong_options]


@pytest.mark.parametrize("look", CHECKS, ids=lambda look: look.__name__)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_what_exists(
    page: str, look: Callable[[str, Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = ROOT / page
    assert look(file.read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (broken_links, "[a page](docs/none.md)"),
        (broken_links, "[a heading](docs/data.md#none)"),
        (broken_links, "# Here\n[a heading](#there)"),
        (missing_files, "see `train/none.py`"),
        (wrong_commands, "```bash\nomnitune none outputs/full\n```"),
        (wrong_commands, "```bash\n.venv/bin/omnitune chat outputs/full --picture a.png\n```"),
        (wrong_commands, "use `omnitune chat --picture`"),
        (wrong_runs, "```bash\n./launch.sh +recipe=none\n```"),
        (wrong_runs, "```bash\n./launch.sh +recipe=full engine=zero4\n```"),
        (wrong_runs, "```bash\n./launch.sh \\\n    run.max_step=3\n```"),
        (wrong_runs, "```bash\n./launch.sh +recipe=full lora.rank=8\n```"),
        (wrong_options, "set `run.max_step=3`"),
        (wrong_options, "set `run.max_step`"),
        (wrong_options, "set `model=none`"),
        (wrong_options, "set `'data.train=[{path: a, weigth: 2}]'`"),
    ],
)
def test_what_does_not_exist_is_found(look: Callable[[str, Path], list[str]], text: str) -> None:
    assert len(look(text, ROOT / "README.md")) == 1


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    pages = {page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {target.partition("#")[0] for target in LINK.findall(text)}
