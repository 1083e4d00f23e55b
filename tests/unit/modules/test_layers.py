import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.builders import make_batch, make_sample, mixed_samples, tiny_megrezo
from train.errors import TrainingError
from train.families.megrezo import MEGREZO
from train.families.minicpm.model import MiniCPMConfig, MiniCPMForCausalLM
from train.modules import layers
from train.modules.adapters import LoraSettings, add_adapters
from train.modules.layers import checkpoint_layers, compile_layers
from train.modules.packed import PackedModel
from train.modules.text import LlamaConfig, LlamaForCausalLM
from train.modules.trainable import choose_trainable
from train.schema import Batch

NO_GRADIENT = ".self_attn.k_proj.bias"
"""What softmax takes away: its gradient is rounding alone."""


@pytest.fixture(autouse=True)
def from_the_start() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, optimize_ddp=True):
        yield
    torch._dynamo.reset()


def tiny_text(model_class: Callable, config_class: Callable) -> PackedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 2}
    return model_class(config_class(vocab_size=128, num_key_value_heads=2, **sizes))


MODELS = {
    "megrezo": partial(tiny_megrezo, num_hidden_layers=5),
    "llama": partial(tiny_text, LlamaForCausalLM, LlamaConfig),
    "minicpm": partial(tiny_text, MiniCPMForCausalLM, MiniCPMConfig),
}


def batch_for(name: str) -> Batch:
    config = tiny_megrezo().config
    return make_batch(mixed_samples(config) if name == "megrezo" else [make_sample(config, text=n) for n in (9, 5)])


def trained(model: nn.Module, batch: Batch, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a pack, and its gradients."""
    torch.manual_seed(seed)
    loss = model(batch=batch).loss_sum
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(model: nn.Module, plain: nn.Module, batch: Batch, seed: int = 0) -> None:
    (loss, gradients), (expected, of_plain) = trained(model, batch, seed), trained(plain, batch, seed)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert gradients.keys() == of_plain.keys()
    for name, gradient in gradients.items():
        if not name.endswith(NO_GRADIENT):
            assert (gradient - of_plain[name]).norm() <= 1e-5 * of_plain[name].norm(), name


def packs() -> list[Batch]:
    """Two that have all media, one of text alone, and then others."""
    config = tiny_megrezo().config
    samples = mixed_samples(config)
    return [
        make_batch(samples),
        make_batch(samples[1:3]),
        make_batch([make_sample(config, text=30)]),
        make_batch(mixed_samples(config, seed=7) + mixed_samples(config, seed=9)),
        *(make_batch([sample]) for sample in samples),
        make_batch([make_sample(config, text=config.hidden_size)]),
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("llm", "towers"), [(0, 0), (1, 0), (2, 1), (0, 2), (9, 1)])
def test_every_nth_layer_is_computed_again_and_no_gradient_changes(name: str, llm: int, towers: int) -> None:
    model = MODELS[name]().train()
    batch = batch_for(name)
    expected = trained(model, batch)
    checkpoint_layers(model, llm=llm, towers=towers)
    calls: dict[str, int] = {}

    def count(_: nn.Module, __: object, *, of: str) -> None:
        calls[of] = calls.get(of, 0) + 1

    for of, module in model.named_modules():
        if of.endswith(".mlp"):
            module.register_forward_pre_hook(partial(count, of=of))
    found = trained(model, batch)
    assert found[0].equal(expected[0])
    assert all(found[1][key].equal(value) for key, value in expected[1].items())
    again = {of for of, times in calls.items() if times == 2}
    of_llm = {of for of in again if ".vpm." not in of and ".blocks." not in of}
    chosen = {0: [], 1: range(5), 2: [0, 2, 4], 9: [0]}[llm]
    root = "llm.model" if name == "megrezo" else "model"
    assert of_llm == {f"{root}.layers.{n}.mlp" for n in chosen}
    assert len(again - of_llm) == (2 * {0: 0, 1: 2, 2: 1}[towers] if name == "megrezo" else 0)  # two towers of 2 layers


@pytest.mark.parametrize("every", [0, 2])
def test_compiled_layers_give_the_same_and_need_no_graph_after_two_packs_and_a_dummy(every: int) -> None:
    model, plain = tiny_megrezo().train(), tiny_megrezo().train()
    checkpoint_layers(model, llm=every, towers=every)
    compile_layers(model, backend="aot_eager")
    assert model.state_dict().keys() == plain.state_dict().keys()
    for number, batch in enumerate(packs()):
        assert_same(model, plain, batch)
        if number == 2:
            graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 3
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    copied = copy.deepcopy(model)  # one that runs its own weights
    copied.llm.model.layers[0].mlp.down_proj.weight.data.zero_()
    assert trained(copied, packs()[1])[0] != trained(model, packs()[1])[0]


def test_evaluation_and_generation_are_not_compiled() -> None:
    model, plain = tiny_megrezo().eval(), tiny_megrezo().eval()
    compile_layers(model, backend="aot_eager")
    batch = packs()[0]
    with torch.no_grad():
        assert model(batch).token_losses.equal(plain(batch).token_losses)
    options = {"max_new_tokens": 4, "do_sample": False}
    answers = zip(model.generate(batch, **options), plain.generate(batch, **options), strict=True)
    assert all(found.equal(expected) for found, expected in answers)
    assert not counters["stats"]


def adapted_megrezo(dropout: float, dtype: torch.dtype = torch.float32) -> tuple[PackedModel, nn.Module]:
    model = tiny_megrezo().to(dtype)
    targets = {"llm": ["q_proj", "down_proj"], "audio_encoder": ["query"]}
    settings = LoraSettings(targets, rank=2, alpha=4.0, dropout=dropout, init_lora_weights="gaussian")
    torch.manual_seed(0)
    adapted = add_adapters(model, MEGREZO.rules, settings)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    choose_trainable(adapted, MEGREZO.rules, tuned=["llm", "audio_encoder", "vision_proj"], adapted=targets)
    return model, adapted.train()


def test_layers_with_adapters_are_compiled_beside_a_frozen_tower() -> None:
    (inner, model), (_, plain) = adapted_megrezo(0.3), adapted_megrezo(0.3)
    checkpoint_layers(inner, llm=2, towers=1)
    compile_layers(inner, backend="aot_eager")
    for number, batch in enumerate(packs()[:5]):
        assert_same(model, plain, batch, seed=number)
        if number == 2:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs


def test_more_graphs_than_the_limit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_GRAPHS", 1)
    model = tiny_megrezo().train()
    compile_layers(model, backend="eager")
    with pytest.raises(TrainingError, match=r"run\.compile: \w+ needed more than 3 graphs"):
        sum(model(batch).loss_sum for batch in packs()).backward()


def test_the_compiler_of_kernels_gives_the_same_losses_and_gradients() -> None:
    model, plain = MODELS["llama"]().train(), MODELS["llama"]().train()
    checkpoint_layers(model, llm=2, towers=0)
    compile_layers(model)
    config = tiny_megrezo().config
    for lengths in [(9, 5), (32,), (20, 1, 7)]:
        batch = make_batch([make_sample(config, text=n, learned=1) for n in lengths])
        assert_same(model, plain, batch)


def test_no_activation_is_cast_for_adapters_of_the_weights_dtype() -> None:
    _, model = adapted_megrezo(0.0, torch.bfloat16)
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda _, inputs, output: seen.update([inputs[0].dtype, output.dtype]))
    trained(model, packs()[0])
    assert seen == {torch.bfloat16}
