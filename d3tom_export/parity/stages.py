"""The stages of a backend one by one, on a prompt of their own: what answers never ask of them is asked here.

Every output that the contract names, `decide`'s kept set beside `merge`'s, and inputs with a default left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from d3tom_export.bundle.folder import Bundle
from d3tom_export.config import Loop
from d3tom_export.diagnosis.stagewise import diagnose
from d3tom_export.loop.backend import Backend, StageRunner
from d3tom_export.model.lavida import Lavida
from d3tom_export.parity.probes import probe_note, probe_prompts


@dataclass
class StageProbes:
    """What was found, for the report of the whole comparison."""

    probed: list[str] = field(default_factory=list)
    not_probed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def run(self, bundle: Bundle, model: Lavida, backend: Backend, loop: Loop) -> None:
        """Hold every stage of ``backend`` against its module of ``model`` (float32), at each step of a short answer."""
        where = probe_note("stages one by one", f"{backend.name}, {loop}")
        if not isinstance(backend, StageRunner):
            self.not_probed.append(f"{where}: {backend.name} cannot run stages one at a time")
            return
        if backend.precision != "fp32":
            self.not_probed.append(f"{where}: their outputs are compared in float32 (leave --precision out)")
            return
        manifest = bundle.manifest
        if manifest.rounds_inputs:
            self.not_probed.append(f"{where}: products round their inputs to float8, which the last digits may turn")
            return
        prompts, skipped = probe_prompts(bundle.config, manifest.generation, backend)
        # A batch of two where the backend takes one.
        chosen = next((probe for probe in prompts if len(probe.sample.visual_positions)), None)
        if chosen is None:
            self.not_probed += [f"{where}: {reason}" for reason in skipped]
            return
        diagnosis = diagnose(bundle, model, {loop: backend}, None, [chosen.sample], chosen.generation, manifest.merge)
        self.probed.append(where)
        if diagnosis.passed:
            return
        if diagnosis.first is not None:
            found = "; ".join(
                f"{name}: {each.problem or f'off by {each.error:.1e}, allowed {each.tolerance:.0e}'}"
                for name, each in diagnosis.first.outputs.items()
            )
            self.problems.append(f"{where}: stage {diagnosis.first.stage}, {diagnosis.first.where}: {found}")
        self.problems += [f"{where}: the cut into stages: {problem}" for problem in diagnosis.cut.problems]
        if diagnosis.first is None and not diagnosis.cut.problems:
            error = diagnosis.cut.max_abs_logit_error
            self.problems.append(f"{where}: the cut into stages departs from the model by {error:.1e} in the logits")

    def note_in(self, probed: list[str], not_probed: list[str], problems: list[str]) -> None:
        """Add all of it to the lists of a report."""
        probed += self.probed
        not_probed += self.not_probed
        problems += self.problems
