"""A text on the host gives what a tensor of it would, and sizes of tokens by decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hedgemix.data import bpb, device_text, tokenizer
from hedgemix.data.shards import TokenStream
from support.no_host_sync import unattended
from support.text_data import documents, processor

CPU = torch.device("cpu")
SPANS = [slice(0, 5), slice(1, 2), slice(0, 1), slice(3, 3), slice(7, 400), slice(350, 360), slice(400, 410), slice(9)]
TOKENS = np.concatenate(tokenizer.encode_batch(processor(), documents()[10:14]))[:400]


@pytest.mark.parametrize("tokens", [TOKENS, TokenStream([TOKENS[:7], TOKENS[7:]])], ids=["array", "stream"])
@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("resident", [None, True])
def test_slices_are_those_of_a_tensor(tokens: np.ndarray | TokenStream, span: slice, resident: bool | None) -> None:
    whole = torch.from_numpy(TOKENS.astype(np.int64))
    lengths = [len(tokenizer.decode(processor(), TOKENS[:stop])) for stop in range(1, len(TOKENS) + 1)]
    sizes_N = torch.tensor([0.0, *np.diff(lengths).tolist()])
    found = device_text.Text(tokens, CPU, resident)
    sizes = device_text.Sizes(found, bpb.byte_tables(processor()))
    assert found[span].dtype == torch.int64 and torch.equal(found[span], whole[span])
    assert sizes[span].dtype == torch.float32 and torch.equal(sizes[span], sizes_N[span])
    assert torch.equal(device_text.Ones(found)[span], torch.ones(len(whole))[span])
    assert len(found) == len(sizes) == 400


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: np.append(t, t[0]), lambda t: np.roll(t, 1)])
def test_another_text_is_not_the_same(change: object) -> None:
    assert device_text.same(TOKENS, TokenStream([TOKENS[:9], TOKENS[9:]]), piece_tokens=30)
    assert not device_text.same(TOKENS, TokenStream([change(TOKENS)]), piece_tokens=30)  # type: ignore[operator]
    last = TOKENS.copy()
    last[-1] ^= 1
    assert not device_text.same(TOKENS, TokenStream([last]), piece_tokens=30)


def test_a_resident_text_asks_the_host_for_nothing() -> None:
    found = device_text.Text(TOKENS, CPU, resident=True)
    whole = torch.from_numpy(TOKENS.astype(np.int64))
    assert len(found[0:1]) == 1  # here it is copied
    with unattended():
        slices = [found[span] for span in SPANS]
    assert all(torch.equal(mine, whole[span]) for mine, span in zip(slices, SPANS, strict=True))
    with pytest.raises(AssertionError, match="host"), unattended():
        device_text.Text(TOKENS, CPU)[0:1]
