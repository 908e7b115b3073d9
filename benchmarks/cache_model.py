"""When merging pays with a KV cache at 8B: FLOPs, bytes and memory of a step, from d3tom_export.cost.flops."""

from __future__ import annotations

import click

from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.cost.flops import Cost, Workload, cache_bytes_per_token, cached_step, layer_weights

LAVIDA_8B = geometry_config("lavida-8b").language

TEXT, ANSWER, LAYER, RATIO = 75, 64, 2, 0.9


def _change(cost: Cost, plain: Cost) -> str:
    return f"{cost.flops / plain.flops - 1:+.1%} | {cost.bytes / plain.bytes - 1:+.1%}"


@click.command()
def main() -> None:
    """Print Markdown tables: a cached step's shares, and what merging changes."""
    click.echo(f"LaViDa-LLaDA-8B in bfloat16, G = {ANSWER}, {TEXT} text tokens, l* = {LAYER}, ratio {RATIO}\n")
    click.echo(
        "| visual tokens | batch | attention of FLOPs | cache of bytes | anew: FLOPs | bytes | held: FLOPs | bytes |"
    )
    click.echo("| --- " * 8 + "|")
    for visual in (1008, 3024):
        for batch in (1, 8, 32):
            work = Workload(TEXT + visual, visual, ANSWER, batch, bytes_per_element=2)
            keep = int(visual * (1 - RATIO))
            plain = cached_step(LAVIDA_8B, work, LAYER, None)
            anew = cached_step(LAVIDA_8B, work, LAYER, keep)
            held = cached_step(LAVIDA_8B, work, LAYER, keep, merges_afresh=False)
            shares = f"{plain.attention / plain.flops:.1%} | {plain.cache_read / plain.bytes:.1%}"
            click.echo(f"| {visual} | {batch} | {shares} | {_change(anew, plain)} | {_change(held, plain)} |")
    token = cache_bytes_per_token(LAVIDA_8B, 2)
    later = (LAVIDA_8B.n_layers - LAYER - 1) / LAVIDA_8B.n_layers
    dropped = 1008 - int(1008 * (1 - RATIO))
    click.echo(
        f"\nA token's keys and values: {token / 2**20:.2f} MiB over all layers, {token * later / 2**20:.2f} MiB behind "
        f"l*. An answer at V = 1008 drops {dropped} tokens: {dropped * token * later / 2**20:.0f} of "
        f"{1083 * token / 2**20:.0f} MiB, where the full cache is let go. "
        f"Weights: {32 * layer_weights(LAVIDA_8B) * 2 / 2**30:.1f} GiB of layers."
    )


if __name__ == "__main__":
    main()
