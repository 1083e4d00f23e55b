"""Every option, with its unit and default. Hydra checks names and types against these classes;
`checks/` holds the rules between options.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MODULES = ("vision_encoder", "vision_proj", "llm", "audio_encoder", "audio_proj")
"""The parts of an omni model; each is trained or frozen on its own."""

PARTS = (*MODULES, "per_layer_table")
"""The same, with what only one family has: Gemma 4's table of per-layer embeddings."""

METRICS = {"exact_match": True, "vqa_accuracy": True, "anls": True, "f1": True, "wer": False, "cer": False}
"""What answers can be measured by (inference/metrics.py says how), and whether more of it is better."""


FILE_FORMATS = ("auto", "jsonl", "json", "parquet")
"""Kinds of files of records."""


class TooLong(StrEnum):
    quarantine = "quarantine"
    cut_text = "cut_text"


class LongAudio(StrEnum):
    quarantine = "quarantine"
    cut = "cut"
    split = "split"  # type: ignore[assignment]  # strings have a method of this name


class Precision(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


class Schedule(StrEnum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Engine(StrEnum):
    none = "none"
    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    zero2_offload = "zero2_offload"
    zero3_offload = "zero3_offload"

    @property
    def zero_stage(self) -> int:
        """ZeRO stage; 0 where DeepSpeed is not used."""
        return int(self[4]) if self.startswith("zero") else 0

    @property
    def offloads(self) -> bool:
        """Whether the optimizer lives in host memory."""
        return self.endswith("_offload")


class OptimizerName(StrEnum):
    adamw = "adamw"
    adamw_8bit = "adamw_8bit"
    muon = "muon"


@dataclass
class ModelOptions:
    path: str | None = None
    """Model folder to start from: config.json, tokenizer, preprocessor settings, weights (safetensors)."""
    random_from: str | None = None
    """Where `path` is null: a model folder without weights, which are drawn from `run.seed`."""


@dataclass
class AugmentOptions:
    """Random changes of media in training; all are off by default."""

    share: float = 0.5
    """Share of the clips, and of the images, to which each of the changes is made, drawn for each change by itself.
    `speed` is drawn for all records, masks for all clips."""
    speed: list[float] = field(default_factory=list)
    """Factors of speed, one of which is drawn for each record: [0.9, 1, 1.1]."""
    noise_db: list[float] = field(default_factory=list)
    """Least and greatest ratio of the sound to noise that is added, in dB: [0, 20]."""
    noise_folder: str | None = None
    """Folder of recordings of noise; null = noise is generated, white to brown."""
    echo_s: list[float] = field(default_factory=list)
    """Least and greatest reverberation time of generated rooms, seconds until the echo is 60 dB down: [0.1, 0.6]."""
    echo_folder: str | None = None
    """Folder of recorded impulse responses, in place of generated ones."""
    gain_db: list[float] = field(default_factory=list)
    """Least and greatest change of loudness, in dB: [-10, 10]."""
    telephone: bool = False
    """Clips as a telephone carries them: 300 to 3,400 Hz, in 8 bits by the mu-law."""
    freq_mask: int = 0
    """Mel bins that a mask covers at most (SpecAugment); 0 = none."""
    time_mask: int = 0
    """Mel frames (10 ms each) that a mask covers at most, and 30 % of a clip; 0 = none."""
    masks: int = 2
    """Masks of each of these two kinds on a clip."""
    color: float = 0.0
    """Brightness, contrast and colours of images change by up to this share."""
    jpeg: list[int] = field(default_factory=list)
    """Least and greatest JPEG quality in which images are encoded again: [30, 90]."""


@dataclass
class SourceOptions:
    path: str = ""
    """A file of records: JSON lines, a JSON list or parquet."""
    root: str | None = None
    """Folder that media paths are relative to, and may not leave; null = the file's own folder."""
    weight: float = 1.0
    """How often an epoch takes each record: 1 = once, 0.5 = a fresh half every epoch, 2 = twice."""
    name: str | None = None
    """Name in the metrics (`loss/<name>`); null = the file's name without its ending. One that is taken gets a number:
    `train-2`."""
    format: str = "auto"
    """`auto` (by what stands in the file), `jsonl`, `json` or `parquet`."""
    augment: AugmentOptions | None = None
    """What is changed in the media of this source of data.train; null = what `data.augment` says."""


@dataclass
class DataOptions:
    train: list[SourceOptions] = field(default_factory=list)
    """Sources to learn from; one that is given as a string is the path of a file: data.train=photos.jsonl"""
    eval: list[SourceOptions] = field(default_factory=list)
    """Held-out sources, given in the same ways; empty = no evaluation."""
    max_tokens: int = 4096
    """Tokens in a pack, media places included; no record may be longer (see `too_long`)."""
    max_patches: int = 32768
    """Image patches in a pack, which bounds the vision tower's memory."""
    max_frames: int = 24000
    """Mel frames (10 ms each) in a pack, which bounds the audio tower's memory."""
    too_long: TooLong = TooLong.quarantine
    """What becomes of a record over `max_tokens`: set aside, or its text shortened from the end."""
    long_audio: LongAudio = LongAudio.quarantine
    """What becomes of a recording over 30 s: its record set aside, the recording cut at 30 s, or split into windows of
    at most 30 s that the model hears one after the other, as far as `max_tokens` reaches (4096: about 150 s)."""
    image_places: int | None = None
    """Places in the language model to which an image is scaled, or just below, for families with such a budget
    (Gemma 4: 70, 140, 280, 560 or 1120 in what is published); null = what the model folder says."""
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    """What is changed at random in the media of data.train, never in those of data.eval."""
    system_prompt: str | None = None
    """System turn put before records that have none; null = the model family's own; "" = none."""
    max_bad_fraction: float = 0.05
    """The run stops once more than this share of the records, those of data.train and data.eval together, was
    quarantined. A small set may lose up to 10 records, but no more than half of all; 0 = none may be lost."""
    workers: int = 2
    """Processes that decode ahead, per rank (lengths are measured on all cores); 0 = read media in the training
    process, without a watchdog."""
    prefetch: int = 4
    """Steps that each worker keeps ready."""
    decode_limit_s: float = 60.0
    """Seconds that the media of one record may take; then its worker is killed, and after a second try the record set
    aside."""
    cache: str | None = "~/.cache/omnitune"
    """Folder that keeps the lengths of records for as long as their media have the same sizes and times; null =
    measure them at every start."""


@dataclass
class ModuleRates:
    """Peak learning rates."""

    vision_encoder: float = 1e-6
    """Of the vision tower."""
    vision_proj: float = 1e-6
    """Of its projector."""
    llm: float = 1e-6
    """Of the language model."""
    audio_encoder: float = 1e-6
    """Of the audio tower."""
    audio_proj: float = 1e-6
    """Of its projector."""
    per_layer_table: float = 1e-6
    """Of Gemma 4's table of per-layer embeddings."""


@dataclass
class ModulesOptions:
    tune_vision_encoder: bool = True
    """SigLIP tower."""
    tune_vision_proj: bool = True
    """Resampler."""
    tune_llm: bool = True
    """Language model, embedding and head included."""
    tune_audio_encoder: bool = True
    """Whisper-style tower (its position table is never trained)."""
    tune_audio_proj: bool = True
    """Projection into the language model, begin and end embeddings."""
    tune_per_layer_table: bool = False
    """Gemma 4's table of per-layer embeddings, nearly half of the model: E2B's takes 38 GB to learn."""
    lr: ModuleRates = field(default_factory=ModuleRates)
    """Peak learning rate of each module."""


@dataclass
class LoraOptions:
    modules: list[str] = field(default_factory=list)
    """Modules whose tuning goes through adapters; empty = no LoRA.

    The other modules with a `modules.tune_<name>` flag learn in full beside them (what peft calls modules_to_save)
    at their own `modules.lr`, and export/adapter/ carries them too.
    """
    rank: int = 16
    """Width of each adapter: its two matrices have this many rows and columns in common."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank, with `use_rslora` by alpha / √rank."""
    dropout: float = 0.05
    """Dropout probability in front of each adapter; drawn by pack, so that the number of ranks does not matter."""
    targets: dict[str, list[str]] = field(default_factory=dict)
    """Linear layers to adapt, by module; a module that is not named here takes its family's usual ones."""
    lr: float = 1e-4
    """Peak learning rate of the adapters."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: a scale that does not starve high ranks (see `alpha`)."""
    use_dora: bool = False
    """DoRA: the norm of each row of an adapted weight learns apart from its direction; slower, often better."""
    init_lora_weights: bool | str = True
    """Start of the adapters, which add nothing yet: true = A random, B zero; `gaussian` = A normal, B zero;
    `orthogonal` = A and B random, their product zero (an even rank)."""
    load_in_4bit: bool = False
    """QLoRA: the language model's frozen linear layers, all but the head, are stored in 4 bit (bitsandbytes: NF4,
    double quantisation). Exports are made with the weights as they were before."""


@dataclass
class EngineOptions:
    name: Engine = Engine.ddp
    """How ranks share the work; set by the `engine` group."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Entries merged last into the DeepSpeed configuration, which refuses what it does not know."""


@dataclass
class OptimOptions:
    name: OptimizerName = OptimizerName.adamw
    """`adamw`; `adamw_8bit`, whose moments take 2 bytes in place of 8 a parameter (bitsandbytes); `muon` for the
    matrices of linear layers, and AdamW for the rest. The last two under engine=none and engine=ddp only."""
    schedule: Schedule = Schedule.cosine
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = 0.01
    """Share of the steps in which the rate rises linearly from 0."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay of its means of gradients and of squared gradients, for each update."""
    eps: float = 1e-8
    """AdamW adds it to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Decay of the weights, on matrices only (not on norms, biases, embeddings of positions)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm; 0 = no clipping."""


@dataclass
class CheckpointingOptions:
    llm: str = "none"
    """Of the language model: `none`, `full`, or a number n for every n-th layer."""
    towers: str = "none"
    """The same of the vision and the audio tower."""

    def intervals(self) -> dict[str, int]:
        """n of every n-th layer by part: 1 where all layers are meant, 0 where none is."""
        words = {"none": 0, "full": 1}
        return {part: words[value] if value in words else int(value) for part, value in vars(self).items()}


@dataclass
class RunOptions:
    name: str = "default"
    """Name of the recipe, and of the folder under outputs/."""
    dir: str = "outputs/default"
    """Folder of the run."""
    seed: int = 0
    """What random weights, the order of records and dropout are drawn from."""
    epochs: int = 1
    """Passes over the training sources."""
    max_steps: int | None = None
    """Optimizer steps at most; null = `epochs` decides alone."""
    packs_per_step: int = 8
    """Packs in an optimizer step over all ranks: the global batch, whatever the number of ranks."""
    resume: str = "auto"
    """`auto` = go on from the newest checkpoint in `run.dir`; `never`; or a checkpoint's path."""
    max_not_finite: int = 10
    """Steps in a row that may be left out because a loss or gradient is not finite; then the run stops."""
    stop_after_no_gain: int = 0
    """Evaluations in a row that are no better than the best before them, after which the run ends and is exported; 0 =
    it goes on to its last step. The evaluation before the first step does not count."""
    gain_figure: str = ""
    """Figure of the evaluation by which `stop_after_no_gain` counts; "" = that of `checkpoint.keep_best`, or eval/loss
    where that names none."""
    certify: bool = False
    """Write certificate.json at the end, as `omnitune certify` does; the run fails where a line of it fails."""
    precision: Precision = Precision.bf16
    """Precision of the computation; master weights and moments are always fp32."""
    activation_checkpointing: CheckpointingOptions = field(default_factory=CheckpointingOptions)
    """Layers of which only the input is kept, the rest computed again in the backward: less memory, with `full` a third
    more work. One value is for language model and towers alike: run.activation_checkpointing=full"""
    compile: bool = False
    """Compile each layer of language model and towers by torch.compile (minutes in the first step, a C++ compiler on a
    CPU); evaluation is not compiled. Not under ZeRO-3."""
    liger_loss: bool = False
    """Head and loss by Liger's fused kernel (CUDA, liger-kernel from 0.8.2 on) in place of the built-in chunks."""
    deterministic: bool = False
    """Refuse CUDA operations whose result varies from run to run."""
    predict_memory: bool | None = None
    """Say at the start how much memory the largest pack is expected to need, and write it to metrics.jsonl beside what
    was needed; about 20 s of a core at 4 billion parameters, a few at the tiny size; null = on GPUs."""
    peak_tflops: float | None = None
    """Dense 10^12 floating-point operations a second that one device can do at most, for the MFU in metrics.jsonl;
    null = the data sheet's for known GPUs in bf16, and no MFU elsewhere."""
    threads: int = 0
    """CPU threads of each rank's tensor operations; 0 = cores of the machine divided by its ranks."""


@dataclass
class CheckpointOptions:
    save_every: int = 500
    """Optimizer steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Newest checkpoints kept; 0 = all."""
    keep_best: str = ""
    """Figure of the evaluation (`eval/loss`, `eval/exact_match`, ...) by which the best checkpoint is kept too; "" =
    none. An evaluation after the first step that is better than all before it saves one."""


@dataclass
class EvalOptions:
    every: int = 500
    """Optimizer steps between evaluations; 0 = only before the first step and after the last."""
    before_training: bool = True
    """Evaluate before the first step too."""
    max_records: int = 0
    """Held-out records to evaluate, spread evenly; 0 = all."""
    generate: bool = True
    """Answer the last turn of each held-out record, and compare the answers with the references."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match", "f1"])
    """What answers are measured by: exact_match, vqa_accuracy, anls, f1, wer, cer; `wer/speech` = over the records of
    type `speech` alone."""
    max_new_tokens: int = 64
    """Tokens an answer may have; `eval/cut_answers` is the share of answers that had no end by then."""
    batch_size: int = 32
    """Answers generated at a time, per rank, at most: their prompts, padded to the longest, keep to the limits of a
    pack too."""


@dataclass
class ExportOptions:
    with_code: bool = False
    """Put the model's code into export/, so that it loads with `trust_remote_code=True` where OmniTune is absent."""


@dataclass
class TrackerOptions:
    wandb: bool = False
    """Weights & Biases. The `tracker` group sets this and the next two: tracker=[wandb,tensorboard], tracker=none."""
    tensorboard: bool = False
    """Event files in the run's folder, in tensorboard/."""
    mlflow: bool = False
    """MLflow, at the address in MLFLOW_TRACKING_URI; where that is not set, mlflow/mlflow.db in the run's folder."""
    project: str = "omnitune"
    """W&B project, or experiment in MLflow."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in W&B and MLflow."""


@dataclass
class DebugOptions:
    one_batch: bool = False
    """Train on the first step's packs again and again: the loss must fall to nearly nothing."""
    profile_steps: int = 0
    """Steps (after the first two) whose torch profile is written to the run's folder as trace.json."""


@dataclass
class Options:
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    modules: ModulesOptions = field(default_factory=ModulesOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    tracker: TrackerOptions = field(default_factory=TrackerOptions)
    debug: DebugOptions = field(default_factory=DebugOptions)
