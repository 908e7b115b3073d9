"""Distorted digits are still the digits they were made of, and the phase that trains on them holds what is known."""

from __future__ import annotations

import numpy as np
import torch

from examples.lavida_tiny.batches import Text
from examples.lavida_tiny.dense import DistortedPhase
from examples.lavida_tiny.digits import DigitBank
from examples.lavida_tiny.tokenizer import train_tokenizer
from examples.lavida_tiny.train import fresh_model


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def test_distorted_digits_are_half_of_the_bank_and_of_their_labels() -> None:
    plain = DigitBank.load(held_out=False)
    bank = plain.distorted(np.random.default_rng(0), 2)
    count = len(plain.labels)
    assert np.array_equal(bank.labels, np.tile(plain.labels, 4))
    assert np.array_equal(bank.images[: 2 * count], np.tile(plain.images, (2, 1, 1)))
    made = bank.images[2 * count :]
    made = bank.images[2 * count :]
    assert (made != np.tile(plain.images, (2, 1, 1))).any((1, 2)).all()
    # The plain digit that is nearest to one mostly has its label; chance is a tenth.
    known, new = _flat(plain.images), _flat(made)
    distance = (known**2).sum(-1) - 2 * new @ known.T
    assert (plain.labels[distance.argmin(-1)] == bank.labels[2 * count :]).mean() > 0.9
    again = plain.distorted(np.random.default_rng(0), 2)
    assert np.array_equal(bank.images, again.images)


def test_features_are_held_to_those_the_phase_began_with() -> None:
    model, heads = fresh_model(Text(train_tokenizer()), 0)
    phase = DistortedPhase(model, heads.dense, DigitBank.load(held_out=False), 10)
    phase.begin()

    def away() -> float:
        with torch.no_grad():
            return phase.part(np.random.default_rng(3), 0.0, 0).stats["away"]

    assert away() == 0.0
    with torch.no_grad():
        model.model.mm_projector[2].bias.add_(0.5)
    assert away() > 0.01
    phase.begin()
    assert away() == 0.0
