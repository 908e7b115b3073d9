"""The commands as users call them: output, exit codes, and what is left on the disk when something is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from d3tom_export import doctor
from d3tom_export.bundle.folder import Bundle, write_manifest
from d3tom_export.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION
from d3tom_export.checkpoint import models as checkpoint
from d3tom_export.checkpoint.geometry import geometry_config
from d3tom_export.cli.main import COMMANDS, main
from d3tom_export.cpu.place import tuned_graph
from d3tom_export.export import preflight
from d3tom_export.export.preflight import GIB
from d3tom_export.export.weights import demand_of
from tests.conftest import OWN_GOLDEN, Invoke, picture, raw_config, write_checkpoint


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    picture(70, 50).save(path)
    return path


@pytest.fixture(scope="module")
def built(checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A bundle built through the command line, and what the command printed."""
    output = tmp_path_factory.mktemp("built") / "bundle"
    arguments = ["build", "--model", checkpoint_folder, "--layer", 1, "--ratio", 0.9, "--output", output]
    return output, CliRunner().invoke(main, [*map(str, arguments), "--json", str(output.parent / "build.json")])


def _paragraph(result: Result) -> str:
    """The error as one line, after checking that it is one paragraph and no trace."""
    assert "Traceback" not in result.output
    message = result.stderr[result.stderr.index("Error: ") :].strip()
    assert "\n" not in message
    return message


def test_build_writes_a_validated_bundle(built: tuple[Path, Result]) -> None:
    output, result = built
    assert result.exit_code == 0, result.output
    assert f"Built {output}" in result.stdout
    assert "Self-check passed" in result.stdout
    assert "exporting merge" in result.stderr
    manifest = json.loads((output / MANIFEST_FILE).read_text())
    assert manifest["validation"]["passed"]
    assert manifest["merge"]["layer"] == 1
    record = json.loads((output.parent / "build.json").read_text())
    assert record["passed"]
    assert sorted(path.name for path in output.parent.iterdir()) == ["build.json", "bundle"]


@pytest.mark.slow
def test_build_names_its_output_after_what_it_built(
    checkpoint_folder: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build = ("build", "--model", checkpoint_folder, "--layer", 0, "--ratio", 0.25, "--max-memory", 2)
    refused = invoke(*build, "--self-check", 1)
    assert refused.exit_code == 1
    assert "Leave the self-check to a larger machine, with --self-check 0." in _paragraph(refused)
    result = invoke(*build, "--json", "build.json")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "synthetic-d3tom-l0-r0.25"]
    assert "--schedule fixed" in result.stdout  # the adaptive schedule does not reach a ratio below a half
    assert "No self-check: that needs 3.0 GiB of memory." in result.stderr
    assert "Not validated (that needs 3.0 GiB of memory). Run `d3tom-export validate` where" in result.stdout
    record = json.loads((tmp_path / "build.json").read_text())
    assert (record["passed"], record["validation"]) == (None, None)


@pytest.mark.slow  # the exports of six layers; the ties are in tests/merging, the limits in tests/test_weights.py
def test_a_geometry_of_zeros_is_built_and_checked(tmp_path: Path, invoke: Invoke) -> None:
    """Every token ties with every other there. The limit lets the oracle hold a tensor at a time."""
    needs = demand_of(geometry_config("lavida-tiny"), "sparse", ["uncached"])
    limit = (needs.self_check - 1) / GIB
    arguments = ("--weights", "sparse", "--layer", 2, "--ratio", 0.9, "--precision", "int8", "--max-memory", limit)
    arguments += ("--gen-length", 16)  # the oracle reads the whole model anew for each of an answer's steps
    result = invoke("build", "--geometry", "lavida-tiny", *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Self-check passed: 4 answers" in result.stdout
    assert "of its tokens agree with float32" in result.stdout
    assert "mean nothing" in result.output


def test_run_answers_on_every_backend_alike(built: tuple[Path, Result], image: Path, invoke: Invoke) -> None:
    answers = {}
    for backend in ("auto", "onnxruntime", "pytorch"):
        result = invoke("run", built[0], "--image", image, "--prompt", "What?", "--backend", backend, "--json", "-")
        assert result.exit_code == 0, result.output
        answers[backend] = json.loads(result.stdout)
    assert answers["auto"]["token_ids"] == answers["pytorch"]["token_ids"]
    assert answers["auto"]["backend"] == "onnxruntime"
    assert answers["auto"]["steps"] == 8
    assert answers["auto"]["kept_per_step"][0] == answers["auto"]["visual_tokens"]
    assert max(answers["auto"]["kept_per_step"][1:]) < answers["auto"]["visual_tokens"]


def test_run_takes_settings_of_its_own(built: tuple[Path, Result], image: Path, invoke: Invoke) -> None:
    arguments = ["--gen-length", 12, "--block-length", 6, "--step-ratio", 0.5, "--schedule", "none", "--json", "-"]
    result = invoke("run", built[0], "--image", image, "--prompt", "What?", *arguments)
    record = json.loads(result.stdout)
    assert (record["steps"], len(record["token_ids"])) == (6, 12)
    assert set(record["kept_per_step"]) == {record["visual_tokens"]}
    text = invoke("run", built[0], "--prompt", "No picture at all?")
    assert text.exit_code == 0, text.output
    assert "nothing merged" in text.stderr


def test_validate_passes_and_reports(built: tuple[Path, Result], invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("validate", built[0], "--samples", 2, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("PASSED: onnxruntime, 4 answers, 32 steps")  # on tuned and on standard graphs
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["graphs"] == ["tuned", "standard"]
    assert "which the bundle was built from" in report["compared_with"]
    assert report["passed"] is report["tokens_identical"] is report["kept_identical"] is True
    assert report["transfers_identical"] is True
    assert 0 < report["max_abs_logit_error"] < 1e-3
    assert (report["backend"], report["steps"]) == ("onnxruntime", 32)


def test_validate_fails_on_a_bundle_with_other_weights(
    built: tuple[Path, Result], checkpoint_folder: Path, invoke: Invoke, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "synthetic", raw_config(), seed=9)
    result = invoke("validate", built[0], "--samples", 1, "--model", other, "--json", "-")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    assert "FAILED" in result.stderr
    same = invoke("validate", built[0], "--samples", 1, "--model", checkpoint_folder, "--graphs", "tuned")
    assert same.exit_code == 0, same.output
    assert f"oracle       the checkpoint {checkpoint_folder}" in same.stdout
    smaller = write_checkpoint(tmp_path / "smaller", raw_config(n_layers=2))
    assert "another model" in _paragraph(invoke("validate", built[0], "--model", smaller))


@pytest.mark.parametrize(("case", "backend"), [("cached", "pytorch"), ("gqa-two-blocks", "onnxruntime")])
def test_validate_case(case: str, backend: str, invoke: Invoke) -> None:
    result = invoke("validate", "--case", OWN_GOLDEN / case, "--backend", backend, "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True


def test_validate_case_fails_on_a_changed_recording(invoke: Invoke, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(OWN_GOLDEN / "plain-adaptive", tmp_path / "case"))
    trace = load_file(folder / "trace.safetensors")
    trace["logits"][3] += 0.01
    save_file(trace, folder / "trace.safetensors")
    result = invoke("validate", "--case", folder, "--backend", "pytorch")
    assert result.exit_code == 1
    assert "largest difference 1.00e-02" in result.stdout


def test_inspect_shows_the_contract(built: tuple[Path, Result], invoke: Invoke) -> None:
    result = invoke("inspect", built[0], "--visual-tokens", 100)
    assert result.exit_code == 0, result.output
    for line in (
        "merging    layer 1, ratio 0.9 adaptive",
        "<- visual_positions   int64    (V)",
        "-> kept               int64    (B, K)",
        "(optional, 8)",
        "kept       100 2 5 7 9 12 14 17 of 100",
        "validated  passed at build",
    ):
        assert line in result.stdout
    record = json.loads(invoke("inspect", built[0], "--json", "-").stdout)
    assert record["stages"]["front"]["outputs"][0]["axes"] == ["B", "L", 32]


def test_flops_counts_a_bundle_as_it_merges(
    built: tuple[Path, Result], checkpoint_folder: Path, invoke: Invoke
) -> None:
    sizes = ["--visual-tokens", 100, "--json", "-"]
    bundle = json.loads(invoke("flops", "--bundle", built[0], *sizes).stdout)
    assert (bundle["merge"]["layer"], bundle["merge"]["ratio"], bundle["precision"]) == (1, 0.9, "fp32")
    assert (bundle["answer_tokens"], bundle["prompt_tokens"]) == (8, 175)
    given = ["--layer", 1, "--ratio", 0.9, "--precision", "fp32"]
    model = json.loads(invoke("flops", "--model", checkpoint_folder, *given, *sizes).stdout)
    assert bundle["vocabulary"] == model["vocabulary"] == 262
    assert (bundle["answers"], bundle["prompt"]) == (model["answers"], model["prompt"])


def test_doctor_tells_what_runs_here(invoke: Invoke) -> None:
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "yes  onnxruntime (cpu)" in result.stdout
    backends = json.loads(invoke("doctor", "--json", "-").stdout)["backends"]
    assert all(entry["usable"] or entry["remedy"] for entry in backends)
    providers = {f"onnxruntime ({provider})" for provider in ("cuda", "tensorrt", "nv-tensorrt-rtx")}
    assert {entry["name"] for entry in backends} >= providers | {"pytorch (oracle)", "build (export)"}


def test_doctor_names_what_reports_lack(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "matplotlib" else installed(name))
    backends = json.loads(invoke("doctor", "--json", "-").stdout)["backends"]
    (row,) = (entry for entry in backends if entry["name"] == "report, figures")
    assert (row["usable"], row["remedy"]) == (False, 'pip install "d3tom-export[report]"')
    assert row["found"].startswith("jinja2 ")


# Bad input: (how to call it, exit code, what the paragraph says).
BAD_BUILDS = [
    (["--layer", 4], 1, "merge layer 4 is outside this model: it has 4 layers"),
    (["--layer", -1], 2, "Invalid value for '--layer'"),
    (["--ratio", 1.0], 2, "Invalid value for '--ratio'"),
    (["--ratio", -0.5], 2, "Invalid value for '--ratio'"),
    (["--schedule", "linear"], 2, "Invalid value for '--schedule'"),
    (["--gen-length", 10, "--block-length", 3], 1, "block length 3 does not divide"),
]


@pytest.mark.parametrize(("arguments", "code", "says"), BAD_BUILDS)
def test_bad_build_settings_leave_nothing_behind(
    checkpoint_folder: Path, invoke: Invoke, tmp_path: Path, arguments: list[object], code: int, says: str
) -> None:
    result = invoke("build", "--model", checkpoint_folder, "--output", tmp_path / "bundle", *arguments)
    assert result.exit_code == code
    assert says in _paragraph(result)
    assert list(tmp_path.iterdir()) == []


def _missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def _truncated_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-64])


def _missing_field(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(raw_config(mlp_hidden_size=None)))


def _no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_missing_shard, "model-00001-of-00002.safetensors does not exist"),
        (_truncated_shard, "model-00002-of-00002.safetensors is truncated"),
        (_missing_field, "required field mlp_hidden_size is missing"),
        (_no_weights, "has neither model.safetensors nor"),
    ],
)
def test_a_damaged_checkpoint_leaves_nothing_behind(
    checkpoint_folder: Path, invoke: Invoke, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = Path(shutil.copytree(checkpoint_folder, tmp_path / "damaged"))
    damage(folder)
    result = invoke("build", "--model", folder, "--layer", 1, "--output", tmp_path / "bundle")
    assert result.exit_code == 1
    assert says in _paragraph(result)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_an_existing_output_folder_is_kept(checkpoint_folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    for force, says in (([], "exists. Give another with --output, or --force"), (["--force"], "is not a bundle")):
        result = invoke("build", "--model", checkpoint_folder, "--layer", 1, "--output", output, *force)
        assert result.exit_code == 1
        assert says in _paragraph(result)
        assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_bad_run_input(built: tuple[Path, Result], image: Path, invoke: Invoke, tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    for arguments, code, says in (
        (["--image", text, "--prompt", "?"], 1, "not a picture that can be decoded"),
        (["--image", tmp_path / "absent.png", "--prompt", "?"], 1, "does not exist"),
        (["--image", image, "--prompt", "word " * 300], 1, "exceeds this model's limit of 640"),
        (["--image", image], 2, "Give either --prompt TEXT or --prompt-file FILE"),
        (["--prompt", "?", "--ratio", 2], 2, "Invalid value for '--ratio'"),
        (["--prompt", "?", "--device", "cuda"], 1, "CUDAExecutionProvider does not work here"),
        (["--prompt", "?", "--json", tmp_path / "no" / "folder.json"], 1, "cannot be written"),
    ):
        result = invoke("run", built[0], *arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert says in _paragraph(result)
    assert "is not a bundle" in _paragraph(invoke("run", tmp_path, "--prompt", "?"))


def test_bad_validate_calls(built: tuple[Path, Result], invoke: Invoke, tmp_path: Path) -> None:
    for arguments, code, says in (
        ([], 2, "Give either a BUNDLE or --case DIR"),
        ([built[0], "--case", OWN_GOLDEN / "cached"], 2, "Give either"),
        (["--case", OWN_GOLDEN / "cached", "--ratio", 0.5], 2, "--ratio cannot change"),
        (["--case", tmp_path], 1, "case.json does not exist"),
        (["--case", OWN_GOLDEN / "cached", "--graphs", "tuned"], 2, "--graphs cannot change"),
        ([built[0], "--graphs", "both", "--backend", "pytorch"], 2, "--graphs chooses between the two kinds"),
        ([built[0], "--graphs", "both", "--layers"], 2, "look into one kind of graphs"),
    ):
        result = invoke("validate", *arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert says in _paragraph(result)


def test_a_failed_self_check_is_a_failure(
    checkpoint_folder: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that departs from PyTorch is kept for study, says so in its manifest, and exits with 1."""
    monkeypatch.setattr("d3tom_export.parity.validate.BACKEND_TOLERANCE", 1e-12)
    result = invoke("build", "--model", checkpoint_folder, "--layer", 1, "--output", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "did not pass its self-check" in _paragraph(result)
    assert json.loads((tmp_path / "bundle" / MANIFEST_FILE).read_text())["validation"]["passed"] is False
    assert "validated  FAILED" in invoke("inspect", tmp_path / "bundle").stdout


def test_debug_shows_the_trace(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path, "--debug")
    assert result.exit_code == 1
    assert "is not a bundle" in str(result.exception)


def test_an_unexpected_error_is_a_paragraph_too(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path, verify: str) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("d3tom_export.bundle.folder.load_bundle", fail)
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: surprise" in _paragraph(result)


def test_a_language_only_checkpoint_builds_its_stages(invoke: Invoke, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    result = invoke("build", "--model", OWN_GOLDEN / "plain-adaptive", "--layer", 2, "--ratio", 0.5, "--output", output)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.glob("*.onnx")) == [
        "back.onnx",
        "certainty.onnx",
        "embed.onnx",
        "front.onnx",
        "merge.onnx",
    ]
    assert "tokenizer.json does not exist" in _paragraph(invoke("run", output, "--prompt", "Hello"))


def test_a_damaged_bundle_is_refused(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "copy"))
    tuned_graph(folder, "fp32", "back").write_bytes(b"")
    result = invoke("run", folder, "--prompt", "?")
    assert result.exit_code == 1
    assert "cpu/fp32/back.onnx has 0 bytes" in _paragraph(result)
    write_manifest(folder, bundle.manifest)
    assert "it holds no graph" in _paragraph(invoke("run", folder, "--prompt", "?"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete(name: str, invoke: Invoke) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    command = main.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"--{parameter.name} of {name} has no help"  # type: ignore[attr-defined]
            assert all(option.replace("_", "-") == option for option in parameter.opts)


def test_unknown_commands_and_options_are_usage_errors(invoke: Invoke) -> None:
    assert invoke("biuld").exit_code == 2
    result = invoke("build", "--layr", 2)
    assert result.exit_code == 2
    assert "--layer" in result.stderr


def test_json_leaves_pipes_and_links_alone(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    assert invoke("inspect", bundle.folder, "--json", link).exit_code == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["schema_version"] == SCHEMA_VERSION
    assert invoke("inspect", bundle.folder, "--json", "/dev/null").exit_code == 0
    assert Path("/dev/null").is_char_device()


def test_the_contracts_default_targets_are_accepted(checkpoint_folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    """Those of design.md's command line."""
    targets = ["--precision", "fp32", "--engine", "none", "--no-kv-cache"]
    result = invoke("build", "--model", checkpoint_folder, "--layer", 9, *targets)
    assert "it has 4 layers" in _paragraph(result)


def test_a_self_check_that_cannot_work_is_refused_before_the_export(invoke: Invoke, tmp_path: Path) -> None:
    short = write_checkpoint(tmp_path / "short", raw_config(max_sequence_length=64))
    result = invoke("build", "--model", short, "--layer", 1, "--output", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "--self-check 0" in _paragraph(result)
    assert "exporting" not in result.stderr
    (short / "tokenizer.json").unlink()
    result = invoke("build", "--model", short, "--layer", 1, "--output", tmp_path / "bundle")
    assert "has no tokenizer.json" in _paragraph(result)
    assert [path.name for path in tmp_path.iterdir()] == ["short"]


def test_validate_reads_weights_layer_by_layer_where_memory_is_short(
    built: tuple[Path, Result], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so where even that may not do; it is the system's to decide."""
    streamed = []
    load = checkpoint.load_model

    def watched(*arguments: Any, **options: Any) -> Any:
        streamed.append(options["streamed"])
        return load(*arguments, **options)

    monkeypatch.setattr(checkpoint, "load_model", watched)
    for free, streams in ((None, False), (2 * GIB, True)):
        monkeypatch.setattr(preflight, "free_memory", lambda free=free: free)
        result = invoke("validate", built[0], "--samples", 1, "--json", "-")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["graphs"] == (["tuned"] if streams else ["tuned", "standard"])
        assert ("This may need 3.0 GiB of memory, and 2.0 GiB are free" in result.stderr) == streams
        assert streamed.pop() == streams
