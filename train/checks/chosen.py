"""What several options say together."""

from train.config import PARTS, Options


def tuned_modules(options: Options) -> list[str]:
    """The modules whose `modules.tune_<name>` flag is on, in the order of PARTS."""
    return [name for name in PARTS if getattr(options.modules, f"tune_{name}")]


def model_folder(options: Options) -> tuple[str, str]:
    """The option that names the model folder, and the folder ("" where neither does)."""
    if options.model.path:
        return "model.path", options.model.path
    return "model.random_from", options.model.random_from or ""


def gain_figure(options: Options) -> str:
    """The figure of the evaluation by which a run may end early; "" where it may not."""
    if not options.run.stop_after_no_gain:
        return ""
    return options.run.gain_figure or options.checkpoint.keep_best or "eval/loss"
