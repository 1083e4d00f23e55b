"""Two launchers, in an interpreter each, over a store as torch's rendezvous keeps it."""

import socket
import subprocess
import sys

from tests.runs import ROOT

MACHINE = """
import sys, time
from torch.distributed import TCPStore
from train.launcher.machines import MachineGone, Machines

number, port = map(int, sys.argv[1:])
own = {"is_master": True, "wait_for_workers": False, "multi_tenant": True}
server = TCPStore("127.0.0.1", port, **own) if number == 0 else None
try:
    with Machines("127.0.0.1", port, machine=number, count=2) as machines:
        if number == 0:
            time.sleep(3)
            del server  # as the collector takes it with torch's agent
            machines.tell("error: the first fault")
        else:
            time.sleep(60)
except MachineGone as gone:
    print(gone)
"""


def test_the_store_outlives_torchs_agent():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [sys.executable, "-c", MACHINE, str(number), str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for number in (0, 1)
    ]
    said = [machine.communicate(timeout=60)[0] for machine in machines]
    assert said == ["", "error: the first fault\n"]
