"""torchrun that ends well: the first failure is shown last, and where one machine ends, all do.

python -m train.launcher [torchrun's arguments] train/main.py [Hydra overrides]
"""

import argparse
import fcntl
import logging
import os
import signal
import socket
import struct
import sys
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, parse_min_max_nnodes, run

from train.launcher.failure import STOPPED, first_failure
from train.launcher.machines import MachineGone, Machines
from train.launcher.ranks import signal_ranks

_SIOCGIFADDR = 0x8915


def main(words: list[str]) -> None:
    """Start the ranks of this machine, and end with their exit code and the failure that counts."""
    arguments = parse_args(words)
    arguments.signals_to_handle = "SIGHUP,SIGQUIT"  # torch would end the ranks 30 s after these
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    logging.disable(logging.ERROR)  # the agent's account of a failure; ours stands at the end
    # Ranks that were ended leave semaphores; Python's resource tracker removes them, and says so at the very end.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    _, count = parse_min_max_nnodes(arguments.nnodes)
    if count > 1:
        interface = interface_to(arguments.master_addr)
        if interface:  # by itself, gloo takes the host's name for its address, which often is the loopback's
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    try:
        with Machines(
            arguments.master_addr, arguments.master_port or 29500, machine=arguments.node_rank, count=count
        ) as machines:
            code, failure = _run(arguments, machines)
            machines.tell(failure)
    except MachineGone as gone:
        code, failure = 1, str(gone)
    if code:
        print(failure, end="\n" if failure else "", file=sys.stderr, flush=True)
        os._exit(code)  # a thread that waits for a machine that is gone would not let Python end in order


def _run(arguments: argparse.Namespace, machines: Machines) -> tuple[int, str]:
    """The exit code, and the message that goes with a failure."""
    try:
        run(arguments)
    except ChildFailedError as error:
        if any(failure.exitcode == STOPPED for failure in error.failures.values()):
            return STOPPED, ""
        failure = first_failure(error.failures, name_host=machines.count > 1)
        if failure.lost_peer:
            machines.wait_for_news()
        return 1, failure.text
    except SignalException as ended:
        return (
            128 + ended.sigval,
            f"error: {socket.gethostname()} was told to end ({signal.Signals(ended.sigval).name})",
        )
    except DistError as error:
        return 1, (
            f"error: the machines did not find each other: {error}\n"
            f"start all {machines.count} with the same MAIN_ADDRESS and MAIN_PORT, and MACHINE_RANK from 0 on; "
            f"{machines.address}:{machines.port} must be machine 0 and be open to the others"
        )
    return 0, ""


def _pass_on(number: int, _: FrameType | None) -> None:
    """Let the ranks decide: they save before they end."""
    signal_ranks(number)


def interface_to(address: str) -> str | None:
    """Name of the network interface whose address packets to `address` carry; None where IPv4 does not lead there."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    held = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
                except OSError:  # an interface without an IPv4 address
                    continue
                if socket.inet_ntoa(held) == mine:
                    return name
    except OSError:
        pass
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
