"""Whether this process is ours alone, and may be set up as suits us; and what memory it took.

Some settings of a runtime hold for the whole process. A library leaves them to the application it is part of; the
command line is the application.
"""

from __future__ import annotations

import os
import sys

_claimed = False
_threads = 0


def claim(threads: int = 0) -> None:
    """Say that this process runs d3tom-export and nothing else, on so many ``threads``; 0: one for each core."""
    global _claimed, _threads
    _claimed, _threads = True, threads
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    # Read when torch is imported. Its threads would otherwise wait busily after every operation, on cores that ONNX
    # Runtime's threads want: validating one answer on two cores took 25.9 s with it and 7.8 s without.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def claimed() -> bool:
    return _claimed


def threads() -> int:
    """How many threads a runtime may work on, in a process that is ours; 0: one for each core."""
    return _threads


def cores() -> int:
    """How many cores this process may run on: fewer than the machine has, where it was given some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_memory() -> int | None:
    """The most memory that this process had resident so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
