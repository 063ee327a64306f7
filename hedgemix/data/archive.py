"""Zstandard archives as files: several frames, and zeros behind the last, as gzip's reader takes them."""

from __future__ import annotations

import io
from typing import IO, Any

import zstandard

READ_BYTES = 1 << 17


class ZstdFile(io.RawIOBase):
    """Reads what an archive holds. Raises EOFError where it ends too early, OSError where it is damaged."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed, self._content, self._frame = packed, memoryview(b""), self._new_frame()
        self._begun = False  # the frame

    def readable(self) -> bool:
        """Say that it is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as it goes; 0 at the end."""
        while not self._content:
            block = (self._frame.unused_data if self._frame.eof else b"") or self._packed.read(READ_BYTES)
            if self._frame.eof:
                self._frame, self._begun = self._new_frame(), False
            if not self._begun:
                block = self._behind_zeros(block)
            if not block:
                if self._begun:
                    raise EOFError("it ends in the middle")
                return 0
            self._begun = True
            try:
                self._content = memoryview(self._frame.decompress(block))
            except zstandard.ZstdError as error:
                raise OSError(str(error)) from None
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def _behind_zeros(self, block: bytes) -> bytes:
        """The block without zeros at its front, or the next that holds anything else."""
        while block and not (block := block.lstrip(b"\0")):
            block = self._packed.read(READ_BYTES)
        return block

    @staticmethod
    def _new_frame() -> Any:
        return zstandard.ZstdDecompressor().decompressobj()
