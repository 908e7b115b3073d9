"""Option groups that several commands take, and how they become configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from d3tom_export.api.settings import CACHE, MERGE, OPENING, merge_with
from d3tom_export.backends.choice import BACKENDS, DEVICES, ENGINE_BACKENDS, PRECISIONS, SPECIALIZATIONS
from d3tom_export.config import (
    LOOPS,
    Aggregation,
    Deciders,
    LanguageConfig,
    Loop,
    MergeAt,
    MergeConfig,
    MergedPositions,
    MergeSchedule,
    Remerge,
    SelectionPolicy,
)
from d3tom_export.errors import D3tomError

from .sections import Section, apply_options, heading, under

F = TypeVar("F", bound=Callable[..., Any])


def choice(values: Any) -> click.Choice:
    return click.Choice(get_args(values))


def vision_tower_option(function: F) -> F:
    """A tower for a checkpoint that was saved without its own."""
    option = click.option(
        "--vision-tower",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Folder with the vision tower of a --model that was saved without its own: a SigLIP checkpoint as "
        "published, or one of a whole model.",
    )
    return under(Section.SOURCE, option)(function)


def check_figure(path: Path | None) -> None:
    """Refuse a file that no picture is written to."""
    from d3tom_export.cost.figure import FORMATS

    if path is not None and path.suffix.lower() not in FORMATS:
        raise click.UsageError(f"--figure writes {' and '.join(FORMATS)} files; {path} ends in neither.")


def check_vision_tower(vision_tower: Path | None, model_folder: Path | None) -> None:
    """Refuse a vision tower for no checkpoint of the user's."""
    if vision_tower is not None and model_folder is None:
        raise click.UsageError("--vision-tower completes a checkpoint: give that with --model.")


RATIO = click.FloatRange(0, 1, max_open=True)


_DECIDERS: dict[str, Any] = {
    "type": choice(Deciders),
    "help": "Which tokens decide: all that were committed at the step before, or of them those that look at the "
    "picture, which end tokens and padding do not; where nothing else was committed, the masks before the first end "
    "token decide.",
}


def merge_options(function: F) -> F:
    """What a bundle is built for. The policy options beyond the release default to the release."""
    return apply_options(
        function,
        [
            heading(Section.MERGING),
            click.option(
                "--layer",
                type=click.IntRange(min=0),
                default=3,
                show_default="3, as released",
                help="Layer l* in which visual tokens merge, counted from 0.",
            ),
            click.option(
                "--ratio",
                type=RATIO,
                default=0.8,
                show_default="0.8, as released",
                help="Share of visual tokens merged away.",
            ),
            click.option(
                "--schedule",
                type=choice(MergeSchedule),
                default="adaptive",
                show_default=True,
                help="Ratio over the steps: falling from 1 around --ratio, fixed at it, or no merging.",
            ),
            click.option(
                "--select",
                type=choice(SelectionPolicy),
                default="decider",
                show_default=True,
                help="Who picks the tokens that stay. Other policies than `decider` drop the rest, for comparison.",
            ),
            click.option("--deciders", default="committed", show_default=True, **_DECIDERS),
            click.option(
                "--aggregate",
                type=choice(Aggregation),
                default="sum",
                show_default=True,
                help="How a kept token takes in the others.",
            ),
            click.option(
                "--positions",
                type=choice(MergedPositions),
                default="compact",
                show_default=True,
                help="Rotary positions after merging: renumbered from 0, or the original ones.",
            ),
        ],
    )


_REMERGE: dict[str, Any] = {
    "type": choice(Remerge),
    "help": "How often the KV cache is merged anew: at every step; when another set of tokens is kept, which answers "
    "the same for less work; or once per block.",
}
_CACHED_SCHEDULE: dict[str, Any] = {
    "help": "Whether the adaptive schedule applies with a KV cache, where the release keeps the ratio fixed.",
}


_MERGE_AT: dict[str, Any] = {
    "type": choice(MergeAt),
    "help": "When the loop with a KV cache merges: at its steps, or once, while the prompt is prefilled, so that the "
    "layers behind --layer see a short prompt. At the prefill the answer's mask tokens decide, or an even stride with "
    "--select uniform; the others are merged, not dropped, and the ratio is fixed.",
}


def cache_merge_options(function: F) -> F:
    """What the loop with a KV cache may do otherwise than the release."""
    return apply_options(
        function,
        [
            heading(Section.LOOPS),
            click.option("--merge-at", default="step", show_default=True, **_MERGE_AT),
            click.option("--remerge", default="every-step", show_default=True, **_REMERGE),
            click.option("--cached-adaptive/--cached-fixed", default=False, show_default=True, **_CACHED_SCHEDULE),
            click.option(
                "--restore-norm/--no-restore-norm",
                default=True,
                show_default=True,
                help="Whether merged keys and values are scaled back to the mean norm of those kept.",
            ),
            click.option(
                "--text-targets/--no-text-targets",
                default=True,
                show_default=True,
                help="Whether a dropped visual token may merge into a text token of the cache.",
            ),
        ],
    )


def merge_override_options(function: F) -> F:
    """What one run may change about a bundle's merging without a rebuild."""
    return apply_options(
        function,
        [
            heading(Section.MERGING),
            click.option("--ratio", type=RATIO, help="Merge ratio of this run.  [default: the bundle's]"),
            click.option(
                "--schedule", type=choice(MergeSchedule), help="Ratio schedule of this run.  [default: the bundle's]"
            ),
            click.option("--deciders", **_override(_DECIDERS)),
            click.option(
                "--keep-multiple",
                type=click.IntRange(min=1),
                metavar="N",
                help="Round the number of kept tokens up to a multiple of N, so that steps share CUDA graphs; answers "
                "change with it.  [default: 1, no rounding]",
            ),
            heading(Section.LOOPS),
            click.option("--remerge", **_override(_REMERGE)),
            click.option("--cached-adaptive/--cached-fixed", default=None, **_override(_CACHED_SCHEDULE)),
            click.option("--merge-at", **_override(_MERGE_AT)),
        ],
    )


def _override(attributes: dict[str, Any]) -> dict[str, Any]:
    return attributes | {"help": f"{attributes['help']}  [default: the bundle's]"}


def verify_option(default: str) -> Callable[[F], F]:
    """Which of a bundle's files are hashed."""
    option = click.option(
        "--verify",
        type=click.Choice(["auto", "full"]),
        default=default,
        show_default=True,
        help="Hash the bundle's files before they are read: auto, those that changed since this machine hashed them; "
        "full, every one.",
    )
    return under(Section.CHECKS, option)


loop_option = under(
    Section.LOOPS,
    click.option(
        "--kv-cache/--no-kv-cache",
        default=None,
        help="Which loop to run of a bundle built with --kv-cache both.  [default: the one it has; of two, without "
        "cache]",
    ),
)


share_prefix_option = under(
    Section.LOOPS,
    click.option(
        "--share-prefix",
        is_flag=True,
        help="With a KV cache, of a bundle that was built for it: prefill what stands before a question, up to the end "
        "of the last picture, by itself and once for all questions about it. An approximation: those rows do not see "
        "the question, so answers may differ.",
    ),
)


def check_sharing(backend: str, kv_cache: bool | None) -> None:
    """Refuse ``--share-prefix`` where no loop or backend could do it, whatever the bundle."""
    if kv_cache is False:
        raise click.UsageError("--share-prefix concerns the loop with a KV cache; leave --no-kv-cache out.")
    if backend in ENGINE_BACKENDS:
        raise click.UsageError(
            f"--share-prefix is for the bundle's graphs: engines of {backend} do not share. Take --backend onnxruntime."
        )


def backend_options(function: F) -> F:
    """Which runtime answers the loop, and where it runs."""
    return apply_options(
        function,
        [
            heading(Section.RUNTIME),
            click.option(
                "--backend",
                type=click.Choice(BACKENDS),
                default="auto",
                show_default=True,
                help="Runtime; auto takes onnxruntime, pytorch is the oracle itself, tensorrt and tensorrt-rtx run "
                "engines that `build --engine` made.",
            ),
            click.option(
                "--provider",
                "--device",
                "device",
                type=click.Choice(DEVICES),
                default="auto",
                show_default=True,
                help="Where the onnxruntime backend runs: auto takes CUDA where it works, else the CPU; tensorrt and "
                "nv-tensorrt-rtx are ONNX Runtime's own providers, which build engines as they load.",
            ),
            click.option(
                "--provider-cache",
                type=click.Path(path_type=Path, file_okay=False),
                metavar="DIR",
                help="Where --provider tensorrt and nv-tensorrt-rtx keep what they build, a folder of yours alone: it "
                "is run as it is found.  [default: nowhere, they build anew each time]",
            ),
            click.option(
                "--precision",
                type=click.Choice(PRECISIONS),
                help="Engines to run, of a bundle that has them in several precisions, or onnxruntime's graphs: fp32, "
                "those that `build --precision` added in fp16 or bf16, or int8 on the CPU.  [default: the only engines "
                "there are; fp32]",
            ),
            click.option(
                "--cuda-graphs/--no-cuda-graphs",
                default=None,
                help="Whether the TensorRT backends replay recurring steps as CUDA graphs.  [default: they do]",
            ),
            click.option(
                "--specialization",
                type=click.Choice(SPECIALIZATIONS),
                help="How TensorRT-RTX treats a shape that is new to it: compile kernels for it while general ones "
                "answer, before it answers, or never.  [default: lazy]",
            ),
        ],
    )


def loop_options(function: F) -> F:
    """Which loops to build stages for."""
    return apply_options(
        function,
        [
            heading(Section.LOOPS),
            click.option(
                "--kv-cache",
                type=click.Choice(["only", "both"]),
                is_flag=False,
                flag_value="only",
                default=None,
                metavar="[both]",
                help="Build the loop that keeps the prompt's keys and values (LaViDa's prefix mode), or with `both` "
                "that one and the one without; they share their weights.",
            ),
            click.option("--no-kv-cache", is_flag=True, help="Build the loop without KV cache.  [default]"),
            click.option(
                "--share-prefix",
                is_flag=True,
                help="With a KV cache: build one stage more, by which several questions about one picture can share "
                "its prefill (run --share-prefix).",
            ),
        ],
    )


def loops_from(kv_cache: str | None, no_kv_cache: bool) -> tuple[Loop, ...]:
    """The loops that ``build``'s options ask for."""
    if kv_cache is not None and no_kv_cache:
        raise click.UsageError("--kv-cache and --no-kv-cache exclude one another; `--kv-cache both` builds both loops.")
    return LOOPS if kv_cache == "both" else ("cached",) if kv_cache else ("uncached",)


def engine_settings(
    precision: str | None, cuda_graphs: bool | None, provider_cache: Path | None, specialization: str | None
) -> dict[str, Any]:
    """:func:`backend_options` as :func:`~d3tom_export.backends.select.open_backend` takes them."""
    return {
        "precision": precision,
        "cuda_graphs": cuda_graphs is not False,
        "provider_cache": provider_cache,
        "specialization": specialization or "lazy",
    }


def opening_from(settings: dict[str, Any]) -> dict[str, Any]:
    """Take out of a command's ``settings`` what says how to open a bundle, as :func:`d3tom_export.api.opening.open`
    has it."""
    return {name: settings.pop(name) for name in OPENING}


def check_length(config: LanguageConfig, text_tokens: int, visual_tokens: int, answer_tokens: int) -> None:
    """Refuse a prompt and an answer that the model has no positions for."""
    limit = config.max_sequence_length
    if text_tokens + visual_tokens + answer_tokens > limit:
        raise D3tomError(
            f"{text_tokens} text, {visual_tokens} visual and {answer_tokens} answer tokens exceed this model's limit "
            f"of {limit}. Lower --visual-tokens, --text-tokens or --gen-length."
        )


def merge_from(base: MergeConfig, options: dict[str, Any], *, runs: bool = True) -> MergeConfig:
    """``base`` with what this run changes by :func:`merge_override_options` (``options`` is emptied of them).

    Where it ``runs`` a bundle, whose merging is ``base``: refuses a merge at the prefill that it was not built for.
    """
    if runs and options["merge_at"] == "prefill":
        base.check_built_for_prefill()
    given = {name: options.pop(name) for name in (*MERGE, *CACHE)}
    return merge_with(base, {name: value for name, value in given.items() if value is not None})
