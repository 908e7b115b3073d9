"""A model that is open: what it takes, what it gives, what it refuses, and several threads at it."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import d3tom_export as d3
from d3tom_export.bundle.folder import Bundle
from d3tom_export.errors import CallError
from d3tom_export.pipeline import Reader, run_loop
from d3tom_export.prompt.conversation import Turn
from tests.conftest import Invoke, picture


def test_an_answer_is_that_of_the_loop(bundle: Bundle, model: d3.Model) -> None:
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    backend = OnnxRuntimeBackend(bundle, "cached" if model.kv_cache else "uncached", device="cpu")
    reader, image, manifest = Reader.of_bundle(bundle), picture(60, 40), bundle.manifest
    generation = reader.with_ends(manifest.generation.changed(gen_length=12, block_length=6))
    prompt = reader.read(backend, "What?", [image], generation)
    records = list(run_loop(backend, prompt, reader.config.language.mask_token_id, generation, manifest.merge))
    answer = model.answer(image, "What?", gen_length=12, block_length=6, early_exit=False)
    assert answer.token_ids == tuple(reader.answer(records[-1], generation).token_ids)
    assert answer.text == reader.answer(records[-1], generation).text
    assert answer.kept == tuple(record.keep for record in records)
    assert (answer.steps, answer.visual_tokens) == (12, len(prompt.visual_positions))
    assert (answer.prompt_tokens, answer.shared_tokens) == (prompt.embeddings.shape[1], 0)
    assert answer.mean_kept == pytest.approx(np.mean(answer.kept) / answer.visual_tokens)
    assert answer.kv_cache is model.kv_cache
    assert answer.prompt_seconds > 0 < answer.denoise_seconds


def test_run_says_what_the_model_says(bundle: Bundle, model: d3.Model, invoke: Invoke, tmp_path: Path) -> None:
    picture(50, 50).save(tmp_path / "p.png")
    loop = "--kv-cache" if model.kv_cache else "--no-kv-cache"
    told = ("--gen-length", 6, "--ratio", 0.5, "--stop", "q", "--suffix", " z", "--no-system", "--json", "-")
    ran = invoke("run", bundle.folder, "--image", tmp_path / "p.png", "--prompt", "What?", loop, *told)
    answer = model.answer(
        tmp_path / "p.png", "What?", gen_length=6, ratio=0.5, stop="q", suffix=" z", system=None
    ).to_json()
    expected = json.loads(ran.stdout)
    assert expected.pop("seconds").keys() == {"load", *answer.pop("seconds")}
    assert json.loads(json.dumps(answer)) == expected


def test_pictures_come_in_many_ways(model: d3.Model, tmp_path: Path) -> None:
    image = picture(60, 40)
    path = tmp_path / "p.png"
    image.save(path)
    array = np.asarray(image)
    with_alpha = np.concatenate([array, np.full((40, 60, 1), 7, np.uint8)], axis=-1)
    ways: list[Any] = [path, str(path), path.read_bytes(), image, array, with_alpha, [image], (path,), model.see(array)]
    answers = {model.answer(way, "What?", gen_length=4).token_ids for way in ways}
    assert len(answers) == 1
    two = model.answer([path, array], "Compare <image> and <image>.", gen_length=4)
    assert two.visual_tokens == 2 * model.see(path).visual_tokens
    grey = np.asarray(image.convert("L"))
    same = [model.answer(each, "What?", gen_length=4) for each in (grey, np.stack([grey] * 3, axis=-1))]
    assert same[0].token_ids == same[1].token_ids
    nothing = [model.answer(each, "What?", gen_length=4).visual_tokens for each in (None, [])]
    assert nothing == [0, 0]


def test_pictures_are_upright_unless_told_otherwise(bundle: Bundle, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(28, 112).save(tmp_path / "p.jpg", exif=exif)
    sizes = {}
    for ignores in (False, True):
        with (
            d3.open(bundle.folder, load=False, ignore_orientation=ignores) as model,
            Image.open(tmp_path / "p.jpg") as image,
        ):
            seen = {model.see(each).visual_tokens for each in (image, tmp_path / "p.jpg")}
            assert len(seen) == 1
            sizes[ignores] = seen
    assert sizes[False] != sizes[True]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("absent.png", "does not exist"),
        (b"no picture", "picture 1 of the prompt is not a picture"),
        (np.zeros((4, 4), np.float32), r"float32 and shape \(4, 4\).*expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
        (7, "7 was given for a picture"),
        ([[picture(4, 4)]], "was given for a picture"),
        ([picture(4, 4), None], "None was given for a picture"),
    ],
)
def test_what_is_no_picture_is_refused(model: d3.Model, image: Any, says: str) -> None:
    with pytest.raises(d3.D3tomError, match=says):
        model.answer(image, "What?")


def test_conversations(model: d3.Model) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "And?"},
    ]
    said = ("Be brief.", "<image>\nWhat?", "That.", "And?")
    turns = [Turn(message["role"], content) for message, content in zip(messages, said, strict=True)]
    one, other = (model.answer(picture(40, 40), each, gen_length=4) for each in (messages, turns))
    assert one.token_ids == other.token_ids
    assert one.prompt_tokens == other.prompt_tokens
    for question, says in (
        (messages[:3], "its last turn is the assistant's"),
        ([], "neither a list of turns"),
        ({"role": "user"}, "expected a text or a list of messages"),
        (7, "expected a text or a list of messages"),
        ("caf\udce9", "not UTF-8"),
    ):
        with pytest.raises(d3.D3tomError, match=says):
            model.answer(None, question)  # type: ignore[arg-type]
    with pytest.raises(CallError, match="a system turn of its own"):
        model.answer(picture(40, 40), messages, system="Else.")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"ratio": 1.5}, r"outside \[0, 1\)"),
        ({"schedule": "never"}, "expected one of adaptive, fixed, none"),
        ({"gen_length": 0}, "expected at least 1"),
        ({"gen_length": "8"}, "expected an integer"),
        ({"threshold": 0.5}, "for commit rule threshold"),
        ({"merge_at": "prefill"}, "built with --merge-at step"),
        ({"early_exit": 1}, "early_exit is 1, expected True or False"),
        ({"raw_text": True, "early_exit": True}, "leaves some out"),
        ({"stop": ["a"] * 65}, "65 stop texts"),
        ({"stop": None}, "stop is None, expected a text or a list"),
        ({"stop": 5}, "stop is 5, expected a text or a list"),
        ({"stop": [7]}, "stop is 7, expected a text"),
        ({"stop": ""}, "is no token"),
        ({"suffix": None}, "suffix is None"),
        ({"share_prefix": True}, "Build it anew with --kv-cache and --share-prefix"),
        ({"gen_length": 10_000}, "exceeds this model's limit"),
    ],
)
def test_what_cannot_be_is_refused_before_a_picture_is_opened(model: d3.Model, settings: Any, says: str) -> None:
    with pytest.raises(d3.D3tomError, match=says):
        model.answer("absent.png", "What?", **settings)
    with pytest.raises(d3.D3tomError, match=says):
        model.check(1, "What?", **settings)


def test_keywords_that_are_no_setting(model: d3.Model) -> None:
    for call in (lambda: model.answer(None, "?", gen_lenght=4), lambda: d3.Request(None, "?", gen_lenght=4)):  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="'gen_lenght' is no setting of an answer; did you mean gen_length"):
            call()


def test_steps_add_up_to_the_answer(model: d3.Model) -> None:
    whole = model.answer(picture(60, 40), "What?", gen_length=8, suffix=" z")
    steps = model.steps(picture(60, 40), "What?", gen_length=8, suffix=" z")
    assert steps.start.number == 0
    assert set(steps.start.text[:8]) == {"░"}
    told = list(steps)
    assert [step.number for step in told] == list(range(1, len(told) + 1))
    assert (told[0].total, steps.total) == (8, 8)
    assert tuple(step.kept for step in told) == whole.kept == steps.answer.kept
    assert [step.merged for step in told] == [False] + [True] * (len(told) - 1)
    assert steps.answer.token_ids == whole.token_ids
    assert steps.prompt_tokens == whole.prompt_tokens
    committed: set[int] = set()
    for before, step in zip([steps.start, *told], told, strict=False):
        assert step.committed
        assert not committed & set(step.committed)
        committed |= set(step.committed)
        changed = {at for at in range(8) if step.token_ids[at] != before.token_ids[at]}
        assert changed <= set(step.committed)
    assert {piece.style for piece in told[0].pieces()} <= {"said", "new", "mask"}
    assert "".join(piece.text for piece in told[0].pieces("ascii")).isascii()
    assert next(steps, None) is None


def test_an_answer_may_be_left(model: d3.Model) -> None:
    with model.steps(None, "What?", gen_length=8) as steps:
        next(steps)
    assert next(steps, None) is None
    with pytest.raises(d3.D3tomError, match="was not finished"):
        _ = steps.answer
    half = model.steps(None, "What?", gen_length=8)
    next(half)
    assert half.answer.token_ids == model.answer(None, "What?", gen_length=8).token_ids  # runs what is left


def test_an_answer_is_left_by_another_thread(model: d3.Model) -> None:
    """While a step waits for the runtime: it does not begin again."""
    steps = model.steps(None, "What?", gen_length=8)
    next(steps)
    with ThreadPoolExecutor(1) as pool:
        with model._lock:
            waits = pool.submit(next, steps, None)
            time.sleep(0.3)
            steps.close()
        assert waits.result() is None
    assert steps._loop is None


def test_answers_that_take_turns_do_not_meet(model: d3.Model) -> None:
    """Two answers of one model, a step of each in turn, and each as it is alone."""
    asked = [(picture(60, 40, 1), "What?"), (picture(40, 60, 2), "Where is it?")]
    alone = [model.answer(*each, gen_length=8).token_ids for each in asked]
    both = [model.steps(*each, gen_length=8) for each in asked]
    for _ in range(8):
        for steps in both:
            next(steps, None)
    assert [steps.answer.token_ids for steps in both] == alone


def test_threads_share_a_model(model: d3.Model) -> None:
    asked = [(picture(40 + 4 * number, 40, number), f"What is {number}?") for number in range(6)]
    alone = [model.answer(*each, gen_length=6) for each in asked]
    barrier = threading.Barrier(6)

    def ask(number: int) -> list[d3.Answer]:
        barrier.wait()
        if number % 2:
            return [model.steps(*asked[number], gen_length=6).answer]
        many = model.answer_many([d3.Request(*asked[number], gen_length=6)])
        return [each for each in many if isinstance(each, d3.Answer)]

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, range(6)))
    for (answer,), expected in zip(found, alone, strict=True):
        assert (answer.token_ids, answer.kept) == (expected.token_ids, expected.kept)


def test_a_model_of_one_thread_says_so(bundle: Bundle) -> None:
    """As engines are, whose context is the thread's that opened them."""
    with d3.open(bundle.folder, device="cpu", load=False) as model:
        model._one_thread = True
        model.load()
        with ThreadPoolExecutor(1) as pool, pytest.raises(d3.D3tomError, match="in the thread that opened them"):
            pool.submit(model.answer, None, "What?").result()
        assert model.answer(None, "What?", gen_length=2).steps


def test_a_closed_model_answers_nothing(bundle: Bundle) -> None:
    with d3.open(bundle.folder, device="cpu") as model:
        steps = model.steps(None, "What?")
        next(steps)
    model.close()
    assert "closed" in repr(model)
    for call in (lambda: model.answer(None, "What?"), model.describe, model.load, lambda: next(steps)):
        with pytest.raises(d3.D3tomError, match="is closed"):
            call()
    (found,) = model.answer_many([d3.Request(None, "What?")])
    assert isinstance(found, d3.D3tomError)


def test_a_picture_is_encoded_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from d3tom_export.backends.onnxruntime import OnnxRuntimeBackend

    encode, encoded = OnnxRuntimeBackend.encode_views, []

    def counted(backend: OnnxRuntimeBackend, pixel_values: np.ndarray) -> np.ndarray:
        encoded.append(len(pixel_values))
        return encode(backend, pixel_values)

    monkeypatch.setattr(OnnxRuntimeBackend, "encode_views", counted)
    for picture_bytes, times in ((1 << 20, 1), (0, 2)):
        encoded.clear()
        with d3.open(bundle.folder, device="cpu", picture_bytes=picture_bytes) as model:
            for question in ("What?", "Where?"):
                model.answer(picture(40, 40), question, gen_length=2)
        assert len(encoded) == times


def test_what_it_is(bundle: Bundle, model: d3.Model) -> None:
    told = model.describe()
    assert (told.model, told.family) == ("synthetic", "lavida-llada")
    assert (told.backend, told.precision) == ("onnxruntime", "fp32")
    assert (told.kv_cache, told.loops, told.layers) == (model.kv_cache, ("uncached", "cached"), 4)
    assert (told.sees, told.validated, told.max_tokens) == (True, None, 640)
    assert told.merge == bundle.manifest.merge.in_loop(model.kv_cache)
    assert json.loads(json.dumps(told.to_json()))["folder"] == str(bundle.folder)
    plain = model.fingerprint()
    assert model.fingerprint() == plain
    for settings, changed in (({"ratio": 0.5}, "settings"), ({"system": "x"}, "wording")):
        other = model.fingerprint(**settings)  # type: ignore[arg-type]
        assert {name for name in plain if plain[name] != other[name]} == {changed}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"backend": "tensorflow"}, "--backend 'tensorflow' is none of auto, pytorch"),
        ({"device": "tpu"}, "--provider 'tpu' is none of"),
        ({"precision": "fp4"}, "--precision 'fp4' is none of"),
        ({"backend": "pytorch", "device": "cuda"}, "the pytorch oracle runs on the CPU"),
        ({"provider_cache": "x"}, "--provider-cache is for"),
        ({"cuda_graphs": False}, "--no-cuda-graphs concerns engines"),
        ({"precision": "int8"}, "has no graphs in int8"),
        ({"specialization": "eager"}, "TensorRT-RTX's"),
        ({"verify": "none"}, "--verify 'none' is none of auto, full"),
        ({"provider_cache": 5}, "5 was given for provider_cache"),
    ],
)
def test_what_cannot_be_opened(bundle: Bundle, given: Any, says: str) -> None:
    with pytest.raises(d3.D3tomError, match=says):
        d3.open(bundle.folder, **given)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(d3.D3tomError, match="None was given for the bundle, expected the path"):
        d3.open(None)  # type: ignore[arg-type]
    with pytest.raises(d3.D3tomError, match="is not a bundle"):
        d3.open(tmp_path)
