"""Windows of one text found in another, against a plain search."""

from __future__ import annotations

import numpy as np
import pytest

from hedgemix.audit import contamination
from hedgemix.audit.contamination import SHORT_WINDOW, WINDOW
from hedgemix.data import overlap
from hedgemix.data.shards import TokenStream


def plain(windows: np.ndarray, shard: np.ndarray) -> list[bool]:
    places = range(len(shard) - WINDOW + 1)
    return [any((shard[at : at + WINDOW] == window).all() for at in places) for window in windows]


@pytest.mark.parametrize("alphabet", [2, 1024])
def test_windows_are_found_wherever_they_begin(monkeypatch: pytest.MonkeyPatch, alphabet: int) -> None:
    monkeypatch.setattr(overlap, "PIECE_TOKENS", 1024)
    generator = np.random.default_rng(alphabet)
    train = generator.integers(0, alphabet, 5003).astype(np.uint16)
    starts = [0, 1, 2, 3, 959, 960, 961, 1021, 1023, 1024, 4000, 5003 - WINDOW]
    windows = np.stack([train[start : start + WINDOW] for start in starts] + [train[70:134] ^ 1, train[500:564][::-1]])
    windows[-3, 5] ^= 1  # all but one token
    drawn = contamination.Windows(windows, np.zeros(len(windows), int))
    found = contamination.occurring(drawn, [train[:10], train])
    assert found.tolist() == plain(windows, train) and found.sum() == len(starts) - 1
    assert not contamination.occurring(drawn, [train[: WINDOW - 1]]).any()


def test_windows_are_drawn_from_all_over_each_shard() -> None:
    first, second = np.arange(5000, dtype=np.uint16), np.arange(6000, 6000 + WINDOW + 1, dtype=np.uint16)
    drawn = contamination.draw([first, first[:10], second], 50, 0)
    mine = drawn.tokens[drawn.shard == 0]
    assert mine.shape == (50, WINDOW) and (np.diff(mine, axis=1) == 1).all()
    assert mine[0, 0] < 100 and mine[-1, -1] > 4890
    assert set(drawn.tokens[drawn.shard == 2][:, 0]) == {6000, 6001} and not (drawn.shard == 1).any()
    assert len(contamination.occurring(contamination.draw([first[:5]], 9, 0), [first])) == 0


def test_documents_have_their_own_share() -> None:
    """Against a plain search; windows across two documents are none."""
    generator = np.random.default_rng(0)
    train = generator.integers(4, 300, 3000).astype(np.uint16)
    new = generator.integers(300, 500, 400).astype(np.uint16)
    parts = [train[50:90], new[:60], np.concatenate([train[200:240], new[60:100]]), new[100:105], train[700:720]]
    tokens = np.concatenate([part for each in parts for part in (np.array([1], np.uint16), each)])
    document, share = contamination.by_document(tokens, np.arange(500) == 1, TokenStream([train]))
    assert np.bincount(document)[1:].tolist() == [len(part) + 1 for part in parts]
    places = {train[at : at + SHORT_WINDOW].tobytes() for at in range(len(train))}
    for number, part in enumerate(parts, start=1):
        own = np.concatenate([[1], part]).astype(np.uint16)
        found = [own[at : at + SHORT_WINDOW].tobytes() in places for at in range(len(own) - SHORT_WINDOW + 1)]
        np.testing.assert_equal(share[number], np.mean(found) if found else np.nan)
    assert share[1] > 0.9 and share[2] == 0 and 0.3 < share[3] < 0.5
