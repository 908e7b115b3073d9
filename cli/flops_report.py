"""What ``d3tom-export flops`` reports: answers as data, and the data as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple

from d3tom_export.config import CommitRule, GenerationConfig, LanguageConfig, Loop, MergeConfig
from d3tom_export.cost.combinations import Combination, combinations_of
from d3tom_export.cost.flop_stages import StageTotal, answer_stages
from d3tom_export.cost.flops import (
    Cost,
    PromptPlan,
    StepMerge,
    Workload,
    answer_cost,
    cached_step,
    prompt_plan,
    step_merges,
    uncached_step,
)
from d3tom_export.errors import D3tomError

ROWS = (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 28)
"""Layers that the printed table of reductions shows, beside --layer and the last; JSON holds them all."""


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _cost_json(cost: Cost) -> dict[str, Any]:
    intensity = round(cost.flops / cost.bytes, 3) if cost.bytes else None
    return {"flops": cost.flops, "bytes": cost.bytes, "flops_per_byte": intensity, "parts": asdict(cost)}


def stages_json(stages: Sequence[StageTotal]) -> list[dict[str, Any]]:
    """Stages in their order, each with its calls and its whole cost."""
    return [{"stage": stage.stage, "calls": stage.calls, **_cost_json(stage.cost)} for stage in stages]


def _step_json(config: LanguageConfig, work: Workload, layer: int, step: StepMerge, cached: bool) -> dict[str, Any]:
    if cached:
        cost = cached_step(config, work, layer, step.keep, merges_afresh=step.afresh)
    else:
        cost = uncached_step(config, work, layer, step.keep)
    return {"keep": step.keep, "tokens_behind_layer": work.tokens - work.merged_away(step.keep), **_cost_json(cost)}


def answers(
    config: LanguageConfig,
    work: Workload,
    plan: GenerationConfig,
    rules: Mapping[CommitRule, GenerationConfig],
    merge: MergeConfig,
    loops: Sequence[Loop],
    every_step: bool,
) -> list[dict[str, Any]]:
    """An answer in each of ``loops``, unmerged and (where ``merge`` merges anything) merged, by stage and by step.

    Under ``plan``, and under each of ``rules``, whose settings are those of a plan of as many steps as the rule is
    thought to take. ``saved`` is the share of FLOPs that merging saves against the same loop unmerged; ``of_uncached``
    are the FLOPs as a share of those of the uncached loop unmerged and planned. Unmerged there is an answer that is cut
    where it costs least, at the first layer: cut at the last, all rows of that are computed.
    """
    rows: list[dict[str, Any]] = []
    uncut = replace(merge, layer=0)
    base = _whole(config, work, plan, uncut, Combination("uncached", "unmerged")).cost.flops
    merges = merge.schedule != "none" and work.visual_tokens > 0
    at_step, at_prefill = (_mergeable(config, merge, place) for place in ("step", "prefill"))
    for combination in combinations_of(loops, merges=merges, at_step=at_step, at_prefill=at_prefill, rules=list(rules)):
        cached, generation = combination.loop == "cached", combination.generation(plan, rules)
        steps, prompt, cost = _whole(config, work, generation, merge, combination)
        plain = _whole(config, work, generation, uncut, replace(combination, merging="unmerged")).cost.flops
        row = {
            "combination": combination.label,
            "loop": combination.loop,
            "merged": combination.merged,
            "merging": combination.merging,
            "commit": combination.commit,
            "steps_run": len(steps),
            "kept_per_step": [work.visual_tokens if step.keep is None else step.keep for step in steps],
            **_cost_json(cost),
            "of_uncached": cost.flops / base,
            "saved": 1 - cost.flops / plain,
            "stages": stages_json(answer_stages(config, work, merge.layer, steps, cached=cached, prompt=prompt)),
        }
        if every_step and combination.merged:
            row["steps"] = [_step_json(config, work, merge.layer, step, cached) for step in steps]
        rows.append(row)
    return rows


class _Whole(NamedTuple):
    """One combination's answer."""

    steps: list[StepMerge]
    prompt: PromptPlan
    cost: Cost


def _mergeable(config: LanguageConfig, merge: MergeConfig, place: Literal["step", "prefill"]) -> bool:
    """Whether a cache can be merged there as ``merge`` has it."""
    try:
        placed = replace(merge, merge_at=place)
        placed.check_layer(config.n_layers)
        placed.check_cached()
    except D3tomError:
        return False
    return True


def _whole(
    config: LanguageConfig,
    work: Workload,
    generation: GenerationConfig,
    merge: MergeConfig,
    combination: Combination,
) -> _Whole:
    """The steps of one combination's answer, and what they and the prompt cost."""
    cached = combination.loop == "cached"
    merges, first_token = combination.merge(merge).in_loop(cached), cached and config.row_shift
    steps = step_merges(merges, generation, work.visual_tokens, first_token=first_token)
    prompt = prompt_plan(merges, work.visual_tokens)
    return _Whole(steps, prompt, answer_cost(config, work, merge.layer, steps, cached=cached, prompt=prompt))


def _si(value: float) -> str:
    """``value`` to four digits, with a prefix of a thousand: 561.2 T."""
    if not value:
        return "-"
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while value >= 999.95 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{value:.{max(0, 4 - len(str(int(value))))}f} {prefixes[0]}".rstrip()


def _costs(row: dict[str, Any]) -> str:
    """The columns that every table of costs ends in."""
    parts = row["parts"]
    intensity = "-" if not row["flops_per_byte"] else f"{row['flops_per_byte']:.1f}"
    return (
        f"{_si(parts['weights_read']):>9} {_si(parts['cache_read']):>11} {_si(parts['cache_written']):>14} "
        f"{intensity:>10}"
    )


_COST_HEADS = f"{'weights B':>9} {'cache read':>11} {'cache written':>14} {'FLOP/byte':>10}"


def _answer_lines(result: dict[str, Any]) -> list[str]:
    rows, before = result["answers"], sum(stage["flops"] for stage in result["prompt"])
    width = max(24, *(len(row["combination"]) for row in rows))
    lines = [
        f"{'one answer':{width}} {'FLOPs':>9} {'of uncached':>12} {'saved':>7} {_COST_HEADS} {'with prompt':>11} "
        f"{'steps':>6}"
    ]
    for row in rows:
        saved = f"{row['saved']:.1%}" if row["merged"] else "-"
        lines.append(
            f"{row['combination']:{width}} {_si(row['flops']):>9} {row['of_uncached']:>12.1%} {saved:>7} {_costs(row)} "
            f"{_si(row['flops'] + before):>11} {row['steps_run']:>6}"
        )
    return lines


def _stage_lines(title: str, stages: list[dict[str, Any]]) -> list[str]:
    total = sum(stage["flops"] for stage in stages)
    lines = [f"{title:24} {'FLOPs':>9} {'of it':>12} {'calls':>7} {_COST_HEADS}"]
    for stage in stages:
        share = f"{stage['flops'] / total:.1%}" if total else "-"
        lines.append(f"  {stage['stage']:22} {_si(stage['flops']):>9} {share:>12} {stage['calls']:>7} {_costs(stage)}")
    return lines


def _step_lines(row: dict[str, Any]) -> list[str]:
    lines = [f"{row['combination'] + ', steps':24} {'FLOPs':>9} {'tokens':>12} {'kept':>7} {_COST_HEADS}"]
    for index, step in enumerate(row["steps"]):
        kept = "all" if step["keep"] is None else step["keep"]
        lines.append(
            f"  {index:<22} {_si(step['flops']):>9} {step['tokens_behind_layer']:>12} {kept:>7} {_costs(step)}"
        )
    return lines


def _reduction_lines(result: dict[str, Any]) -> list[str]:
    table, chosen = result["reductions"], result["merge"]["layer"]
    last = table["layers"][-1]
    lines = [
        f"FLOPs saved without a cache, {table['schedule']} ratio (columns), by l* (rows)",
        f"{'l*':>4}" + "".join(f"{ratio:>8g}" for ratio in table["ratios"]),
    ]
    for layer, saved in zip(table["layers"], table["saved"], strict=True):
        if layer in (*ROWS, chosen, last):
            lines.append(f"{layer:>4}" + "".join(f"{share:>8.1%}" for share in saved))
    return lines


def text(result: dict[str, Any]) -> str:
    """The tables of ``result``, which is also what ``--json`` writes."""
    merge, generation = result["merge"], result["generation"]
    rows = result["answers"]
    steps = len(rows[0]["kept_per_step"])
    batch = "" if result["batch"] == 1 else f"batch {result['batch']}, "
    planned = [row for row in rows if row["commit"] == "plan"]
    cached = any(row["loop"] == "cached" and row["merging"] == "step" for row in rows)
    fixed = cached and merge["schedule"] == "adaptive" and not merge["cache"]["adaptive"]
    merging = (
        f"l* = {merge['layer']}, ratio {merge['ratio']:g} {merge['schedule']}{', fixed with a cache' if fixed else ''}"
        f"{'; cache merged ' + merge['cache']['remerge'] if cached else ''}"
        if any(row["merged"] for row in rows)
        else f"nothing merges; cut at l* = {merge['layer']}"
    )
    weights = "" if result["weights"] is None else f", weights in {result['weights']}"
    lines = [
        f"{result['model']}, {result['precision']}{weights}: {result['layers']} layers, width {result['width']}, "
        f"{result['vocabulary']} tokens; {batch}{result['prompt_tokens']} prompt tokens ({result['visual_tokens']} "
        f"visual), {result['answer_tokens']} answer tokens in {steps} steps ({generation['schedule']}); {merging}",
        "",
        *_answer_lines(result),
    ]
    for row in planned:
        if row["merged"]:
            held = row["merging"] == "prefill"  # from the first step on
            kept = row["kept_per_step"][0 if held else 1 :] or [result["visual_tokens"]]
            span = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
            lines.append(
                f"{row['combination']}: {span} of {result['visual_tokens']} visual tokens kept "
                f"{'from' if held else 'after'} the first step{' on' if held else ''}, "
                f"{sum(kept) / len(kept) / result['visual_tokens']:.1%} on average"
            )
    for rule, count in result["rules"].items():
        lines.append(f"{rule}: counted at {count} steps, of which each commits as many; `bench` says what they are")
    lines += ["", *_stage_lines(f"prompt, {result['views']} views", result["prompt"])]
    for row in planned:
        lines += ["", *_stage_lines(row["combination"], row["stages"])]
    for row in rows:
        if "steps" in row:
            lines += ["", *_step_lines(row)]
    if "reductions" in result:
        lines += ["", *_reduction_lines(result)]
    lines += [""]
    for loop, memory in result["device_memory"].items():
        parts = ", ".join(f"{name} {_gib(memory[name])}" for name in ("weights", "cache", "buffers", "activations"))
        lines.append(f"device memory of engines, {loop} loop: about {_gib(memory['total'])} GiB ({parts})")
    lines += ["", "with prompt: and the pictures and the prompt's embeddings"]
    lines += ["FLOPs of matrix products; bytes of weights and of the prompt's keys and values, without activations"]
    if "figure" in result:
        lines.append(f"picture: {result['figure']}")
    return "\n".join(lines)
