"""What the rest of the project needs to know of a model family."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from train.errors import CheckpointError
from train.modules.flops import Flops
from train.modules.packed import PackedModel
from train.modules.trainable import FROZEN, Rules
from train.schema import Batch, Kind, Processor

log = logging.getLogger(__name__)

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama, which LoRA adapts where the options name none."""


@dataclass(frozen=True)
class Family:
    """A declaration: how a model is recognised, which classes load it, its modules, the names of its keys.

    Classes are named as "module:attribute" and imported when they are used.
    """

    name: str
    recognises: Callable[[str, str], bool]
    """Whether a folder is of this family, by its `model_type` and the text of its chat template ("" = it has none):
    models of several families are Llamas."""
    model_class: str
    processor_class: str
    """It carries the family's chat template, as `data.chat_template.ChatTemplate`."""
    rules: Rules
    """Ordered (pattern of parameter names, module); every parameter must be covered."""
    flops_function: str
    """Predicts a step's work: (model, tuned modules, adapted ones) to `modules.flops.Flops`."""
    media: Mapping[str, Kind]
    """The kind of media that a module needs in a step to have anything to learn from; one not named always learns."""
    lora_targets: Mapping[str, tuple[str, ...]]
    """Linear layers that LoRA adapts in each module if the options name none."""
    auto_classes: Mapping[str, str] = field(default_factory=dict)
    """Classes of ours behind transformers' Auto classes, which an export can carry; empty where its own do."""
    conversions: Mapping[str, str] = field(default_factory=dict)
    """Other forms of its models that compute the same, each a `conversion.Conversion`, by the form's name."""
    stock_logits_function: str = "train.families.stock:causal_logits"
    """Loads a folder in transformers' own class: (folder) to `stock.Logits`."""
    stated_keys: tuple[str, ...] = ()
    """Keys that a config.json must state, since without them the published code takes other values than ours, and no
    weight's shape would tell; `a.b` is b in a's mapping, `a|b` one of two."""
    compiles: bool = True
    """Whether `run.compile` can compile its layers."""
    own_keys: frozenset[str] = frozenset()
    """Keys of config.json that belong to it, and that its class does not know: those that this project writes for
    itself, those that published files state and no code reads, mappings of parts that are not loaded."""

    @property
    def modules(self) -> set[str]:
        """The modules of this family that can learn."""
        return {module for _, module in self.rules} - {FROZEN}

    def config(self, folder: Path | str) -> PreTrainedConfig:
        """The folder's configuration; CheckpointError names what it asks for that the model does not do."""
        file = Path(folder) / "config.json"
        stated = read_json(file) or {}
        lacking = [key for key in self.stated_keys if not any(_states(stated, name) for name in key.split("|"))]
        if lacking:
            names = ", ".join(repr(key.split("|")[0]) for key in lacking)
            raise CheckpointError(f"{file} lacks {names}; copy the file from the published model")
        config_class = _resolve(self.model_class).config_class
        try:
            config = config_class.from_pretrained(folder, local_files_only=True)
        except Exception as fault:  # transformers' checks of types raise what is neither ValueError nor TypeError
            told = " ".join(str(fault).split())
            raise CheckpointError(f"{file}: {told}; correct the value, or take another model") from None
        if unknown := sorted(_unknown_keys(stated, config_class().to_dict(), _OF_ANY_MODEL | self.own_keys)):
            _tell_once(f"{file}: keys that change nothing here: {', '.join(unknown)}")
        return config

    def load_model(
        self,
        folder: Path | str,
        *,
        dtype: torch.dtype | None = None,
        in_float32: Callable[[str], bool] | None = None,
        device: torch.device | None = None,
    ) -> PackedModel:
        """The model with the folder's weights, each read once, in its final dtype and on its final device.

        Args:
            dtype: of the weights; None = as stored.
            in_float32: whether the parameter of a name is float32 whatever `dtype` says.
            device: None = the CPU, or under ZeRO-3 where DeepSpeed puts its shards.

        Raises CheckpointError where weights are missing, or a file of them is damaged.
        """
        self.config(folder)
        model_class = _resolve(self.model_class)
        if in_float32:
            model_class = _with_float32(model_class, in_float32)
        try:
            model, report = model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                device_map=None if device is None or device.type == "cpu" else {"": device},
                output_loading_info=True,
                local_files_only=True,
            )
        except SafetensorError as error:
            raise CheckpointError(f"{_unreadable(Path(folder))} cannot be read ({error}); copy it again") from None
        lacking = sorted(report["missing_keys"])
        if lacking:
            raise CheckpointError(
                f"{folder}: {len(lacking)} weights are missing, first of all '{lacking[0]}'; "
                "the folder is incomplete, or belongs to another model"
            )
        return model

    def random_model(self, folder: Path | str, seed: int) -> PackedModel:
        """A model of the folder's configuration with weights drawn from `seed`, float32."""
        model_class = _resolve(self.model_class)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return model_class(self.config(folder))

    def skeleton(self, folder: Path | str) -> PackedModel:
        """A model of the folder's configuration with its parameters on the meta device, and its buffers filled."""
        model_class = _resolve(self.model_class)
        with register_module_parameter_registration_hook(_on_meta):  # type: ignore[arg-type]  # it may answer
            return model_class(self.config(folder))

    def flops(self, model: nn.Module, tuned: Collection[str], adapted: Collection[str] = ()) -> Flops:
        """Predicted floating-point work of a training step in which the `tuned` modules learn, the `adapted` ones of
        them through adapters alone.
        """
        return _resolve(self.flops_function)(model, tuned, adapted)

    def stock_logits(self, folder: Path) -> Callable[[Batch], Tensor]:
        """The logits (T, V) in fp32 that transformers' own class gives for a batch of one sample."""
        self.register_auto_classes()
        return _resolve(self.stock_logits_function)(folder)

    def conversion(self, form: str) -> Any:
        """The `conversion.Conversion` to a form."""
        return _resolve(self.conversions[form])

    def register_auto_classes(self) -> None:
        """Tell transformers' Auto classes about the classes in `auto_classes`."""
        if not self.auto_classes:
            return
        config_class = _resolve(self.auto_classes["AutoConfig"])
        for name, reference in self.auto_classes.items():
            auto, ours = getattr(transformers, name), _resolve(reference)
            if name == "AutoConfig":
                auto.register(config_class.model_type, config_class, exist_ok=True)
            elif name == "AutoImageProcessor":
                # Not `transformers.AutoImageProcessor`: without torchvision, that of 5.17 and 5.18 only refuses.
                AutoImageProcessor.register(config_class, slow_image_processor_class=ours, exist_ok=True)
            else:
                auto.register(config_class, ours, exist_ok=True)

    def load_processor(self, folder: Path | str) -> Processor:
        """The processor (tokenizer, images, audio) of the folder."""
        self.config(folder)
        return _resolve(self.processor_class).from_pretrained(folder, local_files_only=True)


def _on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """In a parameter's place one without values; None, which keeps it, where it has none (tied ones stay tied)."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


_OF_ANY_MODEL = frozenset(
    {"_name_or_path", "architectures", "auto_map", "model_type", "rope_scaling", "rope_theta", "torch_dtype"}
    | {"attention_dropout", "hidden_act", "num_channels"}  # of a vision tower, which have one possible value
    | {"dtype", "transformers_version", "output_attentions", "output_hidden_states", "return_dict", "use_cache"}
    | {"_attn_implementation_autoset"}
)
"""Keys that every config.json may hold; which of them act, docs/published_models.md says."""


_OF_ANY_PART = frozenset(
    {"is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"}
    | {"tie_word_embeddings", "pruned_heads", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task"}
    | {"chunk_size_feed_forward", "prefix", "problem_type", "task_specific_params", "tokenizer_class", "sep_token_id"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "id2label", "label2id", "num_labels"}
    | {"max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature"}
    | {"top_k", "top_p", "typical_p", "diversity_penalty", "repetition_penalty", "length_penalty", "bad_words_ids"}
    | {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"}
    | {"return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"}
    | {"exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
)
"""Keys that earlier transformers wrote into the mapping of every part, where nothing has ever read them."""


def _unknown_keys(stated: Mapping[str, Any], known: Mapping[str, Any], others: frozenset[str]) -> set[str]:
    """Keys of a config.json that its class does not know; those of a tower's mapping as `a.b`."""
    unknown = stated.keys() - known.keys() - others
    for name, inner in stated.items():
        if name in others or not isinstance(inner, dict) or not isinstance(known.get(name), dict):
            continue
        if name.endswith("_config"):
            unknown |= {f"{name}.{key}" for key in _unknown_keys(inner, known[name], others | _OF_ANY_PART)}
    return unknown


@lru_cache(maxsize=64)
def _tell_once(message: str) -> None:
    log.warning(message)


def _states(config: Mapping[str, Any], key: str) -> bool:
    """Whether a config.json states a key, `a.b` as b in a's mapping; a mapping that is left out needs no keys."""
    outer, _, inner = key.partition(".")
    if not inner:
        return outer in config
    return outer not in config or (isinstance(config[outer], dict) and inner in config[outer])


def quieten_transformers() -> None:
    """Show errors of transformers and bitsandbytes alone: no advice, no bars; and no library's deprecation warnings."""
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of a kernel package that it does without


def _with_float32(model_class: Any, in_float32: Callable[[str], bool]) -> Any:
    """The class, whose `from_pretrained` loads what `in_float32` names in float32."""

    def dtype_plan(self: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        names = [name for name, _ in self.named_parameters() if in_float32(name)]
        return {f"^{re.escape(name)}$": torch.float32 for name in names}

    # transformers asks this method for what stays float32 in a model of half precision.
    return type(model_class.__name__, (model_class,), {"_get_dtype_plan": dtype_plan})


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def _unreadable(folder: Path) -> str:
    """The file of weights that does not open, as a file cut short does not."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"'{file}'"
    return f"the weights in '{folder}'"


def read_json(file: Path) -> dict[str, Any] | None:
    """A JSON file of a model folder; None where there is none, CheckpointError where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"'{file}' is not valid JSON ({error}); copy it again") from None
