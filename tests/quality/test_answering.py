"""Questions answered in many settings: resumed, in any order, with noise of their own; and the rows that come of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d3tom_export.backends.pytorch import PyTorchBackend
from d3tom_export.checkpoint.folder import default_generation, open_checkpoint
from d3tom_export.config import LOOPS, MergeConfig
from d3tom_export.cost.bench import Question, answer_in_turns, on_backend, summarize
from d3tom_export.cost.combinations import Combination
from d3tom_export.errors import D3tomError
from d3tom_export.model.lavida import Lavida
from d3tom_export.pipeline import Reader
from d3tom_export.quality.answering import Runtime, answer_all, sample_seed
from d3tom_export.quality.dataset import DataSet, open_data
from d3tom_export.quality.report import rows_of
from d3tom_export.quality.results import Answered, Binding, Results
from d3tom_export.quality.scoring import Scoring
from d3tom_export.quality.settings import Setting, eager_refusal, grid

BINDING = Binding("model", "data", "wording", "pytorch", "fp32", "1")
MERGE = MergeConfig(layer=1, ratio=0.7)
LETTERS = Scoring(normalize=False)


@pytest.fixture(scope="module")
def data(questions: Path) -> DataSet:
    return open_data(questions)


@pytest.fixture(scope="module")
def reader(checkpoint_folder: Path) -> Reader:
    return Reader.from_folder(checkpoint_folder, open_checkpoint(checkpoint_folder).config)


@pytest.fixture(scope="module")
def runtime(eager_model: Lavida) -> Runtime:
    return lambda setting: PyTorchBackend(eager_model, setting.effective, kv_cache=setting.loop == "cached")


@pytest.fixture(scope="module")
def settings(reader: Reader, checkpoint_folder: Path) -> list[Setting]:
    generation = reader.with_ends(default_generation(reader.config, checkpoint_folder))
    merges = [replace(MERGE, select=select) for select in ("decider", "random")]
    return grid(LOOPS, merges, [generation], eager_refusal)[0]


def _answers(results: Results) -> dict[tuple[str, int], Answered]:
    """Without what no two runs share."""
    return {key: replace(answered, seconds=0.0) for key, answered in results.answers.items()}


@pytest.fixture(scope="module")
def results(runtime: Runtime, reader: Reader, data: DataSet, settings: list[Setting]) -> Results:
    results = Results(None, BINDING)
    told: list[tuple[str, int, int]] = []
    answer_all(runtime, reader, data, data.items, settings, results, lambda *call: told.append(call))
    total = len(settings) * len(data.items)
    assert told[0] == ("answering", 0, total)
    assert told[-1] == ("answering", total, total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    return results


def test_neither_order_nor_resuming_changes_an_answer(
    runtime: Runtime, reader: Reader, data: DataSet, settings: list[Setting], results: Results, tmp_path: Path
) -> None:
    path = tmp_path / "answers.jsonl"
    with Results(path, BINDING) as begun:  # some of it, backwards
        answer_all(runtime, reader, data, data.items[:3:-1], settings[::-1][:2], begun)
        answer_all(runtime, reader, data, data.items[2:3], settings, begun)
    lines = len(path.read_bytes().splitlines())
    with Results(path, BINDING) as resumed:
        answer_all(runtime, reader, data, data.items, settings, resumed)
        assert _answers(resumed) == _answers(results)
    assert len(path.read_bytes().splitlines()) > lines

    def refuse(setting: Setting) -> PyTorchBackend:
        raise AssertionError("everything was answered")

    with Results(path, BINDING) as done:
        answer_all(refuse, reader, data, data.items, settings, done)
        assert rows_without_time(done, settings, data) == rows_without_time(results, settings, data)


def rows_without_time(results: Results, settings: list[Setting], data: DataSet) -> list[dict]:
    return [{**row, "answer_seconds": None} for row in rows_of(settings, data.items, results, LETTERS)]


def test_noise_is_a_samples_own(runtime: Runtime, results: Results, settings: list[Setting]) -> None:
    random = next(setting for setting in settings if setting.merge and setting.merge.select == "random")
    assert len({sample_seed(0, sample) for sample in range(1000)}) == 1000
    assert sample_seed(0, 1) != sample_seed(1, 0)
    decided = random.decided
    assert decided in settings
    assert results.answers[random.id, 1] != results.answers[decided.id, 1]


def test_rows(results: Results, settings: list[Setting], data: DataSet) -> None:
    rows = rows_of(settings, data.items, results, LETTERS)
    assert [row["setting"] for row in rows] == [setting.label for setting in settings]
    unmerged, merged, random, cached = rows[:4]
    assert unmerged["exact_match"] == pytest.approx(5 / 6, abs=1e-3)
    assert unmerged["interval"][0] < 5 / 6 < unmerged["interval"][1]
    assert unmerged["retention"] is unmerged["against"] is unmerged["seen"] is None
    assert unmerged["mean_kept"] == 1.0
    for row in (merged, random):
        assert row["against"] == unmerged["setting"]
        assert row["retention"] == pytest.approx(row["exact_match"] / unmerged["exact_match"], abs=1e-3)
        assert row["difference"] == pytest.approx(row["exact_match"] - unmerged["exact_match"], abs=1e-3)
        assert row["seen"] == "none"  # of six questions nothing can be told
        assert 0 < row["mean_kept"] < 1
        assert row["flops"] < unmerged["flops"]
        assert row["kinds"]["odd"]["questions"] == row["kinds"]["even"]["questions"] == 3
        assert row["kinds"]["odd"]["seen"] == "none"
    assert random["against_decider"]["against"] == merged["setting"]
    assert random["against_decider"]["equal_kept"] is True
    assert random["mean_kept"] == merged["mean_kept"]
    assert random["flops"] < merged["flops"]  # it searches for no target
    assert "against_decider" not in merged
    assert cached["against"] == unmerged["setting"]
    shares = rows_of(settings, data.items, results, LETTERS, "anls")
    assert shares[0]["anls"] >= shares[0]["exact_match"]
    assert shares[1]["retention"] == pytest.approx(shares[1]["anls"] / shares[0]["anls"], abs=1e-3)


def test_the_figures_are_those_of_bench(
    runtime: Runtime, reader: Reader, data: DataSet, settings: list[Setting], results: Results
) -> None:
    """Steps, shares kept and FLOPs of the same questions, counted by the other command."""
    rows = {row["id"]: row for row in rows_of(settings, data.items, results, LETTERS)}
    for loop, chosen in (("uncached", settings[1]), ("cached", settings[-1])):
        plain = chosen.unmerged
        mask = reader.config.language.mask_token_id
        questions = []
        for item in data.items:
            pictures = data.decode(item, data.contents(item))
            questions.append(Question(reader.read(runtime(plain), item.question, pictures, plain.generation)))
        answerers = {
            Combination(loop, "unmerged"): on_backend(runtime(plain), mask),  # type: ignore[arg-type]
            Combination(loop, "step"): on_backend(runtime(chosen), mask),  # type: ignore[arg-type]
        }
        assert chosen.merge is not None
        answers = answer_in_turns(answerers, questions, plain.generation, {}, chosen.merge, 1)
        found = summarize(answers, {}, reader.config.language, chosen.merge.layer)
        for setting, row in zip((plain, chosen), found, strict=True):
            for name in ("steps", "mean_kept", "flops"):
                assert rows[setting.id][name] == row[name], (setting.label, name)


def test_a_question_that_does_not_fit_is_named(
    runtime: Runtime, reader: Reader, data: DataSet, settings: list[Setting]
) -> None:
    long = replace(data, items=[data.items[0], replace(data.items[1], question="x" * 5000)])
    results = Results(None, BINDING)
    with pytest.raises(D3tomError, match=r"Question 2 of .* cannot be asked\. The prompt has"):
        answer_all(runtime, reader, long, long.items, settings[:1], results)
    assert len(results.answers) == 1


def test_seeds_are_whole_numbers() -> None:
    assert 0 <= sample_seed(7, 3) < 2**32
    assert isinstance(sample_seed(7, 3), int)
    assert np.random.default_rng([sample_seed(7, 3), 0]).random() < 1
