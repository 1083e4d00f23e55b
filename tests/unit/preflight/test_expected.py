"""What is said where memory runs out, and which settings are named."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.runs import write_records, write_small_model
from train.commands.options import compose_options
from train.config import OptimizerName
from train.engine.build import Planned
from train.errors import TrainingError
from train.preflight.expected import Expectation
from train.preflight.fitting import Choice, Way, choices, table_text
from train.preflight.prepare import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("expected")
    model = write_small_model(folder)
    words = [
        f"model.random_from={model}",
        *write_records(folder),
        "data.workers=0",
        "data.cache=null",
        "engine=none",
        *LIMITS,
    ]
    return prepare(compose_options([*words, "tracker=none"])[0])


@pytest.fixture(scope="module")
def found(prepared) -> list[Choice]:
    plan, records = prepared.plan(), prepared.sets["data.train"]
    return choices(prepared.options, prepared.family, prepared.folder, plan, records, gpus=1)


HALVED = "data.max_tokens=512 data.max_patches=4096 data.max_frames=3000"
LIMITS = ["data.max_tokens=1024", "data.max_patches=8192", "data.max_frames=6000"]


def by_changes(found: list[Choice]) -> dict[str, Choice]:
    return {" ".join(choice.changes): choice for choice in found}


def test_choices_name_what_differs_from_the_runs_own_options(found: list[Choice]) -> None:
    named = by_changes(found)
    own = named[""]
    assert len(named) == len(found)
    for words in ("run.activation_checkpointing=full", HALVED):
        assert named[words].memory.activations < own.memory.activations
    assert named["lora=lora"].memory.gradients < own.memory.gradients
    assert named["lora=qlora"].memory.weights < named["lora=lora"].memory.weights
    assert named["engine=zero2_offload"].memory.optimizer == 0
    assert named["run.activation_checkpointing=full"].work == pytest.approx(4 / 3)
    # AdamW's moments take 8 bytes a value, in 8 bits 2 and a scale of 4 for each 256.
    eighth = named["optim.name=adamw_8bit"].memory.optimizer / own.memory.optimizer
    assert eighth == pytest.approx((2 + 8 / 256) / 8, rel=0.01)
    muon = named["optim.name=muon"].memory.optimizer / own.memory.optimizer
    assert 0.5 < muon < 1  # one moment of matrices, two of the rest


def test_words_that_are_pasted_make_the_options_that_were_measured(prepared, found: list[Choice]) -> None:
    folder = prepared.folder
    for choice in found:
        made = compose_options([f"model.random_from={folder}", *choice.way.words()])[0]
        assert Way.of(made) == choice.way
        applied = choice.way.applied(prepared.options)
        assert (made.lora.modules, made.lora.load_in_4bit) == (applied.lora.modules, applied.lora.load_in_4bit)


def test_the_table_has_every_choice_once(prepared, found: list[Choice]) -> None:
    head, *rows = table_text(prepared.options, found, (16, 24)).splitlines()
    assert "(16  24)" in head
    assert len(set(rows)) == len(rows) == len(found)
    assert all(" x   x " in row for row in rows)
    assert {word for row in rows for word in row.split() if word.startswith("optim.name=")} == {
        f"optim.name={name}" for name in OptimizerName
    }


def test_halved_limits_leave_no_record_out(prepared, found: list[Choice]) -> None:
    longest = prepared.measured["data.train"][0].lengths.max(axis=0)
    assert all((longest <= choice.way.limits).all() for choice in found)


def test_limits_that_no_pack_reaches_are_not_halved(prepared) -> None:
    """Half of what the whole set needs twice over makes the same packs."""
    options = deepcopy(prepared.options)
    options.data.max_tokens, options.data.max_patches, options.data.max_frames = 2**20, 2**20, 2**20
    roomy = replace(prepared, options=options)
    plan, records = roomy.plan(), roomy.sets["data.train"]
    found = choices(options, roomy.family, roomy.folder, plan, records, gpus=1)
    assert {choice.way.limits for choice in found} == {(2**20,) * 3}


def test_an_error_of_memory_says_what_to_change(prepared) -> None:
    expectation = Expectation(prepared.options)
    plan, records = prepared.plan(), prepared.sets["data.train"]
    planned = Planned(prepared.family, prepared.folder, plan, records, torch.device("cpu"), ranks=1, is_main=True)
    assert expectation(planned) is None  # on a CPU only where it is asked for
    with pytest.raises(TrainingError) as raised, expectation.explained():
        torch.empty(2**60)
    said = str(raised.value)
    assert "memory ran out ([enforce fail at alloc_cpu" in said
    assert "  run.activation_checkpointing=full\n" in said
    assert "needs a new run.dir" in said


def evaluate() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_an_evaluation_has_options_of_its_own(prepared) -> None:
    with (
        pytest.raises(TrainingError, match=r"lower eval.batch_size \(it is 32\)"),
        Expectation(prepared.options).explained(),
    ):
        evaluate()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")])
def test_before_the_plan_is_known_the_command_is_named(prepared, error: BaseException) -> None:
    with (
        pytest.raises(TrainingError, match="`omnitune plan --table`") as raised,
        Expectation(prepared.options).explained(),
    ):
        raise error
    assert "More of it" not in str(raised.value)


def test_other_errors_stay_what_they_are(prepared) -> None:
    with pytest.raises(RuntimeError, match="of another kind"), Expectation(prepared.options).explained():
        raise RuntimeError("of another kind")


def test_a_model_that_reads_text_alone_has_its_choices_too(tmp_path: Path) -> None:
    words = ["model=tiny_instruct", "data=text", "data.workers=0", "data.cache=null", "engine=zero2"]
    text = prepare(compose_options([*words, "tracker=none", "modules.tune_llm=true"])[0])
    plan, records = text.plan(), text.sets["data.train"]
    named = by_changes(choices(text.options, text.family, text.folder, plan, records, gpus=8))
    assert {"", "engine=ddp", "engine=zero3", "engine=ddp optim.name=muon", "lora=qlora engine=ddp"} <= set(named)
