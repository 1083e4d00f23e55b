"""The polite end."""

import signal
import subprocess
import sys
import time

PROGRAM = """
import time
from train.engine.stop import StopRequest
request = StopRequest()
request.listen()
print("ready", flush=True)
while not request.requested:
    time.sleep(0.01)
print("asked", flush=True)
time.sleep(60)
"""


def test_a_second_signal_ends_at_once_unless_it_is_the_first_ones_echo() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM
