"""Whether this process is ours alone, and may be set up as suits us. Imports nothing.

Some settings of a runtime hold for the whole process. A library leaves them to the application it is part of; the
command line is the application.
"""

from __future__ import annotations

_claimed = False


def claim() -> None:
    """Say that this process runs d3tom-export and nothing else."""
    global _claimed
    _claimed = True


def claimed() -> bool:
    return _claimed
