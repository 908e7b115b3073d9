"""What ``d3tom-export bench`` reports to people: a table of its rows."""

from __future__ import annotations

from typing import Any

from d3tom_export.quantize.summary import WeightsSummary


def table(result: dict[str, Any]) -> str:
    """The table of ``result``, which is also what ``--json`` writes."""
    merge, rows = result["merge"], result["rows"]
    batch = "" if result["batch"] == 1 else f"batch {result['batch']}, "
    width = max(len(row["combination"]) for row in rows)
    judged = any("exact_match" in row for row in rows)
    exact = f" {'exact match':>19}" if judged else ""
    lines = [
        f"{result['bundle']} on {result['backend']} ({_computed_in(result)}), {result['rounds']} rounds; "
        f"{result['prompt']}: {batch}"
        f"{result['prompt_tokens']} prompt tokens ({result['visual_tokens']} visual), {result['answer_tokens']} answer "
        f"tokens; l* = {merge['layer']}, ratio {merge['ratio']:g} {merge['schedule']}{_of_the_cache(result)}",
        "",
        f"{'':{width}} {'steps':>6} {'kept':>6} {'answer, ms':>21} {'first':>8} {'step':>8} {'tokens/s':>9} "
        f"{'GFLOP':>9} {'speed-up':>20} {'ideal':>6} {'of it':>6} {'peak MiB':>9}{exact}",
    ]
    for row in rows:
        answer, speedup, peak = row["answer_seconds"], row["speedup"], row["peak_bytes"]
        time = f"{_ms(answer['median'])} ({_ms(answer['min'])}-{_ms(answer['max'])})"
        ratio = f"{speedup['median']:.2f} ({speedup['min']:.2f}-{speedup['max']:.2f})"
        memory = "-" if peak is None else f"+{peak['added'] / 2**20:.0f}"
        exact = ""
        if "exact_match" in row:
            low, high = row["interval"]
            exact = f" {row['exact_match']:>6.1%} ({low:.1%}-{high:.1%})"
        lines.append(
            f"{row['combination']:{width}} {row['steps']:>6.4g} {row['mean_kept']:>6.0%} {time:>21} "
            f"{_ms(row['first_token_seconds']['median']):>8} {_ms(row['step_seconds']['median']):>8} "
            f"{row['tokens_per_second']:>9.1f} {row['flops'] / 1e9:>9.2f} {ratio:>20} "
            f"{row['flop_ideal_speedup']:>6.2f} {row['of_flop_ideal']:>6.0%} {memory:>9}{exact}"
        )
    for row in rows:
        if "cache_bytes" in row and row["commit"] == "plan":
            size = {name: f"{value / 2**20:.2f} MiB" for name, value in row["cache_bytes"].items()}
            lines.append(
                f"{row['combination']}: full cache {size['full']}, merged {size['merged']}; a step reads "
                f"{size['read_per_step']} and writes {size['written_per_step']} of keys and values"
            )
    for rule, settings in result["rules"].items():
        lines.append(f"{rule}: {settings['words']}")
    if result["quantization"] is not None:
        lines.append(f"weights: {WeightsSummary(**result['quantization']).lines()[0]}")
    lines.append("kept: visual tokens that layers behind l* see, over all steps")
    lines.append("peak MiB: resident memory that an answer adds to the loaded model's, under the plan")
    if judged:
        lines.append("exact match: with its 95 % interval (Wilson); differences within it are none")
    if "figure" in result:
        lines.append(f"picture: {result['figure']}")
    return "\n".join(lines)


def _computed_in(result: dict[str, Any]) -> str:
    """Its precision, and the format of weights in few bits."""
    weights = f", weights in {', '.join(result['weights'])}" if result["weights"] else ""
    return f"{result['precision']}{weights}"


def _of_the_cache(result: dict[str, Any]) -> str:
    """How a cache is merged at the steps, where one is."""
    if not any(row["loop"] == "cached" and row["merging"] == "step" for row in result["rows"]):
        return ""
    merge = result["merge"]
    fixed = merge["schedule"] == "adaptive" and not merge["cache"]["adaptive"]
    return f"{', fixed with a cache' if fixed else ''}; cache merged {merge['cache']['remerge']}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 1 else f"{1000 * seconds:.0f}"
