"""Our loops against the release's, with and without KV cache and merging, at LaViDa's proportions in small.

    python -m benchmarks.loops [--rounds N] [--only NAME]... [--per-block] [--bundle NAME=FOLDER]... [--json FILE]

Every contestant answers the same prompt in every combination. All of them take turns within a round, ratios are taken
within a round, and tokens are compared. Beside each ratio stands the FLOP-ideal, and above the table what this
machine's matrix products reach: that, not the loop, decides how many GFLOP/s are possible.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import onnxruntime
import torch

from benchmarks import gemm_rate
from benchmarks.contestants import CONTESTANTS, Answerer, Contestant, of_bundle
from benchmarks.proportions import LAVIDA, SMALL, Proportions, build
from d3tom_export.bundle.folder import Bundle, load_bundle
from d3tom_export.config import LOOPS
from d3tom_export.cost.bench import Timing, answer_flops, spread, time_answer, time_in_turns
from d3tom_export.cost.combinations import Combination, combinations_of
from d3tom_export.loop.denoise import Ints
from d3tom_export.process import claim
from d3tom_export.progress import Progress, no_progress

WARM_UP_STEPS = 3
"""The first merges nothing, the second is the first that does."""


class Entry(NamedTuple):
    """One cell of the comparison."""

    contestant: str
    combination: Combination


class Answer:
    """An answer that can be timed again and again; ``tokens`` are those after each step of the last time."""

    def __init__(self, answerer: Answerer, combination: Combination, sizes: Proportions) -> None:
        self._answerer, self._sizes, self._merge = answerer, sizes, combination.merge(sizes.merge)
        self._prompt = sizes.prompt()
        self.tokens: list[Ints] = []

    def __call__(self) -> Iterator[Ints]:
        self.tokens.clear()
        for record in self._answerer(self._prompt, self._sizes.generation, self._merge):
            self.tokens.append(record.tokens)
            yield record.tokens


def entries(contestants: Sequence[Contestant], per_block: bool) -> list[Entry]:
    """Every contestant in the four combinations, and where asked and possible with a cache merged once per block."""
    held = [Combination("cached", "step", remerge="per-block")] if per_block else []
    return [
        Entry(contestant.name, combination)
        for contestant in contestants
        for combination in [*combinations_of(LOOPS), *(held if contestant.holds_merges else [])]
    ]


def open_answers(
    contestants: Sequence[Contestant], wanted: Sequence[Entry], bundle: Bundle, sizes: Proportions
) -> dict[Entry, Answer]:
    """Every entry's answer; a contestant's combinations of one loop share what it opened."""
    by_name = {contestant.name: contestant for contestant in contestants}
    opened = {(name, loop): by_name[name].open(bundle, loop) for name in by_name for loop in LOOPS}
    return {
        entry: Answer(opened[entry.contestant, entry.combination.loop], entry.combination, sizes) for entry in wanted
    }


def warm_up(
    answers: Mapping[Entry, Answer], contestants: Sequence[Contestant], progress: Progress = no_progress
) -> dict[Entry, float]:
    """Run every entry's first steps, a compiling one's whole answer; returns the compiling ones' seconds."""
    compiling = {contestant.name for contestant in contestants if contestant.compiles}
    first: dict[Entry, float] = {}
    for done, (entry, answer) in enumerate(answers.items()):
        progress("warming up", done, len(answers))
        if entry.contestant in compiling:
            first[entry] = time_answer(answer).total
        else:
            for _ in islice(answer(), WARM_UP_STEPS):
                pass
    return first


def departure(tokens: Sequence[Ints], reference: Sequence[Ints]) -> dict[str, Any]:
    """How an answer compares with another: share of its tokens that are equal, and the first step that differs."""
    steps = zip(tokens, reference, strict=True)
    differs = next((step for step, (ours, theirs) in enumerate(steps) if not np.array_equal(ours, theirs)), None)
    return {"equal": float((tokens[-1] == reference[-1]).mean()), "first_other_step": differs}


def _ratio(slow: Sequence[Timing], fast: Sequence[Timing]) -> dict[str, float]:
    return spread([one.total / other.total for one, other in zip(slow, fast, strict=True)], 4)


def rows(
    timings: Mapping[Entry, Sequence[Timing]],
    first: Mapping[Entry, float],
    answers: Mapping[Entry, Answer],
    bundle: Bundle,
    sizes: Proportions,
) -> list[dict[str, Any]]:
    """One row an entry; ratios to the first contestant in the same combination, and merged over unmerged.

    A contestant that cannot hold a merge stands, beside one that does, with its merge at every step.

    Tokens are compared with those of the first contestant that has the combination. GFLOP/s count the algorithm's
    products (:func:`~d3tom_export.cost.bench.answer_flops`) for every contestant alike: what one does beyond them
    is its loss.
    """
    base = next(iter(timings)).contestant
    found = []
    for entry, runs in timings.items():
        combination = entry.combination
        plain = Entry(entry.contestant, Combination(combination.loop, "unmerged"))
        same = Entry(base, combination)
        if same not in timings:
            same = Entry(base, Combination(combination.loop, combination.merging))
        reference = next(one for one in timings if one.combination == combination)
        flops, plain_flops = (
            answer_flops(one, bundle.config.language, sizes.work, sizes.generation, sizes.merge)
            for one in (combination, plain.combination)
        )
        median = statistics.median(run.total for run in runs)
        row: dict[str, Any] = {
            "contestant": entry.contestant,
            "combination": combination.label,
            "answer_seconds": spread([run.total for run in runs]),
            "step_seconds": spread([statistics.median(run.steps) for run in runs if run.steps] or [0.0]),
            "flops": flops,
            "gflop_per_second": round(flops / median / 1e9, 1),
            "over_base": _ratio(timings[same], runs),
            "over_unmerged": _ratio(timings[plain], runs) if combination.merged else None,
            "flop_ideal": round(plain_flops / flops, 4) if combination.merged else None,
            "tokens": departure(answers[entry].tokens, answers[reference].tokens),
        }
        if combination.merged:
            row["of_flop_ideal"] = round(row["over_unmerged"]["median"] / row["flop_ideal"], 4)
        if entry in first:
            row["compile_seconds"] = round(max(first[entry] - median, 0.0), 2)
        found.append(row)
    return found


def departed(contestants: Sequence[Contestant], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of float32 contestants whose tokens are not the others'."""
    exact = {contestant.name for contestant in contestants if contestant.float32}
    return [
        f"{row['contestant']}, {row['combination']}"
        for row in found
        if row["contestant"] in exact and row["tokens"]["first_other_step"] is not None
    ]


def _of(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    base = found[0]["contestant"]
    heads = ["contestant", "combination", "answer, s", "step, ms", "GFLOP/s", f"over {base}"]
    heads += ["merged over unmerged", "FLOP-ideal", "of it", "tokens equal"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in found:
        merged = ["", "", ""]
        if row["over_unmerged"] is not None:
            merged = [_of(row["over_unmerged"]), f"{row['flop_ideal']:.2f}", f"{row['of_flop_ideal']:.0%}"]
        tokens = f"{row['tokens']['equal']:.0%}"
        if row["tokens"]["first_other_step"] is not None:
            tokens += f", differ from step {row['tokens']['first_other_step']}"
        cells = [row["contestant"], row["combination"], _of(row["answer_seconds"])]
        cells += [f"{1000 * row['step_seconds']['median']:.0f}", f"{row['gflop_per_second']:.0f}"]
        lines.append(f"| {' | '.join([*cells, _of(row['over_base']), *merged, tokens])} |")
    compiled = [f"{row['combination']} {row['compile_seconds']:.1f} s" for row in found if "compile_seconds" in row]
    if compiled:
        lines.append(f"\nCompiling, not counted above (first answer less a later one): {', '.join(compiled)}.")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
    }


def run(
    contestants: Sequence[Contestant],
    bundle: Bundle,
    sizes: Proportions,
    rounds: int,
    *,
    per_block: bool = False,
    gemm_seconds: float = 0.3,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure everything: the result as JSON has it."""
    gemm = gemm_rate.measured(seconds=gemm_seconds)
    answers = open_answers(contestants, entries(contestants, per_block), bundle, sizes)
    first = warm_up(answers, contestants, progress)
    timings = time_in_turns(answers, rounds, progress, warm_up=0)
    return {
        "machine": machine(),
        "prompt_tokens": sizes.work.prompt_tokens,
        "visual_tokens": sizes.visual_tokens,
        "config": dict(sizes.config),
        "merge": sizes.merge.to_json(),
        "generation": sizes.generation.to_json(),
        "weights": "random",
        "rounds": rounds,
        "gemm_gflop_per_second": gemm,
        "contestants": {contestant.name: contestant.what for contestant in contestants},
        "rows": rows(timings, first, answers, bundle, sizes),
    }


def _others(named: Sequence[str]) -> list[Contestant]:
    """Contestants from ``NAME=FOLDER``."""
    found = []
    for value in named:
        name, _, folder = value.partition("=")
        if not name or not folder:
            raise click.BadParameter(f"{value!r} is not NAME=FOLDER", param_hint="--bundle")
        found.append(of_bundle(name, load_bundle(Path(folder))))
    return found


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Answers per combination.")
@click.option(
    "--only", multiple=True, type=click.Choice([one.name for one in CONTESTANTS]), help="Take part, the first the base."
)
@click.option("--per-block", is_flag=True, help="Also with a cache merged once per block, where a contestant can.")
@click.option("--bundle", "bundles", multiple=True, metavar="NAME=FOLDER", help="One more contestant, on ONNX Runtime.")
@click.option("--quick", is_flag=True, help="Tiny sizes and one round: shows that all of it runs, not how fast.")
@click.option("--keep", type=click.Path(path_type=Path), help="Build the bundle here, or take the one that is here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result as JSON.")
def main(
    rounds: int,
    only: tuple[str, ...],
    per_block: bool,
    bundles: tuple[str, ...],
    quick: bool,
    keep: Path | None,
    json_file: Path | None,
) -> None:
    """Measure and print Markdown tables."""
    sizes = SMALL if quick else LAVIDA
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    contestants = [*(by_name[name] for name in only or by_name), *_others(bundles)]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(scratch) / "inductor")  # compiling is timed from nothing
        folder = None if keep is None else keep / "lavida-proportions"
        if folder is None or not folder.is_dir():
            folder = build(Path(keep or scratch), sizes.merge, sizes.generation, LOOPS, sizes.config)

        def progress(what: str, done: int, total: int) -> None:
            click.echo(f"{what}: {done} of {total}", err=True)

        result = run(
            contestants,
            load_bundle(folder),
            sizes,
            1 if quick else rounds,
            per_block=per_block,
            gemm_seconds=0.01 if quick else 0.3,
            progress=progress,
        )
    if json_file is not None:  # before the table: minutes of measuring do not hang on a pipe
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    steps = sizes.generation.gen_length // sizes.generation.block * sizes.generation.steps_per_block
    click.echo(
        f"V = {sizes.visual_tokens}, P = {sizes.work.prompt_tokens}, G = {sizes.work.answer_tokens} in {steps} steps, "
        f"l* = {sizes.merge.layer}, ratio {sizes.merge.ratio:g}, random weights; {result['rounds']} rounds; "
        f"{result['machine']['cpu']}, {result['machine']['cores']} cores\n"
    )
    click.echo("\n".join(f"- {name}: {what}" for name, what in result["contestants"].items()))
    click.echo(f"\n{gemm_rate.table(result['gemm_gflop_per_second'])}\n\n{table(result['rows'])}")
    others = departed(contestants, result["rows"])
    if others:
        raise click.ClickException(f"Tokens of float32 contestants differ: {', '.join(others)}.")


if __name__ == "__main__":
    claim()
    main()
