"""The calls of a stage's innermost modules in the order they run, and the values that pass through them.

A stage of :mod:`d3tom_export.stages` may run halves of a block without calling the block, so blocks cannot be watched
themselves. Their innermost modules (projections, norms) are called everywhere; a block is the calls that share its
name, and the residual stream that enters it is what its first module is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d3tom_export.diagnosis.graph import ModuleValues, StageGraph
from d3tom_export.merging.merge import merge_tokens
from d3tom_export.plugins.merge_op import OP_TYPE

Side = Literal[0, 1]
INPUT: Side = 0
OUTPUT: Side = 1


class Point(NamedTuple):
    """A moment of a run: before (:data:`INPUT`) or after (:data:`OUTPUT`) a call. Points compare in order of time."""

    call: int
    side: Side


START = Point(-1, OUTPUT)
"""Before the first call, when nothing but the stage's inputs is known."""

See = Callable[[Point, Sequence[Tensor]], None]


class Call(NamedTuple):
    """A module's call."""

    scope: str
    """The module's name within the stage; the merge node's is its operator's."""
    group: str
    """The block or other module around it that is judged as one before its parts are."""
    values: ModuleValues | str
    """Its values in the graph, or why they cannot be told."""


def _group(scope: str) -> str:
    """The outermost numbered module around ``scope`` (a layer), else the one it is a direct child of."""
    parts = scope.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


class _Merges(TorchDispatchMode):
    """Reports the merge node's calls, which is an operator and no module: one call for each of its row inputs."""

    def __init__(
        self,
        nearest: Sequence[Tensor],
        before: Callable[[str, Sequence[Tensor]], None],
        after: Callable[[Sequence[Tensor]], None],
    ) -> None:
        super().__init__()
        self._nearest, self._before, self._after = iter(nearest), before, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.d3tom_export.merge.default:
            return func(*args, **(kwargs or {}))
        rows, normed, kept = args
        results = []
        for hidden in rows:
            self._before(OP_TYPE, (hidden, normed, kept))
            results.append(merge_tokens(hidden, normed, kept, nearest=next(self._nearest, None)))
            self._after(results[-1:])
        return results


def walk(
    module: nn.Module, arguments: Sequence[Tensor], see: See, nearest: Sequence[Tensor] = ()
) -> tuple[list[str], tuple[Tensor, ...]]:
    """Run a stage's ``module`` and show ``see`` what goes into and out of each innermost call.

    ``nearest`` says for each merge of rows who joins whom, (B, V), as :func:`~d3tom_export.merging.merge.nearest_kept`.
    Returns the calls' scopes in order, and the stage's outputs. No value is kept here once ``see`` returns.
    """
    scopes: list[str] = []

    def before(scope: str, tensors: Sequence[Tensor]) -> None:
        scopes.append(scope)
        see(Point(len(scopes) - 1, INPUT), tensors)

    def after(tensors: Sequence[Tensor]) -> None:
        see(Point(len(scopes) - 1, OUTPUT), tensors)

    def hook_pair(scope: str) -> tuple[Any, Any]:
        def pre_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            before(scope, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            after([output])

        return pre_hook, hook

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_Merges(nearest, before, after))
        for scope, child in module.named_modules():
            if scope and not any(child.children()):
                pre_hook, hook = hook_pair(scope)
                stack.callback(child.register_forward_pre_hook(pre_hook, with_kwargs=True).remove)
                stack.callback(child.register_forward_hook(hook).remove)
        result = module(*arguments)
    return scopes, result if isinstance(result, tuple) else (result,)


def trail(module: nn.Module, arguments: Sequence[Tensor], graph: StageGraph) -> list[Call]:
    """The calls of one run of a stage, each with its values in ``graph``."""
    scopes, _ = walk(module, arguments, lambda point, tensors: None)
    merges = graph.merges()
    same_merges = len(merges) == scopes.count(OP_TYPE)
    calls: list[Call] = []
    for scope in scopes:
        group = _group(scope)
        values: ModuleValues | str
        if scope == OP_TYPE:
            group = calls[-1].group if calls else ""
            values = merges.pop(0) if same_merges else "the graph has another number of merges"
        elif scopes.count(scope) > 1:
            values = f"it is called {scopes.count(scope)} times"
        else:
            values = graph.module_values(scope)
        calls.append(Call(scope, group, values))
    return calls
