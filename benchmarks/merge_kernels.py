"""The merge kernels on a GPU at LaViDa's size, against the memory floor and the plain PyTorch expression.

    python -m benchmarks.merge_kernels [--json FILE]

The floor is what reading ``normed`` and ``hidden`` once each (two passes over V*D) takes at the bandwidth that a large
device-to-device copy reaches on the same GPU. Every contender works through a rotation of inputs several times larger
than the GPU's cache, so that rows come from memory; its rounds alternate with the others', and the table gives the
median and the span of the middle 80 per cent. All but ``pytorch, eager`` are replayed from CUDA graphs: what is timed
is the GPU's work, not Python's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from d3tom_export.errors import D3tomError
from d3tom_export.merging.merge import merge_tokens
from d3tom_export.plugins.compiled import compile_kernels
from d3tom_export.plugins.driver import LoadedKernels, PreparedMerge, cuda_driver, device_sm
from d3tom_export.plugins.launch import DTYPES, MergeSizes, launches, workspace

VISUAL, WIDTH, KEPT = 1008, 4096, (100, 400)
CACHES = 4
"""The rotation holds this many times the GPU's second-level cache."""


def floor_bytes(sizes: MergeSizes, element: int) -> int:
    """Bytes that any merge must read: each row of ``normed`` and of ``hidden`` once."""
    return sizes.batch * sizes.visual * (sizes.depth + sizes.width) * element


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, and the 10th and 90th of a hundred, in microseconds."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median_us": statistics.median(seconds) * 1e6, "p10_us": cuts[0] * 1e6, "p90_us": cuts[-1] * 1e6}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown: times in microseconds, and how many times the floor the kernels take."""
    names = list(rows[0]["times"])
    lines = [f"| dtype | K | floor | {' | '.join(names)} | kernels / floor | pytorch / kernels |"]
    lines.append("| --- " * (len(names) + 5) + "|")
    for row in rows:
        cells = [
            f"{time['median_us']:.1f} ({time['p10_us']:.1f}-{time['p90_us']:.1f})" for time in row["times"].values()
        ]
        ours = row["times"]["kernels"]["median_us"]
        ratios = f"{ours / row['floor_us']:.2f} | {row['times']['pytorch']['median_us'] / ours:.2f}"
        lines.append(f"| {row['dtype']} | {row['kept']} | {row['floor_us']:.1f} | {' | '.join(cells)} | {ratios} |")
    return "\n".join(lines)


def _elapsed(work: Callable[[], object], repeats: int) -> float:
    """Seconds of GPU time of one of ``repeats`` calls in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes a second, read and written together, of device-to-device copies of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    _elapsed(lambda: target.copy_(source), 5)
    return 2 * size / statistics.median(_elapsed(lambda: target.copy_(source), 5) for _ in range(9))


def _graph(work: Callable[[], object]) -> Callable[[], None]:
    """``work`` captured, after a first plain run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        graph.replay()

    return replay


class Inputs:
    """One entry of the rotation: a merge's tensors with their addresses."""

    def __init__(self, sizes: MergeSizes, dtype: str, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        kind = getattr(torch, dtype)
        shape = (sizes.batch, sizes.visual)
        self.hidden = torch.randn(*shape, sizes.width, device="cuda", generator=generator).to(kind)
        self.normed = torch.randn(*shape, sizes.depth, device="cuda", generator=generator).to(kind)
        permuted = torch.randperm(sizes.visual, device="cuda", generator=generator)[: sizes.kept]
        self.kept = permuted.sort().values[None].expand(sizes.batch, -1).contiguous()
        self.merged = torch.empty(sizes.batch, sizes.kept, sizes.width, dtype=kind, device="cuda")
        self.scratch = torch.empty(workspace(sizes).size, dtype=torch.uint8, device="cuda")

    def kernels(self, merge: PreparedMerge, only: int | None = None) -> None:
        """The kernels of ``merge``, or one of them, on the current stream."""
        tensors = (self.hidden, self.normed, self.kept, self.merged)
        merge.place([tensor.data_ptr() for tensor in tensors], self.scratch.data_ptr())
        merge.launch(int(torch.cuda.current_stream().cuda_stream), only)

    def pytorch(self) -> torch.Tensor:
        """The plain expression."""
        return merge_tokens(self.hidden, self.normed, self.kept)


def _agree(inputs: Inputs) -> None:
    """Refuse to time kernels that are wrong: at most a token in a hundred may have turned on a near-tie."""
    expected = inputs.pytorch().float()
    off = ((inputs.merged.float() - expected).abs() > 0.02 * (1 + expected.abs())).any(-1).float().mean().item()
    if not off <= 0.02:
        raise D3tomError(
            f"The merge kernels disagree with PyTorch on {off:.1%} of the kept rows ({inputs.merged.dtype}); nothing "
            "was timed. Run `python -m pytest -m gpu tests/plugins/test_gpu.py` and report what fails."
        )


def measure(sizes: MergeSizes, dtype: str, bandwidth: float, rounds: int) -> dict[str, Any]:
    """One row of the table. Needs a GPU.

    :raises D3tomError: the kernels cannot be compiled or loaded here, or disagree with PyTorch.
    """
    driver = cuda_driver()
    sm = device_sm(driver)
    merge = LoadedKernels(compile_kernels(dtype, (sm,), sizes.depth, sizes.width), driver).prepare(sizes, dtype)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    moved = floor_bytes(sizes, getattr(torch, dtype).itemsize)
    rotation = [Inputs(sizes, dtype, seed) for seed in range(max(3, -(-CACHES * cache // moved)))]

    def each(work: Callable[[Inputs], object]) -> Callable[[], None]:
        def run() -> None:
            for inputs in rotation:
                work(inputs)

        return run

    contenders = {
        "kernels": _graph(each(lambda one: one.kernels(merge))),
        "pytorch": _graph(each(Inputs.pytorch)),
        "pytorch, eager": each(Inputs.pytorch),
    }
    for place, step in enumerate(launches(sizes, dtype)):
        # On its own a kernel repeats the last full merge's work on the same buffers.
        def alone(one: Inputs, place: int = place) -> None:
            one.kernels(merge, place)

        contenders[step.variant.name.split("-")[0]] = _graph(each(alone))
    contenders["kernels"]()
    torch.cuda.synchronize()
    for inputs in rotation:
        _agree(inputs)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 3):
        for name, work in contenders.items():
            times[name].append(_elapsed(work, 3) / len(rotation))
    return {
        "dtype": dtype,
        "kept": sizes.kept,
        "floor_us": moved / bandwidth * 1e6,
        "rotation": len(rotation),
        # The first rounds bring the clocks up.
        "times": {name: spread(seconds[3:]) for name, seconds in times.items()},
    }


@click.command()
@click.option("--rounds", type=click.IntRange(5), default=50, show_default=True, help="Alternating rounds.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(rounds: int, json_file: Path | None) -> None:
    """Measure and print a Markdown table; microseconds."""
    if not torch.cuda.is_available():
        raise click.ClickException(
            "This benchmark times the merge kernels on an NVIDIA GPU, and torch finds none here: either there is no "
            "GPU with its driver (`nvidia-smi` shows it), or this torch is built for the CPU (`pip install torch` from "
            "PyTorch's CUDA index). Without a GPU the kernels are checked, not timed: `python -m pytest tests/plugins`."
        )
    try:
        torch.zeros(1, device="cuda")  # makes CUDA's context current
        gpu = torch.cuda.get_device_name()
        bandwidth = copy_bandwidth()
        click.echo(
            f"{gpu}: copies move {bandwidth / 1e9:.0f} GB/s; V = {VISUAL}, D = {WIDTH}; microseconds\n", err=True
        )
        rows = []
        for dtype in DTYPES:
            for kept in KEPT:
                rows.append(measure(MergeSizes(1, VISUAL, kept, WIDTH, WIDTH), dtype, bandwidth, rounds))
    except D3tomError as error:
        raise click.ClickException(str(error)) from None
    click.echo(table(rows))
    if json_file is not None:
        found = {"gpu": gpu, "copy_bytes_per_s": bandwidth, "visual": VISUAL, "width": WIDTH, "rows": rows}
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
