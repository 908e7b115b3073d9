"""``run``: what it shows of pictures and answers, and what it says beside them."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend
from d3tom_export.bundle.folder import Bundle
from d3tom_export.cli import answer_options, run_command
from d3tom_export.config import GenerationConfig
from d3tom_export.errors import D3tomError
from d3tom_export.pipeline import Reader
from d3tom_export.trust.terminal import legible
from tests.cli.screen import Screen, on_terminal
from tests.conftest import Invoke, picture


def _answer(invoke: Invoke, bundle: Bundle, *arguments: object) -> dict:
    result = invoke("run", bundle.folder, "--prompt", "What?", "--gen-length", 4, "--json", "-", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_the_contracts_fields_and_raw_text_is_of_all_ids(
    bundle: Bundle, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, raw = _answer(invoke, bundle), _answer(invoke, bundle, "--raw-text")
    assert plain["token_ids"] == raw["token_ids"]
    assert plain["steps"] == len(plain["kept"]) == 4
    reader = Reader.of_bundle(bundle)
    assert raw["text"] == reader.tokenizer.decode(raw["token_ids"], skip_special_tokens=True).lstrip("!")
    first = reader.tokenizer.decode(raw["token_ids"][:1], skip_special_tokens=False)
    monkeypatch.setattr(Reader, "end_ids", (raw["token_ids"][1],))
    assert _answer(invoke, bundle)["text"] == ("" if raw["token_ids"][0] == raw["token_ids"][1] else first.strip())
    assert _answer(invoke, bundle, "--raw-text")["text"] == raw["text"]


def test_an_answer_ends_where_its_text_is_settled(
    bundle: Bundle, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _answer(invoke, bundle, "--no-early-exit")
    # Whatever was committed first of the first two places ends the answer; then the other is all that is awaited.
    monkeypatch.setattr(Reader, "end_ids", tuple(sorted(set(whole["token_ids"][:2]))))
    whole, early = _answer(invoke, bundle, "--no-early-exit"), _answer(invoke, bundle)
    assert early["text"] == whole["text"]
    assert early["token_ids"] == whole["token_ids"][:1]  # up to the end token and with it
    assert (len(whole["token_ids"]), whole["steps"]) == (4, 4)
    assert early["steps"] <= 4
    raw = _answer(invoke, bundle, "--raw-text")
    assert (len(raw["token_ids"]), raw["steps"], raw["generation"]["early_exit"]) == (4, 4, False)
    both = invoke("run", bundle.folder, "--prompt", "What?", "--raw-text", "--early-exit")
    assert both.exit_code == 2
    assert "--early-exit leaves some out" in both.output


def test_rules_in_place_of_a_plan(bundle: Bundle, invoke: Invoke) -> None:
    sure = _answer(invoke, bundle, "--commit", "threshold", "--threshold", "0.001", "--no-early-exit")
    assert (sure["steps"], len(sure["kept"])) == (1, 1)
    bounded = _answer(invoke, bundle, "--commit", "threshold", "--threshold", "1", "--max-steps", 2, "--no-early-exit")
    assert bounded["steps"] == 2
    assert bounded["generation"]["commit"] == "threshold"
    for arguments, says in (
        (["--threshold", "0.5"], "threshold is for commit rule threshold, and answers here are committed by plan"),
        (["--commit", "factor", "--margin", "0.1"], "margin is for commit rule frechet"),
        (["--max-steps", "2"], "without a plan"),
        (["--commit", "frechet", "--remasking", "entropy"], "compares probabilities"),
    ):
        refused = invoke("run", bundle.folder, "--prompt", "What?", "--gen-length", 4, *arguments)
        assert refused.exit_code == 1
        assert says in refused.output.replace("\n", " ")


def test_an_answer_stops_at_a_text_and_leads_up_to_another(bundle: Bundle, invoke: Invoke) -> None:
    reader = Reader.of_bundle(bundle)
    whole = _answer(invoke, bundle, "--raw-text")
    first = reader.tokenizer.decode(whole["token_ids"][:1], skip_special_tokens=False)
    (ids,) = reader.stop_ids([first])
    assert list(ids) == whole["token_ids"][:1]
    stopped = _answer(invoke, bundle, "--stop", first, "--stop", "never said at all")
    assert (stopped["token_ids"], stopped["text"]) == ([], "")
    assert stopped["generation"]["stop_ids"][0] == list(ids)
    assert stopped["steps"] < whole["steps"]
    followed = _answer(invoke, bundle, "--suffix", " it is")
    suffix = followed["generation"]["suffix_ids"]
    assert suffix == list(reader.suffix_ids(" it is"))
    assert followed["token_ids"][4:] == suffix
    assert followed["text"].endswith(" it is")
    assert followed["token_ids"][:4] != whole["token_ids"]  # it was written to lead up to it


def test_several_questions_look_at_their_pictures_once(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, encoded = [], []
    for number in range(2):
        picture(40, 40, seed=number).save(tmp_path / f"{number}.png")
        images += ["--image", tmp_path / f"{number}.png"]
    encode = OnnxRuntimeBackend.encode_views

    def counted(backend: OnnxRuntimeBackend, pixel_values: np.ndarray) -> np.ndarray:
        encoded.append(pixel_values.shape)
        return encode(backend, pixel_values)

    monkeypatch.setattr(OnnxRuntimeBackend, "encode_views", counted)
    questions = ["What?", "Compare <image> with <image>.", "And a third thing?"]
    alone, texts = [], ""
    for question in questions:
        result = invoke("run", bundle.folder, "--prompt", question, "--gen-length", 4, "--json", "-", *images)
        alone.append(json.loads(result.stdout))
        texts += alone[-1]["text"] + "\n"
    assert len(encoded) == 6
    encoded.clear()
    asked = [argument for question in questions for argument in ("--prompt", question)]
    together = invoke("run", bundle.folder, *asked, "--gen-length", 4, "--json", tmp_path / "result.json", *images)
    assert together.exit_code == 0, together.output
    assert len(encoded) == 2
    assert together.stdout == texts
    assert together.stderr.count("4 steps on onnxruntime") == 3
    assert together.stderr.count("load ") == 1
    result = json.loads((tmp_path / "result.json").read_text())
    seconds = [answer.pop("seconds") for answer in result["answers"]]
    for answer in alone:
        assert answer.pop("seconds").keys() == seconds[0].keys()
    assert result["answers"] == alone
    assert result.keys() == {"answers", "seconds"}
    for part in ("prompt", "denoise"):
        assert result["seconds"][part] == pytest.approx(sum(each[part] for each in seconds))
    assert {each["load"] for each in seconds} == {result["seconds"]["load"]}


def test_a_question_that_does_not_fit_is_refused_before_another_is_answered(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.backends.select.open_backend", None)
    picture(40, 40).save(tmp_path / "p.png")
    asked = ["--image", tmp_path / "p.png", "--prompt", "What?", "--prompt"]
    for last, says in (("long " * 200, "exceeds this model's limit"), ("<image> <image>", "places 2 pictures")):
        result = invoke("run", bundle.folder, *asked, last)
        assert (result.exit_code, result.stdout) == (1, "")
        assert says in result.stderr


def test_an_answer_stands_on_a_line_of_its_own_where_the_bar_ended_early(bundle: Bundle, invoke: Invoke) -> None:
    reader = Reader.of_bundle(bundle)
    whole = _answer(invoke, bundle, "--raw-text")
    first = reader.tokenizer.decode(whole["token_ids"][:1], skip_special_tokens=False)
    asked = ["run", bundle.folder, "--prompt", "What?", "--gen-length", 4, "--stop", first, "--suffix", "end"]
    shown = on_terminal(*asked, size=(60, 40), whole=True)
    lines = Screen(60, 40).feed(shown.told).lines
    assert "/4 denoising" in "".join(lines)
    assert "4/4 denoising" not in "".join(lines)
    assert "end" in lines


def test_conversations_and_system_texts(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    image, file = tmp_path / "p.png", tmp_path / "conversation.json"
    picture(40, 40).save(image)

    def tokens(messages: object, *arguments: object) -> int:
        file.write_text(json.dumps(messages))
        arguments = ("--prompt-file", file, "--gen-length", 2, "--json", "-", *arguments)
        result = invoke("run", bundle.folder, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["prompt_tokens"]

    one = [{"role": "user", "content": "What?"}]
    asked = _answer(invoke, bundle)["prompt_tokens"]
    assert tokens(one) == asked
    assert tokens({"messages": one}, "--image", image) == _answer(invoke, bundle, "--image", image)["prompt_tokens"]
    assert tokens([*one, {"role": "assistant", "content": "That."}, *one]) > asked
    brief = _answer(invoke, bundle, "--system", "Be brief.")["prompt_tokens"]
    assert tokens([{"role": "system", "content": "Be brief."}, *one]) == brief
    assert _answer(invoke, bundle, "--no-system")["prompt_tokens"] < brief < asked


def test_what_cannot_be_asked_is_refused(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.backends.select.open_backend", None)
    file, broken = tmp_path / "conversation.json", tmp_path / "broken.json"
    file.write_text(json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]))
    broken.write_text("[")
    for code, arguments, says in (
        (2, (), "Give either --prompt TEXT or --prompt-file FILE"),
        (
            2,
            ("--prompt", "a", "--prompt", "b", "--prompt-file", file),
            "Give either --prompt TEXT or --prompt-file FILE",
        ),
        (2, ("--prompt", "a", "--prompt-file", file), "Give either --prompt TEXT or --prompt-file FILE"),
        (2, ("--prompt", "a", "--system", "b", "--no-system"), "exclude one another"),
        (2, ("--prompt-file", file, "--system", "b"), "has a system turn of its own; leave --system out"),
        (2, ("--prompt-file", file, "--no-system"), "leave --no-system out"),
        (2, ("--prompt", "a", *["--stop", "b"] * 65), "--stop was given 65 times"),
        (1, ("--prompt-file", broken), "broken.json is no conversation"),
        (1, ("--prompt-file", tmp_path / "none.json"), "none.json does not exist"),
        (1, ("--prompt", "a", "--stop", ""), "The stop text '' is no token"),
        (1, ("--prompt", "a", "--suffix", ""), "The suffix '' is no token"),
        (1, ("--prompt", "a", "--system", "caf\udce9"), "not UTF-8"),
        (1, ("--prompt", "a", "--system", "<image>"), "The system turn has <image>"),
    ):
        result = invoke("run", bundle.folder, *arguments)
        assert result.exit_code == code, result.output
        assert says in " ".join(result.stderr.split())


def test_photos_are_upright_and_frames_are_spoken_of(bundle: Bundle, invoke: Invoke, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo, clip = tmp_path / "photo.jpg", tmp_path / "clip\x1b[31m.gif"
    picture(28, 112).save(photo, exif=exif)
    picture(112, 28).save(clip, save_all=True, append_images=[picture(112, 28, 1)])
    upright = _answer(invoke, bundle, "--image", photo)
    stored = _answer(invoke, bundle, "--image", photo, "--ignore-orientation")
    assert upright["visual_tokens"] != stored["visual_tokens"]
    animated = invoke("run", bundle.folder, "--prompt", "What?", "--gen-length", 4, "--image", clip)
    assert animated.exit_code == 0
    assert "holds several pictures (frames or pages); the first is shown" in animated.stderr
    assert "\x1b" not in animated.output
    assert "Warning" not in animated.stderr


def test_what_is_no_picture_is_refused_before_a_runtime_is_opened(
    bundle: Bundle, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3tom_export.backends.select.open_backend", None)
    pipe, many = tmp_path / "pipe.png", [argument for _ in range(99) for argument in ("--image", tmp_path / "absent")]
    os.mkfifo(pipe)
    for arguments, says in (
        (["--image", pipe], "is a named pipe, expected a regular file"),
        (["--image", tmp_path], "is a folder"),
        (["--image", "/dev/zero"], "is a device"),
        (many, "exceeds this model's limit"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
    ):
        result = invoke("run", bundle.folder, "--prompt", "?", *arguments)
        assert result.exit_code == 1, result.output
        assert says in result.stderr


def test_a_terminal_obeys_nothing_in_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert legible("two\nlines\tof 👩‍👩‍👧 text") == "two\nlines\tof 👩‍👩‍👧 text"
    assert legible("\x1b[31m\r\x00\u202e\x9b\ud800") == r"\x1b[31m\r\x00\u202e\x9b\ud800"
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert run_command._shown("é\x1b") == "\\xe9\x1b"  # a file gets the character that a terminal would obey
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert run_command._shown("é\x1b") == r"\xe9\x1b"


def test_an_answer_shorter_than_the_models_block_is_one_block() -> None:
    llada = GenerationConfig(gen_length=128, block_length=32)
    assert answer_options.generation_from(llada, {"gen_length": 8}).block == 8
    assert answer_options.generation_from(llada, {"gen_length": 64}).block == 32
    with pytest.raises(D3tomError, match="block length 32 does not divide the answer length 48"):
        answer_options.generation_from(llada, {"gen_length": 48})
