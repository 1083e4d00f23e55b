"""The trackers that the options choose."""

from functools import partial

from train.engine.tracking.to_mlflow import MlflowTracker
from train.engine.tracking.to_tensorboard import TensorBoardTracker
from train.engine.tracking.to_wandb import WandbTracker
from train.engine.tracking.tracker import TrackedRun, Tracker, Tracking


def trackings(run: TrackedRun) -> list[Tracking]:
    """An observer for each tracker that `tracker.*` asks for; it begins now."""
    trackers: list[tuple[str, bool, type[Tracker]]] = [
        ("W&B", run.options.wandb, WandbTracker),
        ("TensorBoard", run.options.tensorboard, TensorBoardTracker),
        ("MLflow", run.options.mlflow, MlflowTracker),
    ]
    return [Tracking(name, partial(tracker, run)) for name, is_chosen, tracker in trackers if is_chosen]
