"""The catalogue itself: what it must hold, and that each fault is in it once."""

from __future__ import annotations

from collections import Counter

from tests.mutation.catalogue import FAULTS
from tests.mutation.table import KINDS, counts, markdown, summary


def test_every_kind_and_precision_is_there_and_every_fault_once() -> None:
    assert not [name for name, count in Counter(fault.id for fault in FAULTS).items() if count > 1]
    assert {fault.kind for fault in FAULTS} == set(KINDS)
    assert {fault.precision for fault in FAULTS} == {"fp32", "fp16", "bf16", "int8"}
    assert len({(fault.kind, fault.name) for fault in FAULTS}) >= 100
    assert not [fault.id for fault in FAULTS if fault.missed and fault.reason]


def test_every_row_of_the_fidelity_review_is_there() -> None:
    rows = {fault.name.split(",")[0] for fault in FAULTS if fault.review}
    assert rows >= {
        "attention norm dropped", "final norm dropped", "rope theta 500000 for 10000", "rope theta 11000 for 10000",
        "rope theta 10010 for 10000", "rope theta 10000.5 for 10000", "positions reversed", "all positions one late",
        "the answer's positions one late", "merged keys at original positions", "ranks 1..K kept",
        "decider mask ignored", "scores are the heads' maximum", "importance's scale 5 % off",
        "others dropped in the place of merged", "similarity of rows that are not normed",
        "dot product in the place of the cosine", "similarity rounded to 1e-2", "similarity rounded to 1e-3",
        "similarity rounded to 1e-4", "similarity rounded to 1e-5", "exact ties of scores to the higher position",
        "scores in float16", "norms not restored", "similarity by one head", "pooling nearest",
        "pooling with aligned corners", "exact gelu in the tower", "tanh gelu in the projector",
        "epsilon of the tower's norms 1e-5 for 1e-6", "epsilon of the norms 1e-6 for 1e-5",
        "output doubt cancelled in float32", "output confidence halved", "times 2", "times 1.1", "zeroed",
        "one row zeroed", "visual tokens taken for one run", "batch rows use row 0's deciders",
        "default of answer_length 7 for 8", "embedding of a token in no sample negated",
        "row of a token in no sample negated", "negated", "rows reversed", "11000", "2 for 1", "mean for sum",
        "fastv for decider", "false for true", "fewer", "another token", "8 for 1", "language head negated",
        "layers 4 to 7 zeroed", "projector negated",
    }  # fmt: skip


def test_the_table_has_a_row_for_every_name() -> None:
    table = markdown(FAULTS)
    assert all(f"| {fault.name} |" in table for fault in FAULTS)
    assert counts(FAULTS).startswith(f"{len(FAULTS)} faults (")
    assert summary([("fault", "caught"), ("fault", "listed"), ("fault", "caught"), ("other", 1)]) == (
        "3 faults, 2 caught, 1 listed"
    )
