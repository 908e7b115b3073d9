"""A batch on a real Ray cluster of this machine, of two nodes of a core each, whatever becomes of those.

Where Ray is not installed the tests are skipped; with D3TOM_NEEDS_RAY=1, as in CI, they fail.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from d3tom_export.batch.answering import Job
from d3tom_export.batch.chunks import Chunks
from d3tom_export.batch.parcels import Parcel
from d3tom_export.batch.ray_actors import RayActors, _Actor
from d3tom_export.batch.run import run_batch
from d3tom_export.errors import D3tomError
from tests.batch.conftest import MakeJob
from tests.conftest import Invoke, picture

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # Ray waits half a minute for its processes, and no longer
ROWS = 48
BAD = 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster; its ``address`` is what --ray takes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        from ray.cluster_utils import Cluster
    except ImportError as error:
        reason = f"Ray is not installed here ({error}); `make slow` installs it"
        if os.environ.get("D3TOM_NEEDS_RAY") == "1":
            pytest.fail(f"D3TOM_NEEDS_RAY=1, and {reason}")
        pytest.skip(reason)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """More rows than actors take at once, one of which cannot be answered."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(4):
        picture(40 + 8 * number, 40, number).save(folder / f"{number}.png")
    lines = [{"image": f"{at % 4}.png", "question": f"What is {at}?", "id": f"q{at}"} for at in range(ROWS)]
    lines[BAD] = {"image": "absent.png", "question": "What?", "id": "absent"}
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def job(make_job: MakeJob) -> Job:
    """One that samples, so that a row that took another's noise would show."""
    return make_job(settings={"gen_length": 4, "temperature": 0.7, "seed": 3}, batch=1)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) | {"seconds": None} for line in path.read_bytes().splitlines()]


@pytest.fixture
def expected(job: Job, tmp_path: Path) -> list[dict[str, Any]]:
    """What the batch says in this process."""
    run_batch(job, tmp_path / "here.jsonl")
    return _rows(tmp_path / "here.jsonl")


def _once_sent(monkeypatch: pytest.MonkeyPatch, index: int, times: int, then: Callable[[_Actor], None]) -> list[int]:
    """Do something once a row was sent to an actor, so many times; how many rows went with it, of parcels of four."""
    monkeypatch.setattr(Chunks, "_size", lambda _: 4)  # whatever this machine answers in a moment
    done: list[int] = []
    send = RayActors._send

    def sent(actors: RayActors, actor: _Actor, parcel: Parcel) -> None:
        send(actors, actor, parcel)
        if len(done) < times and any(row.index == index for row in parcel.rows):
            done.append(len(parcel.rows))
            then(actor)

    monkeypatch.setattr(RayActors, "_send", sent)
    return done


def _killer(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Actor], None]:
    """What sends SIGKILL to an actor's process."""
    import ray

    processes: dict[Any, int] = {}
    opened = RayActors._opened

    def ask(actors: RayActors, actor: _Actor, value: Any) -> None:
        processes[actor.handle] = ray.get(actor.handle.__ray_call__.remote(lambda _: os.getpid()))
        opened(actors, actor, value)

    monkeypatch.setattr(RayActors, "_opened", ask)
    return lambda actor: os.kill(processes[actor.handle], signal.SIGKILL)


def test_a_killed_actor_loses_nothing(
    cluster: Any, job: Job, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = _once_sent(monkeypatch, 20, 1, _killer(monkeypatch))
    outcome = run_batch(job, tmp_path / "o.jsonl", 2, ray=cluster.address)
    assert killed == [4]
    assert (outcome.rows, outcome.before, outcome.failed) == (ROWS, 0, 1)
    assert _rows(tmp_path / "o.jsonl") == expected
    again = run_batch(job, tmp_path / "o.jsonl")  # the same run, wherever it is
    assert (again.rows, again.before) == (ROWS, ROWS)


def test_a_row_that_kills_every_actor_is_passed_over(
    cluster: Any, job: Job, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = _once_sent(monkeypatch, 3, 9, _killer(monkeypatch))
    outcome = run_batch(job, tmp_path / "o.jsonl", 2, ray=cluster.address)
    assert killed == [4, 1]  # with its parcel, then by itself
    assert outcome.failed == 2
    found = _rows(tmp_path / "o.jsonl")
    assert "The process that answered this row died (its worker process has died" in found[3]["error"]
    assert "so did another one before" in found[3]["error"]
    assert [*found[:3], *found[4:]] == [*expected[:3], *expected[4:]]


def test_a_lost_machine_loses_nothing(
    cluster: Any, job: Job, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The actor that takes its place has no room, and the others go on."""
    third = cluster.add_node(num_cpus=1)
    lost = _once_sent(monkeypatch, 20, 1, lambda _: cluster.remove_node(third, allow_graceful=False))
    outcome = run_batch(job, tmp_path / "o.jsonl", 3, ray=cluster.address)
    assert lost == [4]
    assert (outcome.rows, outcome.failed) == (ROWS, 1)
    assert _rows(tmp_path / "o.jsonl") == expected


def test_a_killed_or_interrupted_command_goes_on(
    cluster: Any, job: Job, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "o.jsonl"
    command = [sys.executable, "-m", "d3tom_export", "batch", str(job.bundle), "--input", "data", "--output"]
    command += [str(output), "--device", "cpu", "--no-kv-cache", "--gen-length", "4", "--temperature", "0.7"]
    command += ["--seed", "3", "--batch", "1", "--ray", cluster.address, "--jobs", "2"]
    written = 0
    for told, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 300
        while not output.exists() or output.stat().st_size <= written:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(told)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == code, said
        assert "Traceback" not in said
        assert output.read_bytes().count(b"\n") < ROWS
        written = output.stat().st_size
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert f"of {ROWS} rows already" in done.stderr
    assert f"1 of {ROWS} rows could not be answered" in done.stderr
    assert "Traceback" not in done.stderr
    found = _rows(output)
    # Relative to where the command was run, as the local batch has it.
    assert found[BAD].pop("error").startswith("data/absent.png does not exist")
    del expected[BAD]["error"]
    assert found == expected


def test_machines_that_cannot_open_the_bundle_end_the_batch(cluster: Any, make_job: MakeJob, tmp_path: Path) -> None:
    run = make_job().run(make_job().model(print))
    with (
        pytest.raises(D3tomError, match=r"machine .* cannot answer: .*is not a bundle.*at the same path on every"),
        RayActors(make_job(bundle=tmp_path), run, cluster.address, 2, print),
    ):
        pass


def test_a_cluster_of_this_machine(job: Job, expected: list[dict[str, Any]], tmp_path: Path, cluster: Any) -> None:
    """One for each core, and none is left behind."""
    run_batch(job, tmp_path / "o.jsonl", ray="local")
    assert _rows(tmp_path / "o.jsonl") == expected


def test_no_cluster(cluster: Any, job: Job, tmp_path: Path, invoke: Invoke) -> None:
    given = ["--input", job.data, "--output", tmp_path / "o.jsonl", "--ray", "127.0.0.1:1"]
    result = invoke("batch", job.bundle, *given)
    assert result.exit_code == 1
    assert "There is no Ray cluster to be joined at --ray 127.0.0.1:1" in " ".join(result.stderr.split())
