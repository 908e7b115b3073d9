"""What a backend's outputs of rows say of the answer's slots: how sure they are, and which slot a row is.

B batch, G answer tokens. Imports no framework but NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from d3tom_export.config import Certainty, Choices
from d3tom_export.loop.denoise import Ints, StepRequest, StepResult
from d3tom_export.loop.sampling import certainty_of, certainty_of_likeliest, certainty_of_logits, without_banned
from d3tom_export.stages.contract import CANDIDATES, CANDIDATES_OUTPUTS, CERTAINTY_OUTPUTS

_Array = TypeVar("_Array", bound=NDArray)


def certainty_stage_for(certainty: Certainty | None, stages: Callable[[str], bool]) -> tuple[str, tuple[str, ...]]:
    """The stage that ``certainty`` follows from and which of its outputs: `back` and none where it needs no other.

    ``stages`` tells which stages there are. `back` and its logits where none serves.
    """
    if certainty is None or (certainty.whole and certainty.kind == "probability"):
        return "back", ()
    if certainty.whole:
        return "certainty", CERTAINTY_OUTPUTS[certainty.kind]
    if certainty.top_k is not None and certainty.top_k <= CANDIDATES and stages("candidates"):
        return "candidates", CANDIDATES_OUTPUTS
    return "back", ("logits",)


def step_result(
    request: StepRequest,
    values: Callable[[str], NDArray],
    stages: Callable[[str], bool],
    choices: Choices,
    kept: Ints | None,
    *,
    shifted: bool,
) -> StepResult:
    """What a backend answers to ``request``, from its outputs by name.

    Args:
        request: What was asked.
        values: The outputs of the last stage, and of the one that :func:`certainty_stage_for` names, by their names.
        stages: Which stages there are.
        choices: Which tokens may be chosen.
        kept: As in the result.
        shifted: Whether a row's outputs are the next slot's: with a KV cache, of models with a row shift. Slot 0 then
            has its own row's, which mean nothing.
    """

    def slots(rows: _Array) -> _Array:
        return np.concatenate([rows[:, :1], rows[:, :-1]], axis=1) if shifted else rows  # type: ignore[return-value]

    doubt, certainty = values("doubt"), None
    stage, outputs = certainty_stage_for(request.certainty, stages)
    if request.certainty is not None:
        if stage == "candidates":
            certainty = certainty_of_likeliest(request.certainty, values("likeliest"), values("rest"))
        elif stage == "certainty":
            certainty = certainty_of(request.certainty, *(values(name) for name in outputs))
        elif outputs:
            certainty = certainty_of_logits(request.certainty, without_banned(values("logits"), choices))
        else:
            certainty = certainty_of(request.certainty, doubt, None)
    return StepResult(
        token=slots(values("token")),
        # In float64 from the doubt: the graph's float32 confidence ties at 1.0 where the release's does not.
        confidence=slots(1.0 / (1.0 + doubt.astype(np.float64))),
        kept=kept,
        logits=slots(values("logits")) if request.logits else None,
        choices=choices,
        certainty=None if certainty is None else slots(certainty),
    )
