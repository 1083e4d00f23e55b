"""The export is what was trained: here, in transformers' own classes, and in vLLM."""

import json
import os
import subprocess
import sys
from base64 import b64encode
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import soundfile
import torch

from train.certificate.lines import Line, compared, failed, skipped
from train.certificate.records import batches, choose
from train.config import Options
from train.data.audio import SAMPLE_RATE, load_clip
from train.data.collate import collate
from train.data.images import load_image
from train.data.record_set import RecordSet
from train.engine.build_data import limits_of
from train.export.base_folder import REPORT
from train.export.check import RELATIVE_TOLERANCE, TOLERANCE, verify
from train.export.checkpoint_reader import complete_checkpoints, read_state, trained_weights
from train.export.from_checkpoint import lora_settings
from train.export.model_folder import faults_of
from train.families.family import Family
from train.families.registry import find
from train.modules.packed import PackedModel
from train.run_folder import RunFolder
from train.schema import Batch, Part, Record, file_of

EXPORT = "export = trained"
TRANSFORMERS = "export in transformers"
VLLM = "export in vLLM"

_RECORDS = 4
"""Records whose log-probabilities are compared."""

_LIMIT_S = 1800
"""Seconds that vLLM may take."""


def export_lines(
    options: Options, base: Path, run: RunFolder, records: RecordSet, vllm_python: Path | None = None
) -> list[Line]:
    """What can be said of a run's export. vllm_python: interpreter of an environment with vLLM; None = this one."""
    if not (run.export / "config.json").is_file():
        why = f"there is no export yet; `omnitune export {run.path}` makes one"
        return [skipped(name, why) for name in (EXPORT, TRANSFORMERS, VLLM)]
    few = choose(records, limits_of(options), _RECORDS)
    if not few:
        return [
            skipped(name, "none of the records that were looked at can be used")
            for name in (EXPORT, TRANSFORMERS, VLLM)
        ]
    family = find(run.export)
    ours = family.load_model(run.export, dtype=torch.float32).eval()
    return [
        _trained_line(options, base, run, records),
        _transformers_line(run.export, family, ours, records, few),
        _vllm_line(run.export, ours, records, few, vllm_python),
    ]


def _trained_line(options: Options, base: Path, run: RunFolder, records: RecordSet) -> Line:
    step = json.loads((run.export / REPORT).read_text(encoding="utf-8"))["step"]
    checkpoint = next((one for one in complete_checkpoints(run.checkpoints) if read_state(one)["step"] == step), None)
    if not checkpoint:
        return skipped(EXPORT, f"the checkpoint of step {step}, of which the export was made, is gone")
    lora = lora_settings(options, find(base)) if options.lora.modules else None
    report = verify(find(base), base, trained_weights(checkpoint), run.export, records.few(), lora)
    figure, tolerance = report["difference"]["logits"], report["tolerance"]["logits"]
    why = f"every tensor bit for bit; logits of {report['tokens']} tokens"
    if report["dtype"] != "float32":
        tolerance, why = None, f"{why}, which storing weights as {report['dtype']} changes"
    return Line(EXPORT, figure, tolerance, report["ok"], why if report["ok"] else faults_of(report))


@torch.no_grad()
def _transformers_line(export: Path, family: Family, ours: PackedModel, records: RecordSet, few: Sequence[int]) -> Line:
    theirs = family.stock_logits(export)
    largest = difference = 0.0
    for batch in batches(records, [[index] for index in few]):
        expected, found = ours.logits(batch), theirs(batch)
        difference = max(difference, float((found - expected).abs().nan_to_num(nan=torch.inf).max()))
        largest = max(largest, float(expected.abs().max()))
    tolerance = max(TOLERANCE, RELATIVE_TOLERANCE * largest)
    return compared(TRANSFORMERS, difference, tolerance, f"logits of {len(few)} records, one by one, fp32")


@torch.no_grad()
def _vllm_line(export: Path, ours: PackedModel, records: RecordSet, few: Sequence[int], python: Path | None) -> Line:
    if not python and not find_spec("vllm"):
        return skipped(VLLM, "vLLM is not installed here; --vllm-python names an environment that has it")
    if records.processor.system_prompt is not None:
        return skipped(VLLM, "data.system_prompt is set, which vLLM's chat template does not know")
    asked = [records.record(index) for index in few]
    with TemporaryDirectory() as folder:
        conversations, answers = Path(folder) / "asked.json", Path(folder) / "answered.json"
        conversations.write_text(json.dumps([_messages(record) for record in asked]), encoding="utf-8")
        command = [str(python or sys.executable), "-m", "train.inference.vllm_plugin.score"]
        command += [str(path.absolute()) for path in (export, conversations, answers)]
        root = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            return failed(VLLM, f"vLLM took longer than {_LIMIT_S} s")
        if done.returncode:
            told = " ".join(done.stderr.split())[-300:]
            return failed(VLLM, f"vLLM ended with code {done.returncode}: {told}")
        said = json.loads(answers.read_text(encoding="utf-8"))
    difference = 0.0
    for record, theirs in zip(asked, said, strict=True):
        sample = records.processor.prompt(record)
        batch: Batch = collate([sample], [0], [0])
        if theirs["ids"] != batch.input_ids.tolist():
            return failed(VLLM, f"vLLM makes other tokens of {record.file}:{record.line}")
        expected = ours.logits(batch).log_softmax(-1)[:-1].gather(1, batch.input_ids[1:, None]).squeeze(1)
        off = (torch.tensor(theirs["log_probabilities"]) - expected).abs().nan_to_num(nan=torch.inf)
        difference = max(difference, float(off.max()))
    return compared(VLLM, difference, TOLERANCE, f"log-probabilities of the prompts of {len(asked)} records, fp32")


def _messages(record: Record) -> list[dict[str, Any]]:
    """A record up to its last answer, in the OpenAI form."""
    turns = record.turns
    last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
    return [{"role": turn.role, "content": [_item(part) for part in turn.parts]} for turn in turns[:last]]


def _item(part: Part) -> dict[str, Any]:
    """A part of a turn; media as they are decoded here, since vLLM may turn images and resample clips otherwise."""
    if part.kind == "text":
        return {"type": "text", "text": part.content}
    file = BytesIO()
    if part.kind == "image":
        load_image(file_of(part.content)).save(file, "PNG")
    else:
        soundfile.write(file, load_clip(part.content), SAMPLE_RATE, format="WAV", subtype="FLOAT")
    form = {"image": "image/png", "audio": "audio/wav"}[part.kind]
    url = f"data:{form};base64,{b64encode(file.getvalue()).decode()}"
    return {"type": f"{part.kind}_url", f"{part.kind}_url": {"url": url}}
