"""How a section of an artifact is compressed, and read back strictly: to its declared length, and not a byte more."""

from __future__ import annotations

import lzma
from pathlib import Path

import zstandard

from hedgemix.data.memory import Memory, MemoryTextError, decompress

LARGEST_SECTION = 2**30
LARGEST = {"document": 2**20, "tokenizer": 2**22}
"""Most bytes of the sections that are read as a whole before anything else is known."""
FREE_BYTES, BYTES_A_BYTE = 2**20, 64
"""Most bytes of another section: so many, and for each byte as stored. Weights never come near, and a file of a few
bytes cannot ask for all memory."""
DECLARED_DICTIONARY, LARGEST_DICTIONARY = 2**26, 2**27
"""Of LZMA: what `to_lzma` writes, and the most that is read."""


class ArtifactError(ValueError):
    """Tells that a file is no sound artifact, or that contents cannot become one; the message names it and the fix."""


def check_length(path: Path, name: str, length: int, stored: int) -> None:
    """Check what a section declares; raises ArtifactError where it is more than its bytes can be meant to hold."""
    if max(length, stored) > min(LARGEST_SECTION, LARGEST.get(name, FREE_BYTES + BYTES_A_BYTE * stored)):
        raise ArtifactError(f"{path} declares {length:,} bytes of {name} in {stored:,}: more than the format allows; "
                            "it is damaged, copy it again")  # fmt: skip


def to_lzma(data: bytes) -> bytes:
    """Compress by LZMA. A window as long as the data finds what a longer one would, in a tenth of the time; the header
    says the preset's."""
    size = 1 << max(16, (len(data) - 1).bit_length())
    window = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(size, DECLARED_DICTIONARY)}
    packed = lzma.compress(data, format=lzma.FORMAT_ALONE, filters=[window])
    return packed[:1] + DECLARED_DICTIONARY.to_bytes(4, "little") + packed[5:]


def to_zstd(data: bytes, level: int) -> bytes:
    """Compress to the shorter of zstd at this level and of plain Huffman coding; nothing stays nothing."""
    if not data:
        return b""
    huffman = zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, chain_log=6, search_log=1, window_log=17
    )
    compressors = zstandard.ZstdCompressor(level=level), zstandard.ZstdCompressor(compression_params=huffman)
    return min((compressor.compress(data) for compressor in compressors), key=len)


def from_lzma(path: Path, data: bytes, length: int) -> bytes:
    """Give back what `to_lzma` had; raises ArtifactError unless it has `length` bytes."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LARGEST_DICTIONARY)
    try:
        plain = decoder.decompress(data, max_length=length + 1)  # stops there, whatever the stream would go on to
    except lzma.LZMAError as error:
        raise ArtifactError(f"{path}: a section cannot be decompressed ({error}); write the artifact again") from None
    if len(plain) != length or not decoder.eof or decoder.unused_data:
        raise ArtifactError(f"{path}: a section has not its declared length; write the artifact again")
    return plain


def from_zstd(path: Path, data: bytes, length: int) -> bytes:
    """Give back what `to_zstd` had; raises ArtifactError unless it has `length` bytes."""
    if not length and not data:
        return b""
    try:
        # zstandard allocates what the frame declares and then ignores max_output_size, so look first.
        if not length or zstandard.frame_content_size(data) != length:
            raise ArtifactError(f"{path}: a section has not its declared length; write the artifact again")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactError(f"{path}: a section cannot be decompressed ({error}); write the artifact again") from None


def from_ppmd(path: Path, data: bytes, length: int) -> tuple[str, ...]:
    """Give back the documents of a memory; raises ArtifactError unless their text has `length` bytes."""
    try:
        return tuple(decompress(Memory(length, data)))
    except MemoryTextError as error:
        raise ArtifactError(f"{path}: its memory is damaged: {error}; write the artifact again") from None
