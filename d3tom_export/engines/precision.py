"""Precision as a pass over a stage's graph: fp16 or bf16 where it pays, float32 where it must stay, and why.

Networks are strongly typed, and TensorRT 11 has no precision flags: what a graph says is what an engine computes. The
rules, in order:

1. *scores*: everything between the projections of layer l* and the comparisons that choose the kept tokens is float32.
   In bf16 scores tie by the dozen.
2. Matrix products, convolutions and the merge node take and give the low precision. The merge node's sums are float32
   inside, as its body and its plugin have it. In fp16 a builder may add a product's terms up in fp16 as well; a product
   that is to add in float32 is written as one of float32 between casts, which the builder takes for one kernel with
   fp16 operands (:func:`lower_precision`). Products of bf16 always add in float32.
3. What only moves data (reshapes, gathers, slices, sign changes) keeps the precision of what it moves.
4. Sums and products of low-precision values are low: the residual stream. Not so with a constant that the low
   precision cannot hold exactly: 32 ** -0.5 would be off by 2e-4 in fp16, for every product that it scales.
5. Everything else is float32 - norms and other statistics, softmax, angles, activation functions, resampling - and so
   is elementwise work on its results, until a matrix product takes them in.

Weights in few bits are dequantized to what their product takes; the scales they have are constants like others.

Tensors that cross to the host stay float32 (engines/stages.py); those that go from stage to stage on the device have
the low precision. Weights stay where they are; those stored in another precision get a cast that the builder folds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import onnx.defs
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from d3tom_export.bundle.half import HALF_DTYPES
from d3tom_export.engines.stages import engine_tensors
from d3tom_export.plugins.merge_op import DOMAIN
from d3tom_export.stages.contract import StageSpec
from d3tom_export.stages.edit import Editor, made_by, only_user

LOW_PRECISIONS: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

Accumulation = Literal["fp32", "any"]
"""What the terms of an fp16 product are added up in."""
ACCUMULATIONS: tuple[Accumulation, ...] = get_args(Accumulation)

_MATRIX_PRODUCTS = frozenset(("MatMul", "Gemm"))
_PRODUCTS = _MATRIX_PRODUCTS | {"Conv"}
_MOVES = frozenset(
    (
        *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Neg", "Pad", "Reshape"),
        *("ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
    )
)
_DETOURS = frozenset(("Conv", "Resize"))
"""Ops that compute in float32 only because the low precision lacks them: what follows is low again."""
_QUANTIZERS = frozenset(("QuantizeLinear", "DequantizeLinear"))
"""Ops that make numbers of codes, or codes of numbers: part of the product that they stand before."""
_BLIND = frozenset(("Shape", "Size"))
"""Ops that do not look at the numbers they are given."""
_SUMS = frozenset(("Add", "Sub", "Mul"))
_COMPARISONS = frozenset(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "TopK"))
_SCALES = "scales of weights"
_SCORES, _CONSTANT = "scores of the visual tokens", "a constant that the low precision cannot hold"
_REASONS = {
    **dict.fromkeys(
        ("LayerNormalization", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "Sqrt", "RMSNormalization"),
        "norm or other statistic",
    ),
    **dict.fromkeys(("Exp", "Log", "ReduceMax", "Softmax"), "softmax"),
    **dict.fromkeys(("Cos", "Sin"), "rotary angles"),
    **dict.fromkeys(("Erf", "Gelu", "Sigmoid", "Tanh"), "activation function"),
    **dict.fromkeys(("Cast", "ConstantOfShape", "Range"), "made from integers"),
    **dict.fromkeys(_COMPARISONS, _SCORES),
    "ArgMax": "greedy choice",
    "Resize": "resampling (TensorRT has no bf16 Resize)",
}
_EXACT_INPUTS = {"selection_scores": _SCORES, "logits": _REASONS["ArgMax"]}
"""Inputs that are compared, so that no sum on their way may round them."""
MERGE_SUMS = "merge sums (inside the merge node)"


@dataclass
class PrecisionReport:
    """How many nodes of a stage compute in which precision, and why not in the low one."""

    precision: str
    low: int = 0
    """Products, sums and merges in the low precision."""
    float32: Counter[str] = field(default_factory=Counter)
    """Nodes kept in float32 by reason."""
    wide_sums: int = 0
    """fp16 products whose terms are asked to be added in float32."""

    def to_json(self) -> dict[str, object]:
        kept = dict(self.float32.most_common())
        return {"precision": self.precision, "low": self.low, "float32": kept, "float32_sums": self.wide_sums}

    def __str__(self) -> str:
        kept = "; ".join(f"{count} {reason}" for reason, count in self.float32.most_common())
        sums = f" ({self.wide_sums} products add in float32)" if self.wide_sums else ""
        return f"{self.low} nodes in {self.precision}{sums}, float32: {kept or 'none'}"


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer, or one that was only moved, cast or dequantized."""
    producer = value.producer()
    if producer is None:
        return value.const_value is not None
    return producer.op_type in (*_MOVES, *_QUANTIZERS, "Cast") and all(
        _is_constant(v) for v in producer.inputs if v is not None
    )


def _casts_weight(node: ir.Node) -> bool:
    """Whether ``node`` makes a weight float32 that is stored in another dtype."""
    return node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].is_initializer()


def _score_nodes(model: ir.Model) -> set[ir.Node]:
    """The float nodes between the last products with a weight and the comparisons of scores (rule 1)."""
    found: set[ir.Node] = set()
    waiting = [
        value for node in model.graph if node.op_type in _COMPARISONS and not node.domain for value in node.inputs
    ]
    while waiting:
        value = waiting.pop()
        producer = value.producer() if value is not None and _is_float(value) else None
        if producer is None or producer in found:
            continue
        if producer.op_type in _PRODUCTS and any(_is_constant(v) for v in producer.inputs if v is not None):
            continue
        found.add(producer)
        waiting += [v for v in producer.inputs if v is not None]
    return found


class _Pass:
    """One run of the pass over one model: decide for every node, then give every value its dtype and cast between."""

    def __init__(self, model: ir.Model, stage: StageSpec, precision: str) -> None:
        self.model, self.stage = model, stage
        self.low = LOW_PRECISIONS[precision]
        self.report = PrecisionReport(precision)
        self._scores = _score_nodes(model)
        self._reasons: dict[ir.Value, str] = {}
        """Why a value is float32. One without an entry is low, or a constant, which is what its user wants."""
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> PrecisionReport:
        graph = self.model.graph
        for value in graph.inputs:
            if value.name in _EXACT_INPUTS:
                self._reasons[value] = _EXACT_INPUTS[value.name]
        decided = []
        for node in graph:
            inputs, outputs = (
                [value for value in values if value is not None and _is_float(value)]
                for values in (node.inputs, node.outputs)
            )
            if (inputs or outputs) and node.op_type not in _BLIND and not _casts_weight(node):
                reason = self._decide(node)
                if reason is not None and node.op_type not in _DETOURS:
                    self._reasons |= dict.fromkeys(outputs, reason)
                self._count(node, reason)
                decided.append((node, set(inputs), outputs, self.low if reason is None else ir.DataType.FLOAT))
        for value, spec in zip(graph.inputs, engine_tensors(self.stage.inputs, self.report.precision), strict=True):
            if spec.dtype in HALF_DTYPES.values():
                value.dtype = self.low
        for _, _, outputs, dtype in decided:
            for value in outputs:
                value.dtype = dtype
        for node, floats, _, dtype in decided:
            for index, input_value in enumerate(node.inputs):
                if input_value in floats and input_value.dtype != dtype:
                    node.replace_input_with(index, self._cast(input_value, dtype))
        self._cast_outputs()
        for node in list(graph):
            if _casts_weight(node) and not node.outputs[0].uses():
                graph.remove(node, safe=True)
        return self.report

    def _decide(self, node: ir.Node) -> str | None:
        """Why ``node`` stays in float32, or None where it does not."""
        if node.domain == DOMAIN:
            return None
        if node in self._scores:
            return _SCORES
        if node.op_type in (_PRODUCTS | _MOVES) and not self._standard_takes(node):
            return f"{node.op_type} has no {self.report.precision} in opset {self.model.graph.opset_imports['']}"
        if node.op_type in _PRODUCTS:
            return None
        if node.op_type in _QUANTIZERS:
            # Scales that are codes themselves may be numbers too small for fp16 before they are multiplied.
            scales = any(user.op_type in _QUANTIZERS and place == 1 for user, place in node.outputs[0].uses())
            return _SCALES if scales else None
        varying = [value for value in node.inputs if value is not None and _is_float(value) and not _is_constant(value)]
        carried = [self._reasons[value] for value in varying if value in self._reasons]
        if node.op_type in _MOVES:
            return carried[0] if varying and len(carried) == len(varying) else None
        if node.op_type == "Cast" and varying:
            return "rows of a table, stored in another dtype"
        if node.op_type in _REASONS:
            return _REASONS[node.op_type]
        if carried:
            return carried[0]
        if node.op_type in _SUMS and varying:
            return _CONSTANT if any(self._rounds(value) for value in node.inputs if value is not None) else None
        return f"{node.op_type} (no rule makes it low)"

    def _standard_takes(self, node: ir.Node) -> bool:
        """Whether ONNX lets ``node`` compute in the low precision: bf16 convolutions came with opset 22."""
        schema = onnx.defs.get_schema(node.op_type, self.model.graph.opset_imports[""], node.domain)
        return any(f"tensor({self.low.name.lower()})" in types.allowed_type_strs for types in schema.type_constraints)

    def _rounds(self, value: ir.Value) -> bool:
        """Whether ``value`` is a small constant that would lose digits; a weight is meant to."""
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size > 1:
            return False
        exact = tensor.numpy()
        return not np.array_equal(exact.astype(self.low.numpy()).astype(exact.dtype), exact)

    def _count(self, node: ir.Node, reason: str | None) -> None:
        if node.domain == DOMAIN:
            self.report.float32[MERGE_SUMS] += 1
        elif node.op_type in _MOVES | _QUANTIZERS:
            return
        if reason is None:
            self.report.low += 1
        else:
            self.report.float32[reason] += 1

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``, cast once for all who want it: right behind its producer, or at the graph's start.

        A weight that the float32 graph casts is cast from how it is stored, or taken as it is.
        """
        maker = value.producer()
        if maker is not None and _casts_weight(maker):
            stored = maker.inputs[0]
            assert stored is not None
            if stored.dtype == dtype:
                return stored
            value = stored
        if (value, dtype) not in self._casts:
            cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, num_outputs=1)
            output = cast.outputs[0]
            output.name, output.dtype, output.shape = f"{value.name}_{dtype.name.lower()}", dtype, value.shape
            graph, producer = self.model.graph, value.producer()
            if producer is None:
                graph.insert_before(graph[0], cast)
            else:
                graph.insert_after(producer, cast)
            self._casts[value, dtype] = output
        return self._casts[value, dtype]

    def _cast_outputs(self) -> None:
        """Give the stage's outputs the dtypes of an engine; they keep their names."""
        graph = self.model.graph
        for index, spec in enumerate(engine_tensors(self.stage.outputs, self.report.precision)):
            value = graph.outputs[index]
            if spec.dtype not in ("float32", *HALF_DTYPES.values()):
                continue
            wanted = self.low if spec.dtype in HALF_DTYPES.values() else ir.DataType.FLOAT
            if value.dtype != wanted:
                value.name, name = f"{value.name}_uncast", value.name
                cast = self._cast(value, wanted)
                cast.name = name
                graph.outputs[index] = cast


def lower_precision(
    model: ir.Model, stage: StageSpec, precision: str, accumulate: Accumulation = "fp32"
) -> PrecisionReport:
    """Convert ``model``, the float32 graph of ``stage``, in place to "fp16" or "bf16" by the rules above.

    ``accumulate`` "fp32" asks builders to add the terms of fp16's products in float32, "any" leaves it to them.
    """
    _drop_casts_of_equal_types(model)
    common_passes.ShapeInferencePass()(model)
    report = _Pass(model, stage, precision).run()
    if precision == "fp16" and accumulate == "fp32":
        report.wide_sums = _sum_in_float32(model)
    return report


def _sum_in_float32(model: ir.Model) -> int:
    """Write fp16 products as ones of float32 between casts; returns how many.

    Scores that go straight to a softmax stay as they are. Their float32 cast already makes the builder add them so, and
    casts in front of them would keep it from making one kernel of the attention.
    """
    editor, graph, count = Editor(model, "wide_sum"), model.graph, 0
    for node in list(graph):
        product = node.outputs[0]
        if node.op_type not in _MATRIX_PRODUCTS or product.dtype != ir.DataType.FLOAT16 or _are_scores(product):
            continue
        if all(made_by(value, "DequantizeLinear") is not None for value in node.inputs):
            continue  # kernels of float8 know no other sums than float32's, and casts would hide the codes from them
        for index, value in enumerate(node.inputs):
            if value is not None:
                cast = editor.insert(node, "Cast", [value], {"to": int(ir.DataType.FLOAT)})
                cast.metadata_props.update(node.metadata_props)  # part of the same module
                node.replace_input_with(index, cast.outputs[0])
        users = list(product.uses())
        narrow = ir.node("Cast", [product], attributes={"to": int(ir.DataType.FLOAT16)}, num_outputs=1)
        narrow.metadata_props.update(node.metadata_props)
        sums = narrow.outputs[0]
        sums.dtype, sums.shape, sums.name = product.dtype, product.shape, f"{product.name}_float16"
        graph.insert_after(node, narrow)
        for user, index in users:
            user.replace_input_with(index, sums)
        for index, output in enumerate(graph.outputs):
            if output is product:
                sums.name, product.name = product.name, f"{product.name}_sums"
                graph.outputs[index] = sums
        product.dtype = ir.DataType.FLOAT
        count += 1
    return count


def _are_scores(product: ir.Value) -> bool:
    """Whether all that is done with ``product`` is a softmax of it."""
    cast = only_user(product, "Cast")
    return only_user(cast.outputs[0] if cast is not None else product, "Softmax") is not None


def _drop_casts_of_equal_types(model: ir.Model) -> None:
    """Remove ``CastLike``: in the float32 graph both sides are float32, later its type would follow the wrong one."""
    for node in list(model.graph):
        if node.op_type == "CastLike":
            value = node.inputs[0]
            assert value is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            model.graph.remove(node, safe=True)
