"""Options of what is asked, and of how an answer is denoised; and how they become a question and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d3tom_export.api.settings import GENERATION, MOST_STOPS, generation_changes
from d3tom_export.config import CommitRule, GenerationConfig, Remasking, StepSchedule

from .options import F, choice
from .sections import Section, apply_options, heading, under

if TYPE_CHECKING:
    from d3tom_export.api.settings import Settings
    from d3tom_export.pipeline import Reader
    from d3tom_export.prompt.conversation import Conversation

Many = Callable[[click.ParamType], click.ParamType]
"""What a command that takes several values of an option makes of its type."""


def one(value: click.ParamType) -> click.ParamType:
    """A :data:`Many` of commands that take one."""
    return value


def plan_options(function: F) -> F:
    """How many tokens an answer has and how many steps it takes; what is not given comes from the bundle."""
    return apply_options(
        function,
        [
            heading(Section.LENGTH),
            click.option("--gen-length", type=click.IntRange(min=1), help="Answer tokens G.  [default: the model's]"),
            click.option("--block-length", type=click.IntRange(min=1), help="Tokens of a block.  [default: all]"),
            click.option(
                "--step-ratio",
                type=click.FloatRange(0, 1, min_open=True),
                help="Steps per block as a share of its tokens, in place of --steps. With both, the times of "
                "--step-schedule vanilla are laid out for --steps, and the share's last step commits what is left.",
            ),
            click.option(
                "--step-schedule",
                type=choice(StepSchedule),
                help="Tokens committed at each step: as many at each (none), LaViDa's schedules, or Dream's own "
                "(vanilla).",
            ),
            click.option(
                "--shift",
                type=click.FloatRange(0.001, 1000),
                help="Parameter of --step-schedule shift: 3 as released, 1/3 is the LaViDa paper's best.",
            ),
        ],
    )


def commit_options(function: F, many: Many = one) -> F:
    """What says how many tokens a step commits; what is not given comes from the bundle.

    Of rules and their parameters a command may take ``many``.
    """
    return apply_options(
        function,
        [
            heading(Section.COMMITTING),
            click.option(
                "--commit",
                type=many(choice(CommitRule)),
                help="What says how many tokens a step commits: the plan (--steps, --step-ratio, --step-schedule), or "
                "how sure the model is: all tokens above a threshold (Fast-dLLM), as many as --factor bears "
                "(Fast-dLLM), or as the Frechet bounds do (Fast-dLLM++). Then the number of steps is not known "
                "beforehand, and the ratio schedule goes by the share of the block that is committed.",
            ),
            click.option(
                "--threshold",
                type=many(click.FloatRange(0, 1, min_open=True)),
                help="Of --commit threshold: the probability from which tokens are committed.  [default: 0.9]",
            ),
            click.option(
                "--factor",
                type=many(click.FloatRange(min=0, min_open=True)),
                help="Of --commit factor: the n-th surest token needs a probability of 1 - FACTOR/(n+1).  [default: 1]",
            ),
            click.option(
                "--margin",
                type=many(click.FloatRange(0, 1, max_open=True)),
                help="Of --commit frechet: the higher, the fewer tokens a step commits.  [default: 0]",
            ),
            click.option(
                "--max-steps",
                type=click.IntRange(min=1),
                help="Steps of a block under such a rule; the last commits all that is left.  [default: one per token]",
            ),
            click.option(
                "--fill-after-end/--no-fill-after-end",
                default=None,
                help="Once an end token is committed, commit all that is behind it as end tokens too; this may change "
                "answers.  [default: as the bundle was built]",
            ),
        ],
    )


def early_exit_option(default: str) -> Callable[[F], F]:
    """Whether an answer ends where its text is settled; ``default`` says what happens unless it is given."""
    option = click.option(
        "--early-exit/--no-early-exit",
        default=None,
        help="End the answer as soon as its text cannot change any more: an end token or a stop is committed, and no "
        f"mask is left before it. The text is the same.  [default: {default}]",
    )
    return under(Section.LENGTH, option)


def generation_options(function: F, many: Many = one) -> F:
    """How an answer is denoised; what is not given comes from the bundle. ``many`` as for :func:`commit_options`."""
    return apply_options(
        function,
        [
            plan_options,
            partial(commit_options, many=many),
            heading(Section.LENGTH),
            click.option(
                "--steps",
                type=click.IntRange(min=1),
                help="Steps of the whole answer, at most one per token.  [default: the model's]",
            ),
            heading(Section.SAMPLING),
            click.option("--remasking", type=choice(Remasking), help="What makes a token confident."),
            click.option(
                "--temperature", type=click.FloatRange(min=0), help="0 takes the likeliest token; above, it samples."
            ),
            click.option(
                "--top-k",
                type=click.IntRange(min=0),
                help="Dream's sampler: how many of the likeliest tokens are drawn from, and ranked by; 0 for all.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                help="Dream's sampler: the probability that tokens drawn from sum to, but for the last one; 1 for all.",
            ),
            click.option("--seed", type=click.IntRange(min=0), help="Seed of all noise.  [default: 0]"),
        ],
    )


def wording_options(function: F) -> F:
    """What a prompt says beside the question, and what its answer ends with."""
    return apply_options(
        function,
        [
            heading(Section.ASKING),
            click.option(
                "--system", metavar="TEXT", help="What the system turn says.  [default: as the bundle was built]"
            ),
            click.option("--no-system", is_flag=True, help="Leave the system turn out."),
            click.option(
                "--stop",
                "stops",
                multiple=True,
                metavar="TEXT",
                help="Text that ends the answer while it is made; give it again for several.  [default: the model's "
                "own, if it has any]",
            ),
        ],
    )


def asking_options(function: F) -> F:
    """:func:`wording_options`, what stands behind an answer, and how pictures are shown."""
    return apply_options(
        function,
        [
            wording_options,
            heading(Section.ASKING),
            click.option(
                "--suffix",
                metavar="TEXT",
                help="Text that stands behind the answer from the first step on: it is written to lead up to it.",
            ),
            click.option(
                "--ignore-orientation",
                is_flag=True,
                help="Show pictures as stored, whatever their EXIF orientation, as the release does.  [default: turn "
                "them upright]",
            ),
        ],
    )


def prompt_options(function: F) -> F:
    """What is asked, and about which pictures."""
    return apply_options(
        function,
        [
            heading(Section.ASKING),
            click.option(
                "--image",
                "images",
                type=click.Path(path_type=Path),
                multiple=True,
                metavar="FILE",
                help="Picture to ask about (PNG, JPEG, WebP, BMP, GIF, TIFF or PPM); give it again for several, in the "
                "order of <image> in the prompt.",
            ),
            click.option(
                "--prompt",
                "prompts",
                multiple=True,
                metavar="TEXT",
                help="Question. Pictures come first unless it has <image>. Give it again for further questions, each "
                "by itself, about the same pictures.",
            ),
            click.option(
                "--prompt-file",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help='A conversation in place of --prompt: a JSON list of {"role": "system", "user" or "assistant", '
                '"content": ...} that ends with a question.',
            ),
            asking_options,
        ],
    )


def questions_from(prompts: Sequence[str], prompt_file: Path | None) -> list[str | Conversation]:
    """What is asked, one after the other: the texts given, or the one conversation in the file given."""
    if bool(prompts) == (prompt_file is not None):
        raise click.UsageError("Give either --prompt TEXT or --prompt-file FILE.")
    if prompt_file is None:
        return list(prompts)
    from d3tom_export.prompt.conversation import read_conversation

    return [read_conversation(prompt_file)]


def check_system(question: str | Conversation, system: str | None, no_system: bool) -> None:
    """Refuse a system text and none, or either beside a conversation's own."""
    if system is not None and no_system:
        raise click.UsageError("--system and --no-system exclude one another.")
    if (system is not None or no_system) and not isinstance(question, str) and question[0].role == "system":
        given = "--no-system" if no_system else "--system"
        raise click.UsageError(f"--prompt-file has a system turn of its own; leave {given} out, or that turn.")


def check_stops(stops: Sequence[str]) -> None:
    """Refuse more stop texts than are looked for."""
    if len(stops) > MOST_STOPS:
        raise click.UsageError(f"--stop was given {len(stops)} times, at most {MOST_STOPS} texts are looked for.")


def reader_from(reader: Reader, system: str | None, no_system: bool) -> Reader:
    """``reader`` with the system text of this run."""
    check_system("", system, no_system)
    if system is None and not no_system:
        return reader
    return replace(reader, prompt=replace(reader.prompt, system=system))


def generation_for(reader: Reader, base: GenerationConfig, stops: Sequence[str]) -> GenerationConfig:
    """``base`` with the reader's end tokens, and the stops that were given."""
    check_stops(stops)
    base = replace(base, end_ids=reader.end_ids)
    return replace(base, stop_ids=reader.stop_ids(stops)) if stops else base


def settings_from(
    options: dict[str, Any],
    system: str | None,
    no_system: bool,
    stops: Sequence[str],
    suffix: str | None,
    early_exit: bool | None,
) -> Settings:
    """What was given of the options of merging, of the loop and of wording, as the library takes it."""
    given = options | {"system": system, "stop": tuple(stops) or None, "suffix": suffix, "early_exit": early_exit}
    found: Settings = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    return found | {"system": None} if no_system else found


def given_generation(options: dict[str, Any]) -> dict[str, Any]:
    """The generation options that were given, by :class:`GenerationConfig`'s fields (``options`` is emptied of them).

    A command that takes only :func:`plan_options` leaves the others as they are.
    """
    given = {name: options.pop(name, None) for name in GENERATION}
    return generation_changes({name: value for name, value in given.items() if value is not None})


def rule_words(generation: GenerationConfig) -> str:
    """The commit rule of ``generation`` in words."""
    name = {"threshold": "threshold", "factor": "factor", "frechet": "margin"}[generation.commit]
    most = "" if generation.max_steps is None else f", at most {generation.max_steps} steps a block"
    return f"{generation.commit}, {name} {getattr(generation, name):g}{most}"


def generations_from(base: GenerationConfig, options: dict[str, Any]) -> list[GenerationConfig]:
    """``base`` under every commit rule that was given, each with every value of its parameter that was.

    ``options`` are those of :func:`generation_options` with :data:`Many` rules, and are emptied of them.
    """
    given = given_generation(options)
    rules = given.pop("commit", None)
    of_rules = {name: given.pop(name) for name in ("threshold", "factor", "margin") if name in given}
    owner = {"threshold": "threshold", "factor": "factor", "margin": "frechet"}
    ruled = (base.commit,) if rules is None else rules
    for name in of_rules:
        if owner[name] not in ruled:
            raise click.UsageError(f"--{name} is of --commit {owner[name]}, which is not among {', '.join(ruled)}.")
    found = []
    for rule in ruled:
        changes = given | ({} if rules is None else {"commit": rule})
        if len(ruled) > 1:  # what concerns the others
            changes.pop("max_steps" if rule == "plan" else "remasking", None)
        own = next((name for name in of_rules if owner[name] == rule), None)
        found += [base.changed(**changes | ({own: value} if own else {})) for value in (of_rules[own] if own else (0,))]
    return list(dict.fromkeys(found))


RULE_OPTIONS = ("commit", "threshold", "factor", "margin", "max_steps")
"""Settings of :func:`commit_options` that no plan has."""


def plan_and_rules(
    base: GenerationConfig, options: dict[str, Any]
) -> tuple[GenerationConfig, dict[CommitRule, GenerationConfig]]:
    """``base`` under its plan, and under the commit rule that was given: :func:`generation_from` for both.

    Where none was, the rule of ``base`` or else "threshold"; none beside ``--commit plan``.
    """
    given = given_generation(options)
    of_rule = {name: given.pop(name) for name in RULE_OPTIONS if name in given}
    rule = of_rule.setdefault("commit", "threshold" if base.planned else base.commit)
    plan = base.changed(**given) if base.planned else base.changed(commit="plan", **given)
    if rule == "plan":
        plan.changed(**of_rule)  # refuses what else was given
        return plan, {}
    given.pop("remasking", None)  # rules know one
    return plan, {rule: base.changed(**given, **of_rule)}


def generation_from(base: GenerationConfig, options: dict[str, Any]) -> GenerationConfig:
    """``base`` with the generation options that were given (:func:`given_generation`)."""
    return base.changed(**given_generation(options))
