"""Files that are wrong in their structure and right in their checksums, and what it takes to read them."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import zstandard

from hedgemix.artifact import format as artifact
from hedgemix.codec import text_codec

MOST_BYTES, MOST_SECONDS = 64 * 2**20, 2.0
"""What reading a file may take: memory above that of the process before, and processor time."""
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 4095, 2**16, 2**20, 2**26, 2**30, 2**31, 2**32, 2**53, 2**63, 10**40)
VALUES: tuple[Any, ...] = (*NUMBERS, 0.5, -1e308, 1e308, True, None, "", "x" * 99, [], [[]], {}, {"a": {}}, [1, 2, 3])


@dataclass(frozen=True)
class Taken:
    """What a read came to in a process of its own."""

    outcome: str
    """Name of the error, "" for none, "died: N" for a signal or an exit code."""
    more_bytes: int
    """Its most memory above what the process began with."""
    seconds: float
    """Of the processor."""


def taken(read: Callable[[], Any]) -> Taken:
    """Call `read` in a fork of this process, and measure it."""
    hear, tell = os.pipe()
    child = os.fork()
    if not child:
        outcome = "os._exit"
        try:
            signal.alarm(30)
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                read()
                outcome = ""
            except BaseException as error:  # also what a library in another language raises
                outcome = type(error).__name__
            more = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            os.write(tell, json.dumps([outcome, more, time.process_time() - began]).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with os.fdopen(hear, "rb") as file:
        said = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Taken(*json.loads(said)) if said and not status else Taken(f"died: {status}", 0, 0.0)


def mutate_artifact(content: bytes, random: Random) -> bytes:
    """Change one to three things of an artifact, and seal it again."""
    sections, lengths = take_apart(content)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(sections))
        how = random.randrange(6)
        if how == 0:
            sections[0] = repacked(sections[0], lzma_of, from_lzma, random)
            lengths[0] = len(from_lzma(sections[0]) or b"")
        elif how == 1:
            sections[at] = bent(sections[at], random)
        elif how == 2:
            sections[at] = sections[random.randrange(len(sections))]
        elif how == 3:
            lengths[at] = random.choice([*NUMBERS[:-2], lengths[at] * 2, lengths[at] * 50, len(sections[at]) * 60])
        elif how == 4:  # all that the limits allow, or more, of nothing
            size = random.choice([2**10, 2**18, 2**20, 2**22, 2**24])
            sections[at] = lzma_of(bytes(size)) if at < 2 else zstandard.compress(bytes(size))
            lengths[at] = size
        else:  # a tokenizer that is bent inside
            inside = bent(from_lzma(sections[1]) or b"", random)
            sections[1], lengths[1] = lzma_of(inside), len(inside)
    version = artifact.MEMORY_VERSION if len(sections) == 8 else artifact.VERSION
    numbers = [number % 2**64 for pair in zip(lengths, map(len, sections), strict=True) for number in pair]
    return sealed(artifact.PREFIX[version].pack(artifact.MAGIC, version, *numbers) + b"".join(sections))


def mutate_coded(content: bytes, random: Random) -> bytes:
    """Change one to three things of a coded text, and seal it again."""
    prefix = list(text_codec.PREFIX.unpack_from(content))
    rest = content[text_codec.PREFIX.size : -32]
    settings, words = rest[: prefix[-1]], rest[prefix[-1] :]
    for _ in range(random.randint(1, 3)):
        how = random.randrange(4)
        if how == 0:
            settings = repacked(settings, zlib.compress, inflated, random)
        elif how == 1:
            prefix[random.randrange(4, 8)] = random.choice(NUMBERS[:-2]) % 2**32
        elif how == 2:
            words = bent(words, random)
        else:
            settings = bent(settings, random)
    prefix[-1] = len(settings)
    return sealed(text_codec.PREFIX.pack(*prefix) + settings + words)


def take_apart(content: bytes) -> tuple[list[bytes], list[int]]:
    """An artifact's sections as stored, and the lengths that it declares."""
    version = struct.unpack_from("<I", content, 8)[0]
    _, _, *numbers = artifact.PREFIX[version].unpack_from(content)
    sections, start = [], artifact.PREFIX[version].size
    for stored in numbers[1::2]:
        sections.append(content[start : start + stored])
        start += stored
    return sections, list(numbers[::2])


def sealed(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def repacked(
    data: bytes, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes | None], random: Random
) -> bytes:
    """JSON with one value changed, compressed."""
    try:
        document = json.loads(unpack(data) or b"")
    except (ValueError, RecursionError):
        return data
    places = list(every_place(document))
    if not places:
        return data
    holder, key = random.choice(places)
    choice = random.randrange(5)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, list):
        holder.extend([holder[key]] * random.choice([1, 30, 5000]))
    elif choice == 2:
        return pack(json.dumps(document).replace("{", "[" * random.choice([1, 50_000]), 1).encode())
    else:
        holder[key] = random.choice(VALUES)
    return pack(json.dumps(document).encode())


def every_place(value: Any) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from every_place(value[key])


def bent(data: bytes, random: Random) -> bytes:
    """Bytes cut, doubled, set or flipped."""
    at, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    how = random.randrange(5)
    if how == 0:
        return data[:at] + data[end:]
    if how == 1:
        return data[:end] + data[at:]
    if how == 2:
        return data[:at] + bytes(min(end - at, 64)) + data[min(end, at + 64) :]
    if how == 3:
        return data + bytes(random.choice([1, 4, 4000]))
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 8]) if data else 0):
        changed[random.randrange(len(data))] = random.randrange(256)
    return bytes(changed)


def lzma_of(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_ALONE)


def from_lzma(data: bytes) -> bytes | None:
    try:
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE).decompress(data, 2**21)
    except lzma.LZMAError:
        return None


def inflated(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, 2**21)
    except zlib.error:
        return None
