"""What the benchmarks share: time, peak memory, tables, and the setting that figures belong to."""

import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """seconds: on the CPU its own time, on CUDA the wall's; peak_bytes: beyond what was held before."""

    seconds: float
    peak_bytes: int


def measured(run: Callable[[], T], device: str = "cpu") -> tuple[T, Cost]:
    """What `run` returns, and what it cost.

    On the CPU, with one thread, the process's own time counts: on a shared machine the wall's says more about
    the neighbours. Peak memory is the kernel's high-water mark there (Linux), the allocator's on CUDA.
    """
    if device == "cpu":
        before = _reset_resident_peak()
        start = time.process_time()
        result = run()
        return result, Cost(time.process_time() - start, memory_status("VmHWM") - before)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return result, Cost(time.perf_counter() - start, torch.cuda.max_memory_allocated() - before)


def _reset_resident_peak() -> int:
    """Bring the high-water mark down to what is resident now, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_status("VmRSS")


def memory_status(name: str) -> int:
    """A size of this process in bytes: VmRSS, what is resident now, or VmHWM, its high-water mark."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def use_one_core() -> None:
    """One thread for tensor operations: figures are per core."""
    torch.set_num_threads(1)


def setting(device: str = "cpu", cores: int | None = 1) -> dict[str, str]:
    """What the figures belong to; cores: None = all of them."""
    cpu = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    where = torch.cuda.get_device_name() if device == "cuda" else (cpu[1] if cpu else platform.machine())
    return {
        "device": where,
        "cores": f"{cores or os.cpu_count()} of {os.cpu_count()}",
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys, the first key's values to the left."""
    cells = [list(rows[0])] + [[_shown(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        print("  ".join([f"{first.strip():<{widths[0]}}", *others]))


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.3f}"


def finish(figures: Mapping[str, Any], path: Path | None, device: str = "cpu", cores: int | None = 1) -> None:
    """Print the setting, and write everything as JSON if asked to."""
    where = setting(device, cores)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    if path:
        path.write_text(json.dumps({"setting": where, **figures}, indent=2) + "\n", encoding="utf-8")
