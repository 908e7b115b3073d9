"""An oracle, a backend and the oracle's witness led through one answer, for :mod:`d3tom_export.parity.agreement`.

B batch, V visual tokens, K kept. Imports no framework.
"""

from __future__ import annotations

from dataclasses import replace

from d3tom_export.loop.denoise import Ints, Session, StepRequest, StepResult
from d3tom_export.parity.kept import Rescored, Restart, choosing, step_with_kept


class Trio:
    """Three sessions as one: the oracle's result leads the loop, the backend's and the witness's are kept beside it.

    ``restarts`` are the oracle's and the witness's, where the prompt was merged at its prefill.
    """

    def __init__(
        self, oracle: Session, backend: Session, witness: Session, restarts: tuple[Restart, Restart] | None = None
    ) -> None:
        self._oracle, self._backend, self._witness = oracle, backend, witness
        self._restarts = restarts
        self.first_token = oracle.first_token
        self.first_tokens = (backend.first_token, witness.first_token)
        """Theirs."""
        self.request: StepRequest | None = None
        self.found: StepResult | None = None
        self.seen: StepResult | None = None
        """The witness's, whose logits are those with the oracle's kept set."""

    def step(self, request: StepRequest) -> StepResult:
        """The oracle's result: the scores and the kept set that it chose, and the logits with the backend's kept set.

        Where the backend kept as many others, that is: which of them had to be kept is judged by the scores.
        """
        self.request, self.found = request, self._backend.step(request)
        own, seen = self._oracle.step(request), self._witness.step(request)
        if self._restarts is not None:
            return self._restarted(request, own, seen, self._restarts)
        expected = self._with_kept(self._oracle, request, own, self.found.kept)
        kept = own.kept if expected is own else self.found.kept
        self.seen = self._with_kept(self._witness, request, seen, kept)
        return expected

    def _restarted(
        self, request: StepRequest, own: StepResult, seen: StepResult, restarts: tuple[Restart, Restart]
    ) -> StepResult:
        """As :meth:`step`, at the first step of a prompt merged at its prefill: what was kept there holds for all."""
        assert self.found is not None
        self._restarts = None
        of_oracle, of_witness = restarts
        self._oracle, expected = self._from_prefill(self._oracle, of_oracle, request, own, self.found.kept)
        kept = own.kept if expected is own else self.found.kept
        self._witness, self.seen = self._from_prefill(self._witness, of_witness, request, seen, kept)
        return expected

    @staticmethod
    def _from_prefill(
        session: Session, restart: Restart, request: StepRequest, result: StepResult, kept: Ints | None
    ) -> tuple[Session, StepResult]:
        """``session`` and ``result``, begun again with ``kept`` if that is another set of as many tokens."""
        chosen = choosing(kept, result)
        if chosen is None:
            return session, result
        session = Rescored(restart(chosen), result.scores)
        return session, replace(session.step(request), kept=result.kept)

    @staticmethod
    def _with_kept(session: Session, request: StepRequest, result: StepResult, kept: Ints | None) -> StepResult:
        """``result``, its step repeated with ``kept`` if that is another set of as many tokens."""
        chosen = None if request.cache_merge == "held" else choosing(kept, result)
        if chosen is None:
            return result
        return replace(step_with_kept(session, request, result, chosen), kept=result.kept)
