"""``python -m tests.mutation``: put every fault in and print how the product answered; --markdown prints the table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.mutation.catalogue import FAULTS
from tests.mutation.subjects import made_in
from tests.mutation.table import counts, markdown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/trust.md and run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the faults whose names hold this")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(f"{counts(FAULTS)}.\n\n{markdown(FAULTS)}")
        return 0
    torch.set_num_threads(1)
    chosen, wrong = [fault for fault in FAULTS if arguments.only in fault.id], 0
    with tempfile.TemporaryDirectory(prefix="d3tom-mutation-") as root:
        subjects = made_in(Path(root))
        for fault in chosen:
            started = time.perf_counter()
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                outcome = fault.run(subjects, Path(scratch))
            right = fault.by_chance or fault.answered(outcome) != bool(fault.missed)
            wrong += not right
            answer = "passed" if outcome.caught_by is None else f"caught by {outcome.caught_by}"
            seconds = time.perf_counter() - started
            print(
                f"{'' if right else 'WRONG '}{fault.id}: {answer} ({outcome.figures[:160]}) {seconds:.1f} s", flush=True
            )
    print(f"{counts(chosen)}; {wrong} answered otherwise.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
