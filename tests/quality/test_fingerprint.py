"""Fingerprints of what a runtime reads beside a bundle's stages."""

from __future__ import annotations

from dataclasses import replace

from d3tom_export.bundle.folder import Bundle
from d3tom_export.quality.fingerprint import built_fingerprint, bundle_fingerprint


def test_another_build_of_graphs_or_engines_is_another(bundle: Bundle) -> None:
    def built(backend: str, precision: str) -> str:
        return built_fingerprint(replace(bundle, files={**(bundle.files or {}), **given}), backend, precision)

    names = ("cpu/int8/front.onnx", "half/fp16/front.onnx", "engines/tensorrt-sm89-fp16/front.plan")
    given = {name: {"bytes": 1, "sha256": "a"} for name in names}
    assert built("onnxruntime", "fp32") == built("pytorch", "fp32") == built("tensorrt-rtx", "fp16") == ""
    for backend, precision, name in zip(
        ("onnxruntime", "onnxruntime (cuda)", "tensorrt"), ("int8", "fp16", "fp16"), names, strict=True
    ):
        one = built(backend, precision)
        assert one[0] == "."
        assert len(one) == 13
        assert "/" not in one
        given[name]["sha256"] = "b"
        assert built(backend, precision) != one
        given[name]["sha256"] = "a"
        assert built(backend, precision) == one
    assert bundle_fingerprint(replace(bundle, files={**(bundle.files or {}), **given})) == bundle_fingerprint(bundle)
