import os
import time
from pathlib import Path

import pytest

from train.engine.compile_locks import drop_stale_locks


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lock of an operator, held by nobody."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_an_old_lock_of_nobody_is_removed(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.utime(lock, (time.time() - 400,) * 2)
    drop_stale_locks()
    assert not lock.exists()
    assert f"removed '{lock}', which a killed process left behind" in caplog.text


def test_a_young_lock_of_nobody_is_waited_for(lock: Path) -> None:
    began = time.monotonic()
    drop_stale_locks(limit_s=0.5)
    assert not lock.exists()
    assert time.monotonic() - began > 0.4


def test_a_lock_that_is_held_stays(lock: Path) -> None:
    os.utime(lock, (time.time() - 400,) * 2)
    with lock.open():
        drop_stale_locks()
    assert lock.exists()
