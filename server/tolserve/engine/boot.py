"""What the engine process runs first: `python -m tolserve.engine.boot`. It imports no torch, so that heartbeats begin
at once.

Its settings arrive as one JSON line on standard input, which then stays open: when the parent is gone the pipe closes
and the engine ends.
"""

import ctypes
import json
import os
import signal
import sys

from tolserve import logs
from tolserve.engine.pulse import Pulse

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# How often a compute thread without work looks for some before it sleeps. libgomp's 300,000 keep a core busy between
# two steps, where others need it: handing 16 deltas to the socket's thread then takes 247 us instead of 109. 60,000 are
# as bad, 2,000 to 30,000 alike; layers are as fast as ever at 20,000 and 30,000, and 7% slower at 2,000 (1B shape, two
# cores, benchmarks/results/spins-1b-cpu.json).
_SPINS = b"30000"


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even while it is stopped or deep in a step.

    Linux alone; elsewhere the closing of standard input must do. The signal follows the parent's thread that started
    this process: the main one, or under Ray that of the replica.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os.kill(os.getpid(), signal.SIGKILL)


def spin_briefly() -> None:
    """Tell libgomp, which reads it when torch is loaded; what an operator has set stays."""
    if sys.platform == "linux":
        ctypes.CDLL(None).setenv(b"GOMP_SPINCOUNT", _SPINS, 0)


def main() -> int:
    # A terminal signals its whole group, a service manager all of a service's processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told = json.loads(sys.stdin.readline())
    die_with_parent(told.pop("parent"))
    logs.configure(told["log_format"], told["log_level"], "engine")
    pulse = Pulse(told.pop("pulse"))
    pulse.start()
    spin_briefly()
    try:
        from tolserve.engine.process import run

        return run(told, pulse)
    finally:
        pulse.close()


if __name__ == "__main__":
    sys.exit(main())
