"""The counter-based generator against published vectors, a second implementation, and frozen
values.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from support import same_bits
from weft.ops import philox
from weft.ops.peft_draw import peft_projections

ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors: philox 4x32, ten rounds. counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, ONES)


def ours(count, key):
    words = tuple(torch.tensor([c], dtype=torch.int64) for c in count)
    return tuple(int(w) for w in philox.philox(words, key[0] | key[1] << 32))


@pytest.mark.parametrize(("count", "key", "result"), KNOWN)
def test_published_vectors(count, key, result):
    assert ours(count, key) == result == oracle.philox(count, key)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_a_second_implementation_agrees(count, key):
    assert ours(count, key) == oracle.philox(count, key)


def test_an_element_depends_on_its_place_alone():
    whole = philox.bits(5, 1, 13, 22)
    for i, j in ((0, 0), (12, 21), (3, 7), (7, 18)):
        assert int(whole[i, j]) == oracle.philox((j // 4, i, 1, 0), (5, 0))[j % 4]
    assert torch.equal(philox.bits(5, 1, 4, 9), whole[:4, :9])
    assert not torch.equal(philox.bits(5, 0, 13, 22), whole)
    assert not torch.equal(philox.bits(6, 1, 13, 22), whole)


def test_the_bands_in_which_it_is_computed_do_not_matter(monkeypatch):
    whole = philox.bits(2**40 + 3, 0, 37, 11)
    monkeypatch.setattr(philox, "_BAND", 12)
    assert torch.equal(philox.bits(2**40 + 3, 0, 37, 11), whole)


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (1, 1), (3, 4), (2, 5)])
def test_any_shape(rows, cols):
    assert philox.bits(1, 0, rows, cols).shape == (rows, cols)
    assert (
        philox.uniform(1, 0, rows, cols, 0.5).shape
        == philox.normal(1, 0, rows, cols, 0.5).shape
        == (rows, cols)
    )


@given(st.integers(0, 2**63 - 1), st.floats(1e-3, 1e3))
def test_uniform_is_symmetric_bounded_never_zero_and_one_multiplication_from_its_bits(key, bound):
    found = philox.uniform(key, 1, 5, 7, bound)
    assert (
        found.dtype == torch.float32
        and (found != 0).all()
        and (found.abs() <= bound * (1 + 1e-6)).all()
    )
    step = torch.tensor(bound * 2.0**-24, dtype=torch.float32)
    for i, j in ((0, 0), (4, 6)):
        odd = (
            (oracle.philox((j // 4, i, 1, 0), (key & ONES, key >> 32))[j % 4] >> 8) * 2 + 1 - 2**24
        )
        assert float(found[i, j]) == float(torch.tensor(float(odd), dtype=torch.float32) * step)


def test_the_distributions_are_what_they_say():
    flat = philox.uniform(3, 0, 500, 401, 2.0).double()
    assert (
        abs(flat.mean()) < 0.01
        and abs(flat.std() - 2 / math.sqrt(3)) < 0.01
        and flat.abs().max() > 1.999
    )
    bell = philox.normal(3, 0, 500, 401, 0.7).double()
    assert abs(bell.mean()) < 0.01 and abs(bell.std() - 0.7) < 0.01 and bell.isfinite().all()
    for width, share in ((0.7, 0.6827), (1.4, 0.9545)):
        assert abs((bell.abs() < width).double().mean() - share) < 0.01


def test_frozen_values():
    """These bits are in files. If this fails, adapters saved without their matrices can no longer
    be read.
    """
    assert philox.key_of(0, "layer", "A") == 0xA1A7707BB4CEDBF9
    assert [int(v) for v in philox.bits(0, 0, 1, 4)[0]] == list(KNOWN[0][2])
    assert [v.hex() for v in philox.uniform(7, 1, 2, 3, 0.25).flatten().tolist()] == [
        "-0x1.4512800000000p-9",
        "-0x1.50249a0000000p-3",
        "-0x1.829e240000000p-4",
        "-0x1.fe2cfa0000000p-3",
        "0x1.0e06f80000000p-5",
        "-0x1.6297ce0000000p-3",
    ]
    # The last bit of these may depend on the mathematics library, so they are never redrawn from a
    # seed.
    torch.testing.assert_close(
        philox.normal(7, 1, 1, 3, 0.25)[0],
        torch.tensor([-0.003108430188149214, -0.23683245480060577, -0.12309751659631729]),
    )


def test_the_default_dtype_and_device_do_not_matter():
    wanted = [
        philox.uniform(1, 0, 3, 5, 0.3),
        philox.normal(1, 0, 3, 5, 0.3),
        *peft_projections(4, 3, 7, 5),
    ]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        found = [
            philox.uniform(1, 0, 3, 5, 0.3),
            philox.normal(1, 0, 3, 5, 0.3),
            *peft_projections(4, 3, 7, 5),
        ]
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
        for draw in (philox.uniform, philox.normal):
            assert draw(1, 0, 3, 5, 0.3, "meta").dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_gives_the_same_bits():
    assert torch.equal(philox.bits(9, 1, 50, 33, "cuda").cpu(), philox.bits(9, 1, 50, 33))
    assert same_bits(
        philox.uniform(9, 1, 50, 33, 0.3, "cuda").cpu(), philox.uniform(9, 1, 50, 33, 0.3)
    )


def test_keys_of_different_parts_differ():
    parts = [
        (0, "a", "A"),
        (1, "a", "A"),
        (0, "b", "A"),
        (0, "a", "B"),
        (0, "aA", ""),
        ("0a", "", "A"),
    ]
    assert len({philox.key_of(*p) for p in parts}) == len(parts)


def test_pefts_matrices_are_those_that_the_installed_peft_draws():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Linear(11, 5))
    wrapped = peft.get_peft_model(
        model, peft.VeraConfig(r=3, target_modules=["0", "1"], projection_prng_key=17)
    )
    state = wrapped.base_model.model[0]
    A, B = peft_projections(17, 3, 11, 11)
    assert same_bits(state.vera_A["default"].float(), A) and same_bits(
        state.vera_B["default"].float(), B
    )
