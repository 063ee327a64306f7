"""Where the bits of a score went: by token of the vocabulary, and by document.

Kept beside the sums that are the score, from the same numbers. A control token (BOS) begins a document; what comes
before the first is document 0, as the document is whose BOS is the text's first token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hedgemix.runtime.files import replacing

TOKENS, DOCUMENTS = "tokens.jsonl", "documents.jsonl"


class Tally:
    """Holds sums of nats under every name of `names`, float64: `token_CV`, `document_CD`; C counts names, then what is
    in `counted`. D grows with the text."""

    counted = ("tokens", "bytes")

    def __init__(self, names: Sequence[str], vocab_size: int, is_control: np.ndarray) -> None:
        self.names, self.is_control = tuple(names), is_control
        columns = len(self.names) + len(self.counted)
        self.token_CV = np.zeros((columns, vocab_size))
        self.document_CD = np.zeros((columns, 1))
        self.last = 0
        """The document at work."""

    def add(self, tokens_B: np.ndarray, bytes_B: np.ndarray, nats_SB: np.ndarray) -> None:
        """Scored tokens, in the text's order: integers (B,), their bytes (B,), and what each was charged, (S, B)."""
        document_B = self.last + np.cumsum(self.is_control[tokens_B])
        self.last = int(document_B[-1])
        grown = self.last + 1 - self.document_CD.shape[1]
        self.document_CD = np.pad(self.document_CD, ((0, 0), (0, max(grown, 0))))
        for column, weights_B in enumerate((*nats_SB, np.ones(len(tokens_B)), bytes_B)):
            self.token_CV[column] += np.bincount(tokens_B, weights_B, self.token_CV.shape[1])
            self.document_CD[column] += np.bincount(document_B, weights_B, self.document_CD.shape[1])

    def state_dict(self) -> dict[str, Any]:
        """Copy the sums and the number of the last document."""
        return {
            "token": torch.from_numpy(self.token_CV.copy()),
            "document": torch.from_numpy(self.document_CD.copy()),
            "last": self.last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.token_CV, self.document_CD = state["token"].cpu().numpy(), state["document"].cpu().numpy()
        self.last = state["last"]

    def write(self, folder: Path) -> None:
        """Write tokens.jsonl and documents.jsonl, whole: a line a token that occurred, a line a document, with its
        tokens, bytes and bits."""
        for name, key, sums_CN in ((TOKENS, "token", self.token_CV), (DOCUMENTS, "document", self.document_CD)):
            with replacing(folder / name) as file:
                for number, sums_C in enumerate(sums_CN.T):
                    bits = {stage: nats / math.log(2) for stage, nats in zip(self.names, sums_C, strict=False)}
                    tokens, n_bytes = map(int, sums_C[-2:])
                    if tokens:
                        line = {key: number, "tokens": tokens, "bytes": n_bytes, "bits": bits}
                        file.write(json.dumps(line).encode() + b"\n")
