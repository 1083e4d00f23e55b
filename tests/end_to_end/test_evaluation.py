"""Evaluation inside a run: held-out files that hang, answers that are cut, and a request to stop."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.end_to_end.test_killed import start, steps_done, wait_for
from tests.end_to_end.test_workers import treacherous_set
from tests.runs import launch, metrics, succeed, write_endless_model, write_records, write_small_model
from tests.unit.data.test_loader import record_set
from train.data.collate import collate
from train.export.model_folder import write_random_model
from train.families.registry import find
from train.launcher.failure import STOPPED

pytestmark = pytest.mark.end_to_end

UNMEASURED, UNDECODED, UNASKED = 5, 9, 14
"""Records at which measuring, decoding and prompting hang."""


def write_easily_ended_model(folder: Path) -> Path:
    """A small random model for which half of the tokens end a turn; returns its folder."""
    export = folder / "export"
    write_random_model(write_small_model(folder), export, seed=0)
    size = json.loads((export / "config.json").read_text())["vocab_size"]
    (export / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, size, 2))}))
    return export


def test_held_out_files_that_hang_cost_their_records_once(tmp_path: Path) -> None:
    """On two ranks, in two evaluations, of which each decodes a record twice: as a conversation and as a prompt."""
    model_folder = write_easily_ended_model(tmp_path)
    family = find(model_folder)
    processor = family.load_processor(model_folder)
    hangs = {UNMEASURED: "measure hangs", UNDECODED: "encode hangs", UNASKED: "prompt hangs"}
    treacherous_set(tmp_path, processor, hangs)
    succeed([str(tmp_path)], processes=2, script="tests/end_to_end/evaluation_of.py")
    found = json.loads((tmp_path / "found-2.json").read_text())

    tries = (tmp_path / "tries").read_text().splitlines()
    for hang in hangs.values():
        assert tries.count(hang) == 2, hang  # tried once more, whichever rank has it next
    assert found["unmeasured"] == [UNMEASURED + 1]
    assert [index for index, lengths in enumerate(found["measured"]) if not lengths[0]] == [UNMEASURED]
    assert found["types"][:3] == [json.loads(line)["type"] for line in (tmp_path / "train.jsonl").open()][:3]
    first, second = found["evaluations"]
    answered = [index for index in range(24) if index not in hangs]
    for evaluation in (first, second):
        assert [line["line"] for line in evaluation["predictions"]] == [index + 1 for index in answered]
        assert {note["line"] for note in evaluation["bad"]} == {UNDECODED + 1, UNASKED + 1}
        assert all("took over 2 s" in note["reason"] for note in evaluation["bad"])

    # the figures of the records that are left, by the model's own loss and longer answers of one prompt at a time
    model = family.load_model(model_folder).eval()
    records = record_set(tmp_path, processor)
    for evaluation, used in ((first, [*answered, UNASKED]), (second, answered)):
        outputs = [records.batch([index])[0] for index in used]
        loss = sum(float(model(batch=batch).loss_sum.detach()) for batch in outputs)
        weight = sum(float(batch.loss_weights.sum()) for batch in outputs)
        assert evaluation["values"]["eval/loss"] == pytest.approx(loss / weight, rel=1e-5)
    cut = []
    for index in answered:
        prompt = record_as_batch(records, index)
        [answer] = model.generate(prompt, max_new_tokens=8, do_sample=False)
        cut.append(len(answer) >= 2)
    assert 0 < sum(cut) < len(cut)
    assert first["values"]["eval/cut_answers"] == pytest.approx(sum(cut) / len(cut))


def record_as_batch(records: Any, index: int) -> Any:
    """The prompt of a record."""
    return collate([records.processor.prompt(records.record(index))], [0], [index])


@pytest.mark.parametrize(("processes", "engine", "first"), [(2, "zero3", False), (1, "none", True)])
def test_a_run_asked_to_stop_while_it_evaluates_stops_between_batches(
    tmp_path: Path, processes: int, engine: str, first: bool
) -> None:
    """Its last evaluation is made by the run that goes on; of the first nothing is left to keep."""
    command = [
        *write_records(tmp_path, train=24, held_out=300),
        *(f"model.path={write_endless_model(tmp_path)}", f"run.dir={tmp_path / 'run'}", "tracker=none"),
        *("run.max_steps=2", "run.epochs=9", "data.max_tokens=256", "data.workers=1", "run.threads=1"),
        *(f"engine={engine}", "run.precision=fp32", f"eval.before_training={first}".lower(), "run.packs_per_step=2"),
    ]
    run = tmp_path / "run"
    process = start([*command, "eval.batch_size=1", "eval.max_new_tokens=128"], processes)
    if first:
        wait_for(lambda: (run / "config.yaml").exists(), process)
    else:
        wait_for(lambda: steps_done(run) == 2, process)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)  # the evaluation takes many minutes
    assert process.returncode == STOPPED, said[-3000:]
    assert "Traceback" not in said
    assert not (run / "export").exists()
    assert [folder.name for folder in (run / "checkpoints").glob("step-*")] == ([] if first else ["step-000002"])
    assert not [line for line in metrics(run) if "eval/loss" in line]

    succeed([*command, "eval.max_records=4", "eval.max_new_tokens=2"], processes=processes)
    evaluated = [line["step"] for line in metrics(run) if "eval/loss" in line]
    assert evaluated == ([0, 2] if first else [2])
    assert [line["eval/cut_answers"] for line in metrics(run) if "eval/loss" in line] == [1.0] * len(evaluated)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2]
    assert (run / "export" / "export.json").exists()


def test_a_resume_over_changed_media_is_refused(tmp_path: Path) -> None:
    """An image is made larger in place: the packs would be others, and larger than `data.max_tokens`."""
    Image.new("RGB", (112, 112)).save(tmp_path / "a.png")
    asked = {"role": "user", "content": {"text": "What is it?", "image": "a.png"}}
    lines = [{"conversations": [asked, {"role": "assistant", "content": f"Number {n}."}]} for n in range(12)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [
        *(f"data.train=[{{path: {tmp_path / 'train.jsonl'}}}]", "data.eval=[]", f"data.cache={tmp_path / 'cache'}"),
        *(f"model.random_from={write_small_model(tmp_path)}", f"run.dir={tmp_path / 'run'}", "tracker=none"),
        *("run.max_steps=1", "run.epochs=9", "data.max_tokens=512", "data.workers=1", "run.threads=1", "engine=none"),
    ]
    succeed(command)
    Image.new("RGB", (448, 112)).save(tmp_path / "a.png")
    done = launch([*command, "run.max_steps=2"])
    assert done.returncode == 1
    assert "was made with other data" in done.stderr
    assert f"with model.path={tmp_path / 'run' / 'export'}" in done.stderr
    assert "Traceback" not in done.stderr
