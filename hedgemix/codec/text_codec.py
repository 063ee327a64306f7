"""Text to bits and back with an artifact: the score, paid out. A range coder driven by `predictor`.

The decoder has the artifact and the coded file, nothing else. Both sides take the same steps in the same order; for
their probabilities to be the same to the last bit, everything in `conditions` must be: code, PyTorch, processor, one
thread, number format. The file says what it was coded under, and is refused where that differs.

All integers are little-endian.

    offset  bytes  content
    0       8      magic 89 48 4D 43 0D 0A 1A 0A
    8       4      u32 format version, 1
    12      32     SHA-256 of the artifact's file
    44      32     SHA-256 of the text
    76      8      u64 bytes of the text
    84      8      u64 tokens coded, the first included
    92      8      u64 tokens of the text they begin (more when only its beginning is coded; schedules depend on it)
    100     4      u32 first token, which is not coded
    104     4      u32 bytes of the settings that follow
    108     ...    settings, zlib: JSON {"conditions": {...}, "evaluate": {...}}
    ...     ...    range-coded tokens, u32 words
    end-32  32     SHA-256 of everything before
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import constriction
import numpy as np
import torch

from hedgemix.artifact.format import Artifact, ArtifactError
from hedgemix.artifact.format import read as read_artifact
from hedgemix.artifact.load_model import load_model, load_tokenizer
from hedgemix.codec import bounds
from hedgemix.codec.predictor import Predictor
from hedgemix.config import EvaluateConfig, RecipeError, from_dict, to_dict
from hedgemix.data import tokenizer
from hedgemix.runtime import source_bundle
from hedgemix.runtime.files import Log, replacing, silent
from hedgemix.runtime.switches import SWITCHES

Categorical = constriction.stream.model.Categorical
RangeEncoder, RangeDecoder = constriction.stream.queue.RangeEncoder, constriction.stream.queue.RangeDecoder
MAGIC = b"\x89HMC\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sI32s32sQQQII")
LARGEST_SETTINGS = 2**16
FAILURES = (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError)
"""What settings that cannot work, or rows that are none, raise somewhere in libraries."""
LOG_EVERY_TOKENS = 256


class CodecError(ValueError):
    """Tells that a coded file is damaged, or that this artifact, or this machine, cannot decode it."""


@dataclass(frozen=True)
class Coded:
    """Holds a coded text."""

    data: bytes
    """The whole file."""
    payload_bits: int
    """Of the range-coded tokens alone."""
    ideal_bits: float
    """The sum of -log2 of the probabilities that drove the coder."""
    text_bytes: int
    tokens: int
    """Coded tokens, the first included."""


def settings_for(artifact: Artifact) -> EvaluateConfig:
    """Choose evaluation settings that suit an artifact of any size, in proportion to the context it was trained at
    (those of recipe laptop, for its artifacts). Others can be given; the coded file carries what was used."""
    context = load_model(artifact).context_tokens
    base = EvaluateConfig(
        window_tokens=context, overlap_tokens=context, segment_tokens=8 * context, chunk_tokens=32 * context,
        stride_tokens=max(1, context // 8), dtype="float32",
    )  # fmt: skip
    return from_dict(EvaluateConfig, {**to_dict(base), "ttt": {"batch_sequences": 8, "sequence_tokens": context}})


def conditions(config: EvaluateConfig) -> dict[str, Any]:
    """List what must be equal for two machines to compute the same probabilities to the last bit."""
    return {
        "hedgemix": source_bundle.digest("hedgemix.codec.predictor")[:16],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "constriction": metadata.version("constriction"),
        "device": "cpu",
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
        "dtype": config.dtype,
    }


def compress_tokens(
    artifact: Artifact, tokens_N: np.ndarray, config: EvaluateConfig, *, schedule_tokens: int = 0, log: Log = silent
) -> Coded:
    """Code integer tokens (N,), N >= 1; the first is written as it is. On one thread.

    schedule_tokens: length of the whole text when these tokens are only its beginning. Raises RecipeError for settings
    that do not fit the artifact, ValueError for tokens that it does not know.
    """
    processor = load_tokenizer(artifact)
    if not len(tokens_N) or tokens_N.min() < 0 or tokens_N.max() >= processor.vocab_size():
        raise ValueError(f"no tokens, or some outside 0..{processor.vocab_size() - 1}: not a text of this artifact")
    text = tokenizer.decode(processor, tokens_N.tolist())
    total, schedule = len(tokens_N), schedule_tokens or len(tokens_N)
    encoder, ideal_nats = RangeEncoder(), 0.0
    bounds.check(config, load_model(artifact).context_tokens, schedule)
    with one_thread():
        predictor = Predictor(artifact, schedule, int(tokens_N[0]), config, most_tokens=total)
        for token in _progress(tokens_N[1:].tolist(), total - 1, log):
            row_V = predictor.predict()
            encoder.encode(token, Categorical(row_V, perfect=False))
            ideal_nats -= math.log(row_V[token])
            predictor.update(token)
    words = np.asarray(encoder.get_compressed(), "<u4").tobytes()
    words += bytes(max(0, 4 * bounds.words_for(total) - len(words)))
    settings = {"conditions": conditions(config), "evaluate": to_dict(config)}
    packed = zlib.compress(json.dumps(settings, separators=(",", ":")).encode(), 9)
    digests = bytes.fromhex(artifact.sha256), hashlib.sha256(text).digest()
    prefix = PREFIX.pack(MAGIC, VERSION, *digests, len(text), total, schedule, int(tokens_N[0]), len(packed))
    content = prefix + packed + words
    data = content + hashlib.sha256(content).digest()
    return Coded(data, 8 * len(words), ideal_nats / math.log(2), len(text), total)


def decompress_tokens(artifact: Artifact, data: bytes, *, force: bool = False, log: Log = silent) -> np.ndarray:
    """Decode the tokens, uint16 (N,), that `compress_tokens` coded.

    force: try although the conditions differ; the text's checksum still decides. Raises CodecError, before any work,
    for a file that is cut or altered, of another artifact, or coded under other conditions; and after it when the text
    is not the one that was coded.
    """
    prefix, settings, words = _parse(data)
    _, _, artifact_sha256, text_sha256, text_bytes, total, schedule, first, _ = prefix
    if artifact_sha256.hex() != artifact.sha256:
        raise CodecError(
            f"coded with the artifact of sha256 {artifact_sha256.hex()[:16]}, this one has {artifact.sha256[:16]}; "
            "give the artifact it was coded with"
        )
    context_tokens = load_model(artifact).context_tokens
    try:
        config = from_dict(EvaluateConfig, settings["evaluate"])
        bounds.check(config, context_tokens, schedule)
    except RecipeError as error:
        raise CodecError(f"its settings cannot be used ({error}); code the text again") from None
    here, there = conditions(config), settings["conditions"]
    differ = [f"{name} {there.get(name)} (here {here[name]})" for name in here if here[name] != there.get(name)]
    if differ and not force:
        raise CodecError(
            f"coded under other conditions: {'; '.join(differ)}. Decode it where they are the same, or try with --force"
        )
    decoder = RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    tokens_N = np.zeros(total, np.uint16)
    tokens_N[0] = first
    spent_bits, most_bits = 0.0, 8 * len(words) + bounds.READ_AHEAD_BITS
    with one_thread():
        try:
            predictor = Predictor(artifact, schedule, first, config, most_tokens=total)
        except ArtifactError:
            raise
        except FAILURES as error:
            raise CodecError(f"its settings or its first token cannot be ({error}); code the text again") from None
        for at in _progress(range(1, total), total - 1, log):
            try:
                row_V = predictor.predict()
                token = int(decoder.decode(Categorical(row_V, perfect=False)))
                predictor.update(token)
            except FAILURES:
                raise CodecError(_lost(differ)) from None
            tokens_N[at] = token
            spent_bits += bounds.least_bits(float(row_V[token]))
            if not spent_bits <= most_bits:  # the words ended long ago
                raise CodecError(_lost(differ))
    text = tokenizer.decode(load_tokenizer(artifact), tokens_N.tolist())
    if len(text) != text_bytes or hashlib.sha256(text).digest() != text_sha256:
        raise CodecError(_lost(differ))
    return tokens_N


def compress(artifact_path: Path, text_path: Path, out: Path, config: EvaluateConfig | None, log: Log) -> Coded:
    """Code a UTF-8 text file. config None: `settings_for` the artifact. Raises CodecError for bytes that are not
    UTF-8, what `artifact.read` raises, and RecipeError as `compress_tokens` does."""
    artifact = read_artifact(artifact_path)
    try:
        text = text_path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CodecError(f"{text_path} is not UTF-8 at byte {error.start:,}; convert it (iconv) first") from None
    tokens = np.array(tokenizer.encode_exact(load_tokenizer(artifact), text))
    coded = compress_tokens(artifact, tokens, config or settings_for(artifact), log=log)
    with replacing(out) as file:
        file.write(coded.data)
    return coded


def decompress(artifact_path: Path, coded_path: Path, out: Path, force: bool, log: Log) -> int:
    """Write the text that `compress` coded, and return its bytes; raises as `decompress_tokens` does."""
    artifact = read_artifact(artifact_path)
    try:
        tokens = decompress_tokens(artifact, coded_path.read_bytes(), force=force, log=log)
    except CodecError as error:
        raise CodecError(f"{coded_path}: {error}") from None
    text = tokenizer.decode(load_tokenizer(artifact), tokens.tolist())
    with replacing(out) as file:
        file.write(text)
    return len(text)


def header_bytes(data: bytes) -> int:
    """Count the bytes of a coded file beside its range-coded tokens; raises CodecError as `decompress_tokens` does."""
    return len(data) - len(_parse(data)[2])


@contextmanager
def one_thread() -> Iterator[None]:
    """Work on one thread inside the block: sums are split among threads, and how they are split shows in their last
    bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parse(data: bytes) -> tuple[tuple[Any, ...], dict[str, Any], bytes]:
    """Prefix fields, settings and range-coded words; CodecError unless they are what was written."""
    if data[: len(MAGIC)] != MAGIC:
        raise CodecError("not a file that `hedgemix compress` wrote")
    if len(data) >= 12 and (version := struct.unpack_from("<I", data, 8)[0]) != VERSION:
        raise CodecError(f"format version {version}, this hedgemix reads {VERSION}; use the one that wrote it")
    if len(data) < PREFIX.size + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise CodecError("cut short or altered: its checksum does not match; copy it again from its source")
    prefix = PREFIX.unpack_from(data)
    *_, total, schedule, first, length = prefix
    rest = data[PREFIX.size : -32]
    try:
        unpacked = zlib.decompressobj().decompress(rest[:length], LARGEST_SETTINGS)
        settings = json.loads(unpacked)
        sound = all(isinstance(settings[name], dict) for name in ("conditions", "evaluate"))
        sound = sound and 1 <= total <= schedule < 2**31 and first < 2**16
    except (zlib.error, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CodecError(f"its settings cannot be read ({error}); code the text again") from None
    if not sound or len(rest) < length or (len(rest) - length) % 4:
        raise CodecError("its header contradicts itself; code the text again")
    if (len(rest) - length) // 4 < bounds.words_for(total):
        raise CodecError(f"it declares {total:,} tokens, more than its bytes can hold; code the text again")
    return prefix, settings, rest[length:]


def _lost(differ: list[str]) -> str:
    reason = f"under other conditions ({'; '.join(differ)})" if differ else "although all stated conditions are equal"
    return f"decoded to another text than was coded, {reason}; decode it on the machine that coded it"


def _progress(items: Any, total: int, log: Log) -> Iterator[Any]:
    began = time.monotonic()
    for done, item in enumerate(items):
        if done % LOG_EVERY_TOKENS == 0:
            log({"fraction": done / total, "elapsed_seconds": time.monotonic() - began})
        yield item


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
