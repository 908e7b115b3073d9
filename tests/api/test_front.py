"""What ``import d3tom_export`` shows: names and signatures that callers rely on, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import d3tom_export as d3
from d3tom_export.api.settings import SETTINGS, LoopSettings
from d3tom_export.bundle.folder import Bundle
from tests.conftest import picture

NAMES = {
    "Answer", "BuildResult", "D3tomError", "Description", "Model", "Pictures", "Request", "Settings", "Step", "Steps",
    "__version__", "build", "open",
}  # fmt: skip
OPENING = {
    "backend": "auto", "device": "auto", "kv_cache": None, "precision": None, "verify": "auto", "provider_cache": None,
    "cuda_graphs": None, "specialization": None, "ignore_orientation": False, "picture_bytes": 256 << 20, "load": True,
}  # fmt: skip
BUILDING = {
    "output": None, "force": False, "layer": 3, "ratio": 0.8, "schedule": "adaptive", "select": "decider",
    "deciders": "committed", "aggregate": "sum", "positions": "compact", "kv_cache": False, "merge_at": "step",
    "remerge": "every-step", "cached_adaptive": False, "restore_norm": True, "text_targets": True,
    "share_prefix": False, "geometry": None, "vision_tower": None, "weights": None, "quantize": None,
    "clip_vocabulary": True, "drop_newline": True, "precision": "fp32", "engine": None, "sm": (),
    "merge_op": "plugin", "accumulate": "fp32", "visual_tokens": None, "text_tokens": None, "answer_tokens": None,
    "batch": None, "optimization_level": None, "workspace_mib": None, "self_check": None, "max_memory": None,
}  # fmt: skip
LOOP = {
    "gen_length", "block_length", "steps", "step_ratio", "step_schedule", "shift", "commit", "threshold", "factor",
    "margin", "max_steps", "fill_after_end", "remasking", "temperature", "top_k", "top_p", "seed",
}  # fmt: skip
ANSWERS = LOOP | {
    "ratio", "schedule", "deciders", "remerge", "cached_adaptive", "merge_at", "keep_multiple", "early_exit", "system",
    "stop", "suffix", "raw_text", "share_prefix",
}  # fmt: skip
METHODS = {
    "answer": "(self, image, question, **settings)",
    "answer_many": "(self, requests, *, batch=4)",
    "check": "(self, pictures, question, **settings)",
    "close": "(self)",
    "describe": "(self)",
    "fingerprint": "(self, **settings)",
    "load": "(self)",
    "see": "(self, image)",
    "steps": "(self, image, question, **settings)",
}
FIELDS = {
    "Answer": ["backend", "denoise_seconds", "generation", "kept", "kv_cache", "mean_kept", "merge", "prompt_seconds",
               "prompt_tokens", "shared_tokens", "steps", "text", "to_json", "token_ids", "visual_tokens"],
    "Description": ["backend", "family", "folder", "generation", "kv_cache", "layers", "loops", "max_tokens", "merge",
                    "model", "precision", "sees", "shares_prefix", "system", "to_json", "validated", "weights"],
    "Pictures": ["views", "visual_tokens"],
    "Request": ["image", "question", "settings"],
    "Step": ["committed", "final", "kept", "merged", "number", "pieces", "said", "text", "token_ids", "total",
             "visual_tokens"],
    "Steps": ["answer", "close", "prompt_tokens", "start", "total", "visual_tokens"],
}  # fmt: skip


def _bare(function: object) -> str:
    """A signature without annotations."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _defaults(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def _public(kind: type) -> list[str]:
    return sorted(name for name in {*dir(kind), *kind.__annotations__} if not name.startswith("_"))


def test_the_names_are_these() -> None:
    """A name that goes, or changes what it takes, breaks somebody's program: here it is seen, and said in the notes."""
    assert set(d3.__all__) == set(dir(d3)) == NAMES
    for name in NAMES:
        assert getattr(d3, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        d3.opne  # noqa: B018


def test_what_they_take_is_this() -> None:
    hooks = {"progress", "note"}
    assert {name: default for name, default in _defaults(d3.open).items() if name not in hooks} == OPENING
    assert {name: default for name, default in _defaults(d3.build).items() if name not in hooks} == BUILDING
    assert _defaults(d3.open).keys() >= hooks <= _defaults(d3.build).keys()
    assert next(iter(inspect.signature(d3.open).parameters)) == "bundle"
    assert next(iter(inspect.signature(d3.build).parameters)) == "model"
    assert set(LoopSettings.__annotations__) == LOOP
    assert set(SETTINGS) == set(d3.Settings.__annotations__) == ANSWERS
    assert _public(d3.Model) == sorted([*METHODS, "kv_cache"])
    assert {name: _bare(getattr(d3.Model, name)) for name in METHODS} == METHODS
    assert _bare(d3.Request) == "(image, question, **settings)"
    assert {name: _public(getattr(d3, name)) for name in FIELDS} == FIELDS


def test_everything_is_documented() -> None:
    for name in NAMES - {"__version__"}:
        assert inspect.getdoc(getattr(d3, name)), name
    for name in METHODS:
        assert inspect.getdoc(getattr(d3.Model, name)), name
    for function in (d3.open, d3.build):
        documented = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            assert name in documented, name


def _run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_nothing_heavy() -> None:
    """And takes next to none of the processor's time, the fewest of three, for the machine may be busy."""
    script = (
        "import sys, time\nstarted = time.process_time()\nimport d3tom_export\nd3tom_export.__version__\n"
        "print(time.process_time() - started, *sorted(sys.modules))"
    )
    told = [_run(script).split() for _ in range(3)]
    assert not {"torch", "onnx", "onnxruntime", "numpy", "PIL", "msgspec"} & set(told[0])
    assert min(float(each[0]) for each in told) < 0.2


def test_from_open_to_the_first_answer_without_torch(bundle: Bundle, tmp_path: Path) -> None:
    picture(40, 40).save(tmp_path / "p.png")
    script = (
        "import sys\nimport d3tom_export as d3\n"
        f"with d3.open({str(bundle.folder)!r}, device='cpu') as model:\n"
        f"    answer = model.answer({str(tmp_path / 'p.png')!r}, 'What?', gen_length=4)\n"
        "    many = model.answer_many([d3.Request(None, 'What?', gen_length=4)] * 2)\n"
        "print(answer.steps, len(many), *sorted(sys.modules))"
    )
    steps, count, *modules = _run(script).split()
    assert (int(steps) >= 1, count) == (True, "2")
    assert not {"torch", "onnx", "onnxscript", "transformers", "click"} & set(modules)
