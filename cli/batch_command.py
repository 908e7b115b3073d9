"""``d3tom-export batch``"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import answer_options, common, options
from .sections import Section, heading

if TYPE_CHECKING:
    from d3tom_export.batch.run import Outcome


@click.command(
    "batch", cls=common.Command, first="input prompt output jobs batch backend provider kv-cache ratio gen-length"
)
@click.argument("bundle_folder", metavar="BUNDLE", type=click.Path(path_type=Path))
@heading(Section.ASKING)
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="IN",
    help="Questions: a file of JSON lines as `evaluate --data` reads them, answers or none; a folder with such files, "
    "or a zip like a bundle's samples.zip. With --prompt, a folder of pictures.",
)
@click.option("--prompt", metavar="TEXT", help="Question to ask about every picture of the folder --input.")
@heading(Section.OUTPUT)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="OUT.jsonl",
    help="File of answers, a line of JSON for each row, in their order; where it is there, go on behind its last line.",
)
@click.option(
    "--retry-failed",
    is_flag=True,
    help="Ask the rows anew whose line in OUT.jsonl is an error, before those that it lacks.",
)
@heading(Section.RUNTIME)
@click.option(
    "--jobs",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Processes, which open the bundle each and share the cores; with --ray actors.  [default: 1; with --ray one "
    "for each GPU, or core where there is none]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Answer on the machines of the Ray cluster at ADDRESS: HOST:PORT, or auto for one that this machine is of; "
    "local starts one of this machine alone. BUNDLE and --input are at the same path on all its machines. Needs "
    '`pip install "d3tom-export[ray]"`.',
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=4,
    show_default=True,
    metavar="N",
    help="Answers at once, of questions whose prompts have equal layouts.",
)
@options.backend_options
@options.verify_option("auto")
@options.loop_option
@options.merge_override_options
@answer_options.generation_options
@answer_options.early_exit_option("on")
@answer_options.asking_options
@common.json_option
def command(
    bundle_folder: Path,
    input_path: Path,
    prompt: str | None,
    output: Path,
    retry_failed: bool,
    jobs: int | None,
    ray: str | None,
    batch: int,
    system: str | None,
    no_system: bool,
    stops: tuple[str, ...],
    suffix: str | None,
    early_exit: bool | None,
    ignore_orientation: bool,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Answer many questions from a file, or one question about many pictures.

    Every row of --input becomes a line of --output: its index, id, question and answer, or an error where it could not
    be asked, which does not keep the others from being answered; then the exit code is 1. The same command goes on
    where it was stopped, whatever stopped it: every row has exactly one line in the end. Another bundle, setting or
    version, and other rows before the last line, are refused.

    \b
    d3tom-export batch lavida-tiny-d3tom-l2-r0.9 --input questions.jsonl --output answers.jsonl
    d3tom-export batch lavida-tiny-d3tom-l2-r0.9 --input pictures --prompt "How many digits?" --output digits.jsonl
    d3tom-export batch lavida --input docvqa --output answers.jsonl --jobs 4 --kv-cache --commit threshold
    d3tom-export batch /data/lavida --input /data/docvqa --output answers.jsonl --ray 10.0.0.1:6379
    """
    from d3tom_export.batch.answering import Job
    from d3tom_export.batch.run import run_batch

    _check_json(json_file, output, input_path)
    answer_options.check_system("", system, no_system)
    answer_options.check_stops(stops)
    opening = options.opening_from(settings) | {"ignore_orientation": ignore_orientation}
    given = answer_options.settings_from(settings, system, no_system, stops, suffix, early_exit)
    job = Job(bundle_folder, opening, given, input_path, prompt, batch)
    progress = common.ConsoleProgress()
    outcome = run_batch(job, output, jobs, progress, common.TimeLeft(progress, "rows"), common.note, ray, retry_failed)
    common.write_json(json_file, asdict(outcome) | {"output": str(output)})
    common.say(json_file, _summary(output, outcome))
    if outcome.failed:
        raise click.ClickException(
            f"{outcome.failed:,} of {outcome.rows:,} rows could not be answered; their lines in {output} have an error "
            "that says why. Mend them in a file of their own and answer that, or ask them anew with --retry-failed."
        )


def _check_json(json_file: str | None, output: Path, input_path: Path) -> None:
    """Refuse a --json that would be written over the answers or the questions."""
    if json_file is None or json_file == "-":
        return
    path = Path(json_file).resolve()
    for option, other in (("--output", output), ("--input", input_path)):
        same = path == other.resolve() or (path.exists() and other.exists() and path.samefile(other))
        inside = option == "--input" and path.suffix.lower() != ".json" and path.parent == other.resolve()
        if same or inside:
            raise click.UsageError(f"--json {json_file} would be written over {option} {other}. Give it another file.")


def _summary(output: Path, outcome: Outcome) -> str:
    made = outcome.rows - outcome.before
    if not made:
        return f"{output} has all {outcome.rows:,} rows already."
    before = f", {outcome.before:,} were there before" if outcome.before else ""
    rate = f", {made / outcome.seconds:.3g} a second" if outcome.seconds else ""
    return f"{output} has all {outcome.rows:,} rows: {made:,} in {outcome.seconds:.1f} s{rate}{before}."
