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


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends, even while it is stopped or deep in a step.

    Linux alone; elsewhere the closing of standard input must do. The signal follows the parent's thread that started
    this process: the main one, or under Ray that of the replica.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    # A terminal signals its whole group, a service manager all of a service's processes; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told = json.loads(sys.stdin.readline())
    die_with_parent(told.pop("parent"))
    logs.configure(told["log_format"], told["log_level"], "engine")
    pulse = Pulse(told.pop("pulse"))
    pulse.start()
    try:
        from tolserve.engine.process import run

        return run(told, pulse)
    finally:
        pulse.close()


if __name__ == "__main__":
    sys.exit(main())
