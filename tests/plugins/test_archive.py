"""Archives of compiled kernels: whole again, canonical, refused when damaged; the right kernel for a GPU."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3tom_export.errors import D3tomError
from d3tom_export.plugins.archive import Kernel, pack, select, unpack
from d3tom_export.plugins.launch import DTYPES, Variant, variants

VARIANTS = sorted({variant for dtype in DTYPES for variant in variants(dtype)})


def kernel(sm: int = 89, portable: bool = False, variant: Variant = VARIANTS[0], image: bytes = b"image") -> Kernel:
    """A kernel whose image says what it is."""
    return Kernel(variant, sm, portable, "entry", 128, 1024, 2, image)


kernels = st.builds(
    kernel, st.sampled_from([80, 89, 120]), st.booleans(), st.sampled_from(VARIANTS), st.binary(max_size=40)
)


@given(st.lists(kernels, unique_by=lambda each: (each.variant, each.sm, each.portable)), st.randoms())
def test_an_archive_is_whole_again_and_canonical(held: list[Kernel], random: object) -> None:
    data = pack(held)
    assert set(unpack(data)) == set(held)
    shuffled = list(held)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert pack(shuffled) == data
    assert len(data) % 8 == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"X" + data[1:], lambda data: data[:5]])
def test_a_damaged_archive_is_refused(damage: object) -> None:
    data = pack([kernel(), kernel(120, image=bytes(64))])
    with pytest.raises(D3tomError, match="build it again"):
        unpack(damage(data))  # type: ignore[operator]


def test_an_unknown_variant_or_type_is_refused() -> None:
    data = bytearray(pack([kernel()]))
    struct.pack_into("<I", data, 16 + 24 + 32, 9)  # the type code of the first header
    with pytest.raises(D3tomError, match="another version"):
        unpack(bytes(data))
    with pytest.raises(D3tomError, match="another version"):
        unpack(pack([kernel()]).replace(VARIANTS[0].name.encode(), b"f" + VARIANTS[0].name.encode()[1:]))


def test_the_best_kernel_for_a_gpu_is_selected() -> None:
    held = [kernel(80), kernel(89), kernel(90), kernel(120), kernel(80, portable=True)]

    def chosen(sm: int) -> tuple[int, bool] | None:
        found = select(held, sm).get(VARIANTS[0])
        return found and (found.sm, found.portable)

    assert chosen(80) == (80, False)
    assert chosen(86) == (80, False)  # same generation
    assert chosen(89) == (89, False)
    assert chosen(87) == (80, True)  # embedded: translated
    assert chosen(90) == (90, False)
    assert chosen(120) == (120, False)
    assert chosen(100) == (80, True)  # no cubin: translated
    assert chosen(121) == (80, True)  # cubins of 12.0 are for 12.0 alone
    assert chosen(75) is None
    assert select([kernel(89)], 86) == {}
