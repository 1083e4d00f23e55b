"""Everything that only a GPU can show, in one command of at most ten minutes.

    python benchmarks/gpu.py [--json FILE] [--install FOLDER] [--only GROUP ...]
    python benchmarks/gpu.py --device cpu --size tiny        # every stage in small, for a test

The JSON is written after every stage. Stages run in groups, each group in a process of its own, so that a fault or
an overrun costs only the rest of its group. Each figure carries the limits that are accepted, and whether it keeps them
(`ok`); limits of speed and memory are for one H200 at 4 billion parameters.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

GROUPS = {
    "kernels": ("rates", "attention", "loss", "float32"),
    "adapters": ("LoRA, checkpointing", "LoRA", "QLoRA, checkpointing"),
    "full": ("full, checkpointing", "full", "full, compiled"),
    "padded": ("padded",),
    "commands": ("resume: none", "killed worker", "resume: LoRA with dropout", "resume: zero2"),
    "answers": ("saving", "generation"),
}
"""Stages, in the order in which they run; `adapters` and `full` are those of `gpu_stages.real.WAYS`."""

LIMIT_S = 590
"""Of all groups together; the tenth minute ends a little later."""

IN_SMALL = {"resume: LoRA with dropout", "resume: zero2"}
"""Left out at the tiny size, where the tests of the project do the same."""


def stages_of(group: str) -> dict[str, Callable[[Any], list[dict[str, Any]]]]:
    """The functions of a group's stages, by name; imports what they need."""
    if group == "kernels":
        return import_module("gpu_stages.kernels").STAGES
    if group == "commands":
        commands = import_module("gpu_stages.commands")
        named = {name: partial(commands.resume, name=name.partition(": ")[2]) for name in GROUPS[group]}
        return named | {"killed worker": commands.killed_worker}
    real = import_module("gpu_stages.real")
    if group in ("adapters", "full"):
        return {name: partial(real.measure, name=name) for name in GROUPS[group]}
    return {name: getattr(real, name) for name in GROUPS[group]}


def run_group(group: str, device: str, size: str, folder: Path, file: Path) -> None:
    """Run a group's stages, and write what each gave; a stage that fails costs no other."""
    from gpu_stages.figures import Setting, Skipped

    setting = Setting(device, size, folder)
    results: dict[str, Any] = {}
    stages = stages_of(group)
    for name in GROUPS[group]:
        began = time.monotonic()
        result: dict[str, Any] = {"status": "done", "figures": []}
        try:
            if size == "tiny" and name in IN_SMALL:
                raise Skipped("only at the real size")
            result["figures"] = stages[name](setting)
        except Skipped as why:
            result |= {"status": "skipped", "why": str(why)}
        except Exception:
            result |= {"status": "failed", "why": traceback.format_exc()[-4000:]}
        results[name] = result | {"seconds": time.monotonic() - began}
        write(file, results)


def write(file: Path, values: Any) -> None:
    """Replace a JSON file as a whole, so that it is never seen half written."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)


def run_all(chosen: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the groups one after the other, and report after every stage."""
    end = time.monotonic() + chosen.limit_s
    report: dict[str, Any] = {"device": chosen.device, "size": chosen.size, "stages": {}}

    def tell(found: dict[str, Any]) -> None:
        for name in [name for name in found if name not in report["stages"]]:
            report["stages"][name] = found[name]
            show(name, found[name])
        if chosen.json:
            write(chosen.json, report)

    for group in chosen.only:
        file = folder / f"{group}.json"
        command = [sys.executable, __file__, "--group", group, "--device", chosen.device, "--size", chosen.size]
        process = subprocess.Popen([*command, "--folder", str(folder)], cwd=ROOT, env=environment())
        try:
            while process.poll() is None and time.monotonic() < end:
                tell(json.loads(file.read_text()) if file.exists() else {})
                time.sleep(0.3)
        finally:
            why = "the time was over" if process.poll() is None else f"its process ended with {process.returncode}"
            end_all(process)
        lost = {"status": "failed", "why": why, "figures": [], "seconds": 0.0}
        tell(dict.fromkeys(GROUPS[group], lost) | (json.loads(file.read_text()) if file.exists() else {}))
    return report


def end_all(process: "subprocess.Popen[bytes]") -> None:
    """End a group's process and all that it started."""
    import psutil

    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
    process.wait()


def environment() -> dict[str, str]:
    """The variables of a group's process, which imports the project and these benchmarks."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def show(name: str, result: dict[str, Any]) -> None:
    """Print what a stage gave."""
    print(f"{name}: {result['status']}, {result['seconds']:.1f} s", flush=True)
    if result.get("why"):
        print("    " + "\n    ".join(result["why"].splitlines()[-12:]), flush=True)
    for figure in result["figures"]:
        limits = [f"{word} {figure[key]:g}" for key, word in (("at_least", "≥"), ("at_most", "≤")) if figure[key]]
        verdict = {True: "ok", False: "NOT OK", None: ""}[figure["ok"]]
        print(
            f"    {figure['name']}: {figure['value']:.4g} {figure['unit']}  {' '.join(limits)}  {verdict}", flush=True
        )


def install(folder: Path) -> None:
    """Install the carried wheels, without a network and without their own needs."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 where a stage failed or a figure does not keep its limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("4b", "tiny"), default="4b")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds of all stages together")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="of wheels to install first")
    parser.add_argument("--folder", type=Path, help="for models and runs (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures here, after every stage")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.group:
        run_group(chosen.group, chosen.device, chosen.size, chosen.folder, chosen.folder / f"{chosen.group}.json")
        return 0
    if chosen.install:
        install(chosen.install)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by which the groups' processes end too
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        report = run_all(chosen, Path(temporary))
    results = report["stages"].values()
    is_good = all(
        result["status"] != "failed" and all(figure["ok"] is not False for figure in result["figures"])
        for result in results
    )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
