"""The text relatives: trained in full, by LoRA and QLoRA on two ranks as on one; loaded by stock transformers."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.runs import build_here, launch, losses, metrics, trained_model, write_records
from train.commands.main import main
from train.errors import ConfigError
from train.export.convert import convert

pytestmark = pytest.mark.end_to_end

MODELS = ("tiny_instruct", "tiny_minicpm")
TUNINGS = ("none", "lora", "qlora")
ENGINES = ("ddp", "zero3")


def words(model: str, tuning: str, engine: str, folder: Path) -> list[str]:
    """Three steps of two packs."""
    return [
        *(f"model={model}", "data=text", f"lora={tuning}", f"engine={engine}", f"run.dir={folder}"),
        *(
            "run.max_steps=3",
            "run.packs_per_step=2",
            "checkpoint.save_every=0",
            "data.max_tokens=128",
            "data.workers=0",
        ),
        *("optim.warmup_ratio=0", "optim.schedule=constant", "optim.eps=1e-6", "tracker=none"),
        *("eval.max_records=6", "eval.max_new_tokens=4", "eval.before_training=false"),
        *(["lora.dropout=0"] if tuning != "none" else []),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders <model>-<tuning>-<engine> of runs on two ranks, and of their like on one (engine none)."""
    folder = tmp_path_factory.mktemp("text")
    for processes, engines in ((1, ("none",)), (2, ENGINES)):
        wanted = [
            words(model, tuning, engine, folder / f"{model}-{tuning}-{engine}")
            for model, tuning, engine in product(MODELS, TUNINGS, engines)
        ]
        listed = folder / f"runs-{processes}.json"
        listed.write_text(json.dumps(wanted))
        done = launch([str(listed)], processes=processes, script="tests/end_to_end/runs_of.py")
        assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize(("model", "tuning", "engine"), list(product(MODELS, TUNINGS, ENGINES)))
def test_two_ranks_equal_one(model: str, tuning: str, engine: str, runs: Path) -> None:
    mine, reference = (runs / f"{model}-{tuning}-{name}" for name in (engine, "none"))
    assert losses(mine) == pytest.approx(losses(reference), abs=1e-4)
    assert losses(mine)[-1] < losses(mine)[0]
    evaluations = [metrics(run)[-1] for run in (mine, reference)]
    assert evaluations[0] == pytest.approx(evaluations[1], abs=1e-4)
    weights, expected = (load_file(run / "export/model.safetensors") for run in (mine, reference))
    base = load_file(mine / "initial_model/model.safetensors")
    assert weights.keys() == expected.keys() == base.keys()
    for name, weight in weights.items():
        assert (weight - expected[name]).abs().max() < 2e-3, name
        is_adapted = name.endswith("_proj.weight")
        assert weight.equal(base[name]) != (tuning == "none" or is_adapted), name
    assert (mine / "export/adapter/adapter_model.safetensors").is_file() == (tuning != "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("modules.tune_vision_encoder=true", "modules.tune_vision_encoder: there is no such module, a megrez-instruct"),
        ("lora.modules=[llm,audio_proj]", "lora.modules: there is no module 'audio_proj', a megrez-instruct"),
    ],
)
def test_modules_that_are_absent_are_refused(given: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build_here([*words("tiny_instruct", "lora", "none", tmp_path), given])
    [fault] = caught.value.problems
    assert fault.startswith(f"{said} model has only llm")


def test_a_record_with_an_image_is_set_aside(tmp_path: Path) -> None:
    data = write_records(tmp_path, train=20, held_out=20)
    run = build_here([*words("tiny_instruct", "none", "none", tmp_path / "run"), *data, "data.max_bad_fraction=1"])
    quarantined = [json.loads(line)["reason"] for line in (run.folder.quarantine).read_text().splitlines()]
    assert quarantined
    for reason in quarantined:
        assert re.search(r"it holds an (image|audio), and this model reads text alone; take it out$", reason)


def test_one_matrix_stays_embedding_and_head(runs: Path) -> None:
    keys = load_file(runs / "tiny_minicpm-none-zero3/export/model.safetensors").keys()
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys


@pytest.mark.parametrize(("model", "tuning"), list(product(MODELS, ("none", "lora"))))
def test_stock_transformers_computes_what_was_trained(model: str, tuning: str, tmp_path: Path) -> None:
    run = build_here([*words(model, tuning, "none", tmp_path / "run"), "eval.generate=false"])
    run.trainer.fit()
    trained = trained_model(run)
    exported = run.export()
    if model == "tiny_minicpm":
        convert(exported, "llama", tmp_path / "llama")
        exported = tmp_path / "llama"
    stock = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    assert type(stock) is transformers.LlamaForCausalLM
    batch = next(iter(run.trainer.steps_from(0, 0))).batches[0]
    with torch.no_grad():
        for ids in batch.input_ids.split(batch.cu_seqlens.diff().tolist()):
            mine, its = (log_probabilities(each(input_ids=ids[None]).logits) for each in (trained, stock))
            assert (mine - its).abs().max() < 1e-4
            prompt = ids[None, : len(ids) // 2]
            answers = [each.generate(prompt, max_new_tokens=8, do_sample=False) for each in (trained, stock)]
            assert answers[0].equal(answers[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.decode(tokenizer("hello 你好", add_special_tokens=False)["input_ids"]) == "hello 你好"


def test_export_in_another_form_and_back(runs: Path, tmp_path: Path) -> None:
    run = runs / "tiny_minicpm-lora-none"
    main(["export", str(run), "--as", "llama", "--out", str(tmp_path / "llama")])
    main(["export", str(tmp_path / "llama"), "--as", "minicpm", "--out", str(tmp_path / "back")])
    exported, back = (load_file(folder / "model.safetensors") for folder in (run / "export", tmp_path / "back"))
    assert exported.keys() == back.keys()
    for name, weight in exported.items():
        torch.testing.assert_close(back[name], weight, atol=0, rtol=3e-7, msg=name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "llama"]


def log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1)
