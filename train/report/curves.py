"""The charts of a run's figures over its steps, and those of several runs over each other."""

from collections.abc import Mapping, Sequence

import numpy as np

from train.config import METRICS
from train.pages.charts import Chart, Series, chart
from train.report.reading import Metrics

_CUT = "cut_answers"


def training_charts(metrics: Metrics) -> list[Chart]:
    """How training went: losses, learning rates, gradient norm, speed, waits, memory."""
    losses = _group(metrics, "loss")
    held_out = [Series(_after(name, "eval/loss"), *_evaluated(metrics, name)) for name in figures(metrics, "eval/loss")]
    made = [
        chart("loss", losses[:1] if len(losses) == 2 else losses),
        chart("held-out loss", held_out),
        chart("learning rate", _group(metrics, "lr"), from_zero=True),
        chart("gradient norm", [_column(metrics, "grad_norm", "before clipping")]),
        chart("tokens a second", [_column(metrics, "tokens_per_s", "tokens")], from_zero=True),
        chart("MFU (share of the devices' peak)", [_column(metrics, "mfu", "MFU")], from_zero=True),
        chart(
            "seconds of a step",
            [
                _column(metrics, "time/step_s", "step"),
                _column(metrics, "time/data_wait_s", "of it waiting for data"),
                _column(metrics, "time/device_wait_s", "of it waiting for the device"),
            ],
            from_zero=True,
        ),
        chart("memory, GiB", [_column(metrics, "memory/peak_gib", "peak")], from_zero=True),
    ]
    return [one for one in made if one]


def evaluation_charts(metrics: Metrics) -> list[Chart]:
    """A chart of each metric of the answers: over all records, and by type."""
    made = []
    for metric in measured(metrics):
        names = figures(metrics, f"eval/{metric}")
        curves = [Series(_after(name, f"eval/{metric}"), *_evaluated(metrics, name)) for name in names]
        made.append(chart(title_of(metric), curves))
    return [one for one in made if one]


def compared_charts(runs: Mapping[str, Metrics]) -> list[Chart]:
    """The main figures of several runs, a curve for each run."""

    def of(name: str) -> list[Series]:
        return [_column(metrics, name, run) for run, metrics in runs.items()]

    def held_out(name: str) -> list[Series]:
        return [Series(run, *_evaluated(metrics, name)) for run, metrics in runs.items()]

    metrics_named = dict.fromkeys(metric for metrics in runs.values() for metric in measured(metrics))
    made = [
        chart("loss", of("loss")),
        chart("held-out loss", held_out("eval/loss")),
        *(chart(title_of(metric), held_out(f"eval/{metric}")) for metric in metrics_named),
        chart("gradient norm", of("grad_norm")),
        chart("tokens a second", of("tokens_per_s"), from_zero=True),
        chart("seconds of a step", of("time/step_s"), from_zero=True),
        chart("memory, GiB", of("memory/peak_gib"), from_zero=True),
    ]
    return [one for one in made if one]


def measured(metrics: Metrics) -> list[str]:
    """The metrics of answers that some evaluation has."""
    names = {name for values in metrics.evaluations.values() for name in values}
    return [metric for metric in (*METRICS, _CUT) if any(_is_of(name, f"eval/{metric}") for name in names)]


def figures(metrics: Metrics, name: str) -> list[str]:
    """The names of a figure of the evaluations: over all records first, then those of types or sources."""
    names = {found for values in metrics.evaluations.values() for found in values if _is_of(found, name)}
    return sorted(names)


def title_of(metric: str) -> str:
    """How a metric is called on a page."""
    if metric == _CUT:
        return "answers cut short (share)"
    return metric.replace("_", " ") + ("" if METRICS[metric] else " (less is better)")


def _is_of(name: str, figure: str) -> bool:
    return name == figure or name.startswith(f"{figure}/")


def _after(name: str, figure: str) -> str:
    return name.removeprefix(figure).removeprefix("/") or "all"


def _column(metrics: Metrics, name: str, shown: str) -> Series:
    nothing = np.full(len(metrics.steps), np.nan)
    return Series(shown, metrics.steps, metrics.columns.get(name, nothing))


def _group(metrics: Metrics, name: str) -> list[Series]:
    names = sorted(found for found in metrics.columns if _is_of(found, name))
    return [_column(metrics, found, _after(found, name)) for found in names]


def _evaluated(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    steps: Sequence[int] = list(metrics.evaluations)
    values = [metrics.evaluations[step].get(name, np.nan) for step in steps]
    return np.array(steps, float), np.array(values, float)
