"""What an evaluation tells of itself while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hedgemix.evaluate.scoring_order import Piece

if TYPE_CHECKING:
    from hedgemix.evaluate.evaluator import Evaluation


class Observer:
    """Watches an evaluation and changes nothing of it; this one looks away. Each method may raise to end the work."""

    def on_open(self, work: Evaluation, chunk: Piece) -> None:
        """Hear that the chunk's first rows are made next."""

    def on_rows(self, work: Evaluation, piece: Piece, rows: dict[str, Tensor]) -> None:
        """Hear that the piece is scored next, from the log rows (B, V) float32 of every row set and the
        probabilities (B, V) float32 of every expert over features."""

    def on_charge(self, work: Evaluation, piece: Piece, charges: dict[str, Tensor]) -> None:
        """Hear that the piece was scored: what its targets (B,) were charged, in nats, under each name of `nats`."""

    def on_close(self, work: Evaluation, chunk: Piece) -> None:
        """Hear that the chunk's last rows were scored."""

    def on_learn(self, work: Evaluation, chunk: Piece) -> None:
        """Hear that test-time training learns the chunk next."""

    def on_learned(self, work: Evaluation, chunk: Piece) -> None:
        """Hear that test-time training has learned the chunk."""
