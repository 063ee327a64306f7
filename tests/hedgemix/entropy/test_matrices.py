"""Matrices and vectors of integers come back from bytes that are near their entropy, on every machine the same."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hedgemix.entropy import gaussian_tables, matrices, rans, vectors
from hedgemix.entropy.rans import CoderError

SHAPES = [(12, 16), (12, 16), (5, 0), (20, 8)]
GOLDEN = """
361235003f1c3f010000270a2200a851360de23f219bf4d056199b8e431df717055a591930150ddb6adb385b089aeb97299b76db2bd819db8e39
e9cea20bf04a6a5e43ad1905c7742d3dad51736065c111f2d85f2da61be0f2e0e25efb879a7fbcf76a38fdd442a69b83ba051d0d14211705b778
bbaa6bcf5c2cc54f07af44c11205fed07ebf582a262612ccb204a71ff35f1361dcdf52a08b85decd7f6065e6b57d7d3693c39b4635d341cb5b96
8d322ab2989e9c550d8dd0d85252b0daedb2e869005a4bf67dcf311f5b83cfad3f46b65dff0d09d5b8623897e960c26135da626e89d059df3fca
3f804080803f3f00bf7fffff3f407f807f00ffbf00c0ff7fd0ffb700b91d3826bddb3be23be0f1e019c1e776e026fefc5ef4570916fd6947d846
e34f2034f70e90c52676ed11a9d1844256aa28116ec56a112911eeed6c4f26ec209c779ecbccda70
"""


def examples() -> list[np.ndarray]:
    """Gaussian integers without a random generator or a function of libm: the same on every machine."""
    state, found = 1, []
    for rows, columns in SHAPES:
        values = np.zeros((rows, columns), np.int32)
        for r in range(rows):
            for c in range(columns):
                total = 0
                for _ in range(6):
                    state = (1103515245 * state + 12345) % 2**31
                    total += (state >> 16) % (4 + r % 3 * 5 + c % 5)
                values[r, c] = total // 4 - (12 + 3 * (4 + r % 3 * 5 + c % 5)) // 4 + 3
        found.append(values)
    found[0][3, 4], found[1][0, 0] = 3000, -(2**20)
    return found


def steps() -> list[tuple[np.ndarray, np.ndarray]]:
    return [(-4 * np.arange(r, dtype=np.int8) % 3, -np.arange(c, dtype=np.int8) % 5) for r, c in SHAPES]


def gaussian(shapes: list[tuple[int, int]], deviation: float, spread: float, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [
        np.rint(
            generator.standard_normal((r, c))
            * deviation
            * np.exp(generator.normal(0, spread, (r, 1)) + generator.normal(0, spread, c))
        ).astype(np.int32)
        for r, c in shapes
    ]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(map(np.array_equal, found, expected))


MAGNITUDES = st.sampled_from([0, 1, 3, 60, 127, 128, 255, 2000, 2**20, 2**24])


@st.composite
def lists(draw: st.DrawFn) -> list[np.ndarray]:
    return [
        draw(
            arrays.arrays(
                draw(st.sampled_from([np.int8, np.int32, np.int64])) if magnitude < 128 else np.int32,
                draw(st.tuples(st.integers(0, 12), st.integers(0, 12))),
                elements=st.integers(-magnitude, magnitude),
                fill=st.just(0) if draw(st.booleans()) else st.nothing(),
            )
        )
        for magnitude in draw(st.lists(MAGNITUDES, max_size=4))
    ]


@settings(max_examples=80, deadline=None)
@given(lists())
def test_any_matrices_come_back(found: list[np.ndarray]) -> None:
    data = matrices.encode(found)
    back = matrices.decode(data, [matrix.shape for matrix in found])
    assert same(back, found)
    assert all(matrix.dtype == np.int32 for matrix in back)


@settings(max_examples=40, deadline=None)
@given(lists(), st.integers(-(2**15), 2**15), st.integers(0, 2**32))
def test_whatever_the_steps(found: list[np.ndarray], level: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    known = [tuple(level + generator.integers(-200, 200, n) for n in matrix.shape) for matrix in found]
    assert same(matrices.decode(matrices.encode(found, known), [matrix.shape for matrix in found], known), found)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from([0, 1, 40, 1000, 2**23]).flatmap(
            lambda most: st.lists(st.integers(-most, most), max_size=40).map(lambda values: np.array(values, np.int64))
        ),
        max_size=6,
    )
)
def test_any_vectors_come_back(found: list[np.ndarray]) -> None:
    assert same(vectors.decode(vectors.encode(found), [len(vector) for vector in found]), found)


@pytest.mark.parametrize("deviation", [0.0, 0.1, 0.5, 3.0, 16.0, 40.0, 5000.0, 1e6])
def test_matrices_of_any_width_come_back(deviation: float) -> None:
    found = gaussian([(150, 90), (150, 90), (1, 3000), (3000, 1)], deviation, 0.5)
    found = [np.clip(matrix, -(2**24), 2**24) for matrix in found]
    assert same(matrices.decode(matrices.encode(found), [matrix.shape for matrix in found]), found)


def test_more_lanes_than_a_last_row_needs() -> None:
    found = gaussian([(301, 257), (7, 3), (1, 1)], 2.0, 0.5)
    assert same(matrices.decode(matrices.encode(found), [matrix.shape for matrix in found]), found)


def test_the_bytes_never_change() -> None:
    assert matrices.encode(examples(), steps()).hex() == "".join(GOLDEN.split())
    assert same(matrices.decode(bytes.fromhex(GOLDEN), SHAPES, steps()), examples())


def test_zigzag_numbers_integers_by_magnitude() -> None:
    values = [0, -1, 1, -2, 2, -3, 3]
    assert (
        [gaussian_tables.zigzag(value) for value in values]
        == gaussian_tables.zigzag(np.array(values)).tolist()
        == list(range(7))
    )
    edges = np.array([0, -1, 1, -(2**24), 2**24, -(2**62), 2**62 - 1])
    assert gaussian_tables.unzigzag(gaussian_tables.zigzag(edges)).tolist() == edges.tolist()
    assert [gaussian_tables.unzigzag(gaussian_tables.zigzag(edge)) for edge in edges.tolist()] == edges.tolist()


def test_the_tables_never_change() -> None:
    counts = np.arange(gaussian_tables.TABLES * 256).reshape(-1, 256) % 977
    tables = gaussian_tables.frequencies(counts)
    assert (tables.sum(1) == 2**14).all() and tables.min() == 0
    content = (
        np.concatenate([gaussian_tables.prior(), gaussian_tables.frequencies(0 * counts), tables])
        .astype("<i8")
        .tobytes()
    )
    assert hashlib.sha256(content).hexdigest()[:16] == "f61c2b6da6650e35"


def test_tables_begin_as_gaussians() -> None:
    for width in (-8, 0, 8, 20, 32):
        deviation = 2 ** (width / 8)
        masses = gaussian_tables.prior()[width - gaussian_tables.NARROWEST] / 2**16
        for q in range(int(3 * deviation)):
            exact = (math.erf((q + 0.5) / deviation / 2**0.5) - math.erf((q - 0.5) / deviation / 2**0.5)) / 2
            assert (
                masses[gaussian_tables.CENTRE + q]
                == masses[gaussian_tables.CENTRE - q]
                == pytest.approx(exact, rel=0.03, abs=3e-3)
            )


@pytest.mark.parametrize("deviation", [0.3, 1.0, 3.0, 12.0, 60.0])
def test_near_the_entropy_of_a_gaussian(deviation: float) -> None:
    found = gaussian([(256, 256)], deviation, 0.0)
    values = np.arange(-600, 601)
    cells = np.diff([math.erf((q - 0.5) / deviation / 2**0.5) for q in (*values, 601)]) / 2
    entropy = -float((cells[cells > 0] * np.log2(cells[cells > 0])).sum()) * 256**2
    assert 8 * len(matrices.encode(found)) < 1.02 * entropy


def test_within_two_percent_of_its_own_model() -> None:
    for deviation in (0.7, 1.5, 6.0):
        found = gaussian([(256, 256)] * 3 + [(512, 128)], deviation, 0.5)
        data, parts = matrices.encode(found), matrices.sizes(found)
        assert [part.weights for part in parts] == [matrix.size for matrix in found]
        side = sum(part.side_bits for part in parts)
        assert 8 * len(data) < 1.02 * sum(part.ideal_bits for part in parts) + side
        charged = sum(part.coded_bits for part in parts) + side
        assert charged < 8 * len(data) < 1.002 * charged + 8 * 4 * len(found) + 8 * 4 * 32


def test_tables_learn_what_is_not_gaussian() -> None:
    generator = np.random.default_rng(0)
    found = [generator.choice([-12, 0, 12], (512, 512), p=[0.1, 0.8, 0.1]).astype(np.int32) for _ in range(4)]
    entropy = (0.8 * math.log2(1 / 0.8) + 0.2 * math.log2(10)) * 4 * 512**2
    assert 8 * len(matrices.encode(found)) < 1.05 * entropy  # as Gaussians they would take more than twice as many


def test_known_steps_save_the_widths() -> None:
    weights = np.random.default_rng(0).standard_normal((128, 128))
    known = [tuple(np.random.default_rng(k).integers(-12, 12, 128) for k in (1, 2))]
    found = [np.rint(4 * weights * np.exp2(-(known[0][0][:, None] + known[0][1]) / 8)).astype(np.int32)]
    alone, told = matrices.encode(found), matrices.encode(found, known)
    assert len(told) < len(alone) - 80


def test_vectors_that_are_alike_or_smooth_take_few_bytes() -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(-20, 20, 500)
    smooth = generator.integers(-1, 2, 500).cumsum() + 3000
    assert len(vectors.encode([noise, noise])) < len(vectors.encode([noise])) + 12
    assert len(vectors.encode([smooth])) < 500 * 1.75 / 8 + 12
    assert len(vectors.encode([np.full(1000, 77)])) < 12


def test_nothing_takes_next_to_nothing() -> None:
    assert matrices.decode(matrices.encode([]), []) == []
    zeros = np.zeros((512, 512), np.int32)
    data = matrices.encode([zeros] * 4)
    assert len(data) < 1000
    assert same(matrices.decode(data, [(512, 512)] * 4), [zeros] * 4)


def test_damaged_bytes_are_refused_or_give_other_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rans, "SYMBOLS_A_LANE", 16)  # more lanes are faster
    generator = np.random.default_rng(0)
    found = gaussian([(6, 9), (6, 9), (0, 3), (10, 5)], 40.0, 1.0)
    found[0][3, 4], found[1][0, 0], shapes = 3000, -(2**20), [matrix.shape for matrix in found]
    data, refused = matrices.encode(found), 0
    for trial in range(1500):
        altered = bytearray(data)
        for _ in range(generator.integers(1, 4)):
            altered[generator.integers(len(data) if trial % 2 else 40)] = generator.integers(256)
        if trial % 4 == 0:
            altered = altered[: generator.integers(len(altered))]
        elif trial % 4 == 1:
            altered += generator.bytes(generator.integers(5))
        try:
            back = matrices.decode(bytes(altered), shapes)
        except CoderError:
            refused += 1
            continue
        assert [matrix.shape for matrix in back] == shapes
    assert refused > 1400


def test_noise_is_refused_or_gives_integers() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        noise = generator.bytes(generator.integers(400))
        with pytest.raises(CoderError):
            vectors.decode(noise, [30, 0, 20])
        with pytest.raises(CoderError):
            matrices.decode(noise, [(20, 10), (3, 4)])


def test_other_shapes_are_refused() -> None:
    data = matrices.encode(examples())
    for shapes in (SHAPES[:-1], [*SHAPES, (3, 3)], [(8, 48), *SHAPES[1:]]):
        with pytest.raises(CoderError):
            matrices.decode(data, shapes)


def test_what_cannot_be_coded() -> None:
    with pytest.raises(ValueError, match="within"):
        matrices.encode([np.array([[2**24 + 1]])])
    with pytest.raises(ValueError, match="float64"):
        matrices.encode([np.ones((2, 2))])
    with pytest.raises(ValueError, match="steps"):
        matrices.encode([np.ones((2, 2), int)], [(np.zeros(2, int), np.zeros(3, int))])
    with pytest.raises(ValueError, match="within"):
        vectors.encode([np.array([2**23 + 1])])
