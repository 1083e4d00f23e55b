"""What every machine of a run has to see alike; a difference is found before the first step."""

import hashlib
import socket
import uuid
from collections import Counter
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from train.data.record_set import Measured
from train.errors import OmniTuneError


def check_folder(folder: Path, accelerator: Accelerator) -> None:
    """Raise OmniTuneError where a machine sees another folder under that name; every rank must call it.

    Each rank writes its part of a checkpoint: in folders of their own, no machine would have a whole one.
    """
    name = [f".{uuid.uuid4().hex}"]
    broadcast_object_list(name)
    mark = folder / name[0]
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    blind = sorted({host for host in gather_object(["" if mark.exists() else socket.gethostname()]) if host})
    if accelerator.is_main_process:
        mark.unlink()
    if blind:
        raise OmniTuneError(
            f"run.dir: '{folder.absolute()}' as the first machine sees it is not there on {', '.join(blind)}; "
            "name a folder on a disk that all machines share"
        )


def check_records(measured: Measured | None, what: str, accelerator: Accelerator) -> None:
    """Raise OmniTuneError where ranks found other records, of which each would plan other packs; all must call it.

    measured: None on the ranks that did not measure.
    what: the option that names the records.
    """
    mine = []
    if measured:
        digest = hashlib.sha256(measured.lengths.tobytes()).hexdigest()
        mine = [(digest, f"{len(measured.types)} on {socket.gethostname()} (rank {accelerator.process_index})")]
    found = gather_object(mine)
    usual = Counter(digest for digest, _ in found).most_common(1)[0][0]
    other = next((where for digest, where in found if digest != usual), None)
    if other:
        one = next(where for digest, where in found if digest == usual)
        raise OmniTuneError(
            f"{what}: the machines hold other records, or other media: {one}, but {other}; copy the same files to all"
        )
