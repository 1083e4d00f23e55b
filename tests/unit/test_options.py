"""Options are honest: the schema knows them, something reads them, and every recipe composes."""

import dataclasses
import errno
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hydra.errors import HydraException
from safetensors import SafetensorError

from train import config, schema
from train.checks.check import check
from train.commands.options import RECIPES, compose_options, message_for_known_error, read_options
from train.config import Options
from train.data import readers
from train.errors import ConfigError, OmniTuneError
from train.families.megrezo.processor import LongAudio

ROOT = Path(__file__).resolve().parents[2]
RECIPE_NAMES = sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.glob("**/*.yaml"))


def leaves(kind: type, prefix: str = "") -> list[str]:
    found = []
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            found += leaves(item.type, f"{prefix}{item.name}.")
        else:
            found.append(prefix + item.name)
    return found


def test_these_are_the_recipes() -> None:
    assert [
        *("align", "asr", "full", "lora", "minicpm_lora", "minicpm_qlora", "qlora", "spoken_qa", "vqa", "websearch")
    ] == RECIPE_NAMES


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_recipe_composes_and_passes_the_checks(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options, _ = compose_options([f"+recipe={recipe}"])
    check(options)
    assert options.run.name == recipe
    assert options.run.dir.startswith(f"outputs/{recipe}/")


@pytest.mark.parametrize(
    "word",
    [f"{file.parent.name}={file.stem}" for file in sorted((ROOT / "train/configs").glob("*/*.yaml"))],
)
def test_every_group_composes(word: str) -> None:
    compose_options([word])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run.max_step=3", "there is no option 'run.max_step'; did you mean run.max_steps?"),
        ("+run.max_step=3", "there is no option 'run.max_step'; did you mean run.max_steps?"),
        ("++run.max_step=3", "there is no option 'run.max_step'; did you mean run.max_steps?"),
        ("run.steps=20", "there is no option 'run.steps'; did you mean run.max_steps?"),
        ("+modules.lr.lm=1", "there is no option 'modules.lr.lm'; did you mean modules.lr.llm?"),
        ("+lr=1", "there is no option 'lr'; did you mean "),
        ("+foo=3", "there is no option 'foo'"),
        ("+run.foo={a: {b: 1}}", "there is no option 'run.foo'"),
        ("data.train=[{path: a, weigth: 2}]", "there is no option 'weigth' of a source; did you mean weight?"),
        ("+data.train=[{path: a, weigth: 2}]", "there is no option 'weigth' of a source; did you mean weight?"),
        ("rum=3", "there is no option 'rum'; did you mean run?"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(word: str, said: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (Hydra's, OmegaConf's or ours: as the user reads it)
        compose_options([word])
    fault = str(message_for_known_error(caught.value))
    assert said in fault
    assert "+" not in fault.replace(word, "")


def test_a_part_beside_one_value_for_all_parts_is_an_error() -> None:
    with pytest.raises(HydraException) as caught:
        compose_options(["run.activation_checkpointing=2", "run.activation_checkpointing.llm=3"])
    assert message_for_known_error(caught.value) == (
        "'run.activation_checkpointing.llm' stands beside 'run.activation_checkpointing', which gives one value to all "
        "its parts; leave out one of the two"
    )


@pytest.mark.parametrize(
    ("words", "paths"),
    [
        (["data.train=photos.jsonl"], ["photos.jsonl"]),
        (["data.train=[a.jsonl,b.jsonl]"], ["a.jsonl", "b.jsonl"]),
        (["data=files", "data.train=[a.jsonl,{path: b.jsonl, weight: 2}]"], ["a.jsonl", "b.jsonl"]),
        (["data.train=null"], []),
    ],
)
def test_a_source_may_be_a_path_alone(words: list[str], paths: list[str]) -> None:
    options, resolved = compose_options(words)
    assert [source.path for source in options.data.train] == paths
    assert [(source["path"], source["format"]) for source in resolved["data"]["train"]] == [
        (path, "auto") for path in paths
    ]


@pytest.mark.parametrize(
    "word",
    ["data.train=[{path:", "photos.jsonl}]", "data.system_prompt=Answer briefly (in French).", "run.name=you there!"],
)
def test_forgotten_quotes_are_named(word: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose_options([word])
    assert f"`{word}` cannot be read as an option" in str(message_for_known_error(caught.value))
    assert "put the whole option in single quotes, such as 'data.train=[{path:" in str(
        message_for_known_error(caught.value)
    )


def test_the_advice_on_quotes_works() -> None:
    options, _ = compose_options(['data.system_prompt="Answer briefly (in French)."'])
    assert options.data.system_prompt == "Answer briefly (in French)."


def test_what_has_free_keys_takes_any() -> None:
    options, _ = compose_options(["+engine.deepspeed.anything={a: {b: 1}}", "+lora.targets.llm=[q]", "lora=lora"])
    assert options.engine.deepspeed == {"anything": {"a": {"b": 1}}}
    assert options.lora.targets == {"llm": ["q"]}


@pytest.mark.parametrize("word", ["lora.rank=16", "lora.rank=8", "lora.alpha=32", "++lora.lr=1e-4"])
def test_an_option_of_lora_without_lora_is_refused(word: str) -> None:
    """Also where it says what the default is: the user believes that there are adapters."""
    name = word.lstrip("+").partition("=")[0]
    with pytest.raises(ConfigError, match=f"{name} is set, but lora.modules is empty.*add lora=lora"):
        compose_options([word])
    compose_options([word, "lora=lora"])
    compose_options([word, "lora.modules=[llm]"])


def broken_configs() -> dict[str, bytes]:
    """Files in the place of a run's config.yaml, by what is wrong with them."""
    laughs = ["a0: &a0 [lol]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return {
        "aliases": "\n".join(laughs).encode(),
        "bytes": b"run: \xff\xfe",
        "yaml": b"run: [",
        "list": b"- run",
        "nothing": b"",
        "depth": b"[" * 200_000,
        "object": b"run: !!python/object/apply:os.getcwd []",
        "unknown": b"run: {max_step: 3}",
        "value": b"run: {max_steps: many}",
        "size": b"#" * 2_000_000,
    }


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", broken_configs())
def test_a_broken_config_of_a_run_is_named(what: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(broken_configs()[what])
    with pytest.raises(OmniTuneError, match=re.escape(f"'{file}'")):
        read_options(file)


def test_a_runs_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    options, resolved = compose_options(["+recipe=lora", "data=sample", "run.name='München'"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert read_options(file) == options


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "run/metrics.jsonl"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_message(error: Exception) -> None:
    said = str(message_for_known_error(error))
    assert str(error) in said
    assert "make room" in said
    assert message_for_known_error(OSError(errno.EIO, "Input/output error")) is None


@pytest.mark.parametrize("option", leaves(Options))
def test_every_field_is_read_somewhere(option: str) -> None:
    """Outside config.py and checks/, the code names each field as an attribute."""
    not_read = {ROOT / "train/config.py", *(ROOT / "train/checks").iterdir()}
    files = set((ROOT / "train").rglob("*.py")) - not_read
    name = option.split(".")[-1]
    read_as_a_whole = {"modules.lr": "asdict(options.modules.lr)", "modules": "tuned_modules(options)"}
    parent = ".".join(option.split(".")[:-1])
    text = "\n".join(file.read_text() for file in files)
    if parent in read_as_a_whole:
        assert read_as_a_whole[parent] in text
    else:
        assert re.search(rf"\.{name}\b", text), f"nothing reads {option}"


@pytest.mark.parametrize(
    ("old", "new"), [("run.save_every=5", "checkpoint.save_every"), ("run.eval_every=5", "eval.every")]
)
def test_an_option_that_was_renamed_is_refused_with_its_new_name(old: str, new: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  of Hydra or of OmegaConf
        compose_options([old])
    assert message_for_known_error(caught.value) == f"the option '{old.split('=')[0]}' is now {new}; write that"


def test_a_runs_options_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("run: {keep_last: 7, eval_every: 3, export_with_code: true, seed: 4}\neval: {max_records: 2}\n")
    options = read_options(file)
    assert (options.checkpoint.keep_last, options.eval.every, options.export.with_code) == (7, 3, True)
    assert (options.run.seed, options.eval.max_records) == (4, 2)


@pytest.mark.parametrize(
    ("words", "llm", "towers"),
    [
        ([], "none", "none"),
        (["run.activation_checkpointing=full"], "full", "full"),
        (["run.activation_checkpointing=2"], "2", "2"),
        (["run.activation_checkpointing.llm=3"], "3", "none"),
        (["model=megrez_3b_omni"], "full", "full"),
        (["model=megrez_3b_omni", "run.activation_checkpointing.towers=none"], "full", "none"),
    ],
)
def test_activation_checkpointing_is_set_for_all_parts_or_apart(words: list[str], llm: str, towers: str) -> None:
    options, resolved = compose_options(words)
    assert vars(options.run.activation_checkpointing) == {"llm": llm, "towers": towers}
    assert resolved["run"]["activation_checkpointing"] == {"llm": llm, "towers": towers}


@pytest.mark.parametrize(("value", "new"), [("true", "full"), ("false", "none")])
def test_activation_checkpointing_as_it_was_is_refused_with_its_new_spelling(
    value: str, new: str, tmp_path: Path
) -> None:
    was = f"run.activation_checkpointing={value}"
    with pytest.raises(ConfigError, match=f"{was} is now run.activation_checkpointing={new}; write that"):
        compose_options([was])
    file = tmp_path / "config.yaml"
    file.write_text(f"run: {{activation_checkpointing: {value}}}")  # of a run of an earlier version
    assert vars(read_options(file).run.activation_checkpointing) == {"llm": new, "towers": new}


def test_choices_named_in_two_rooms_are_the_same() -> None:
    """config.py may import no data code, and data code no options: their choices are held together here."""
    assert [choice.value for choice in config.TooLong] == list(get_args(schema.TooLong))
    assert [choice.value for choice in config.LongAudio] == list(get_args(LongAudio))
    assert set(config.FILE_FORMATS) == {"auto", *readers._FORMATS}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("recipe=full", "Could not override 'recipe'; write +recipe=full"),
        ("+recipe=ful", "\twebsearch"),
        ("data.long_audio=cutt", "Invalid value 'cutt', expected one of [quarantine, cut, split]"),
    ],
)
def test_what_is_written_wrong_is_told_without_jargon(words: str, said: str) -> None:
    with pytest.raises(HydraException) as caught:
        compose_options([words])
    told = message_for_known_error(caught.value)
    assert told
    assert told.endswith(said)
