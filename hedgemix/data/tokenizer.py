"""SentencePiece BPE with an exact round trip: training, loading, encoding and decoding.

Notable: SentencePiece writes a space as U+2581 and so reads a literal U+2581 back as a space. Here the literal one is
always written as its three byte tokens, and decoding puts the bytes together from the pieces itself. So are literal
markers where the tokenizer has markers for capitals (see `case_markers`), which its pieces tell.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from hedgemix.config import RecipeError
from hedgemix.data import case_markers
from hedgemix.runtime.files import replacing

SPACE = "\u2581"
SAMPLE_BYTES = 10_000_000
SMALLEST = 300  # pieces
SENTENCE_CHARACTERS = 4096  # BPE training aborts the process on a word of more than 65,535 characters
BYTES_AND_CONTROLS = 260
COVERAGE = 0.999
UNTRAINABLE = "\x00\t\u2585" + SPACE  # SentencePiece's own marks; it skips any sentence with U+2585


def train(documents: Iterable[str], vocab_size: int, path: str | Path, markers: bool = False) -> SentencePieceProcessor:
    """Train a BPE tokenizer of exactly `vocab_size` pieces on the first 10 MB of `documents` and write it to `path`.

    The order of documents is the sample: `corpus.collect` gives one that only contents decide. The same documents give
    the same file. Ids 0 to 3 are pad, bos, eos, unk, with `markers` 4 to 6 those for capitals; 256 byte tokens stand
    for the characters that get no piece. Raises RecipeError when the vocabulary is too small for that or too large for
    the text.
    """
    if not SMALLEST <= vocab_size <= 65536:
        raise RecipeError(
            f"data.vocab_size is {vocab_size}; set it from {SMALLEST} (256 are bytes) to 65536 (16-bit tokens)"
        )
    sample = list(_sample(documents))
    trained = partial(
        _trained, [case_markers.mark(text, begins=True) for text in sample] if markers else sample, markers
    )
    try:
        model = trained(vocab_size)
    except RuntimeError as error:
        size, fitting = sum(len(text.encode()) for text in sample), _fitting(trained, error)
        fix = f"lower data.vocab_size to {fitting} or read more text" if fitting else "read more text"
        raise RecipeError(
            f"data.vocab_size {vocab_size} does not suit the {size:,} bytes of training text ({_reason(error)}); {fix}"
        ) from None
    with replacing(Path(path)) as file:
        file.write(model)
    return load(model)


def _trained(sample: Sequence[str], markers: bool, vocab_size: int) -> bytes:
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_only_common(sample, (vocab_size - BYTES_AND_CONTROLS) // 2)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(case_markers.MARKERS) if markers else [],
        required_chars=SPACE if markers else "",
        add_dummy_prefix=not markers,  # or it would stand in front of the marker: `encode_batch` has one behind it
        split_by_whitespace=True,
        split_digits=True,
        character_coverage=1.0,
        max_sentence_length=1 << 30,
        num_threads=1,
        minloglevel=3,
    )
    return model.getvalue()


def _fitting(trained: Callable[[int], bytes], error: RuntimeError) -> int:
    """The largest vocabulary that the error names and that can be trained, 0 without one. A smaller one has fewer
    characters, so that what is named for one size need not be there for it."""
    last = 65537
    while (named := re.search(r"<= (\d+)", str(error))) and SMALLEST <= int(named[1]) < last:
        last = int(named[1])
        try:
            trained(last)
            return last
        except RuntimeError as again:
            error = again
    return 0


def load(source: str | Path | bytes) -> SentencePieceProcessor:
    """Load the processor of a SentencePiece model, given its file or its bytes.

    Raises RecipeError when it is not one.
    """
    name = "the tokenizer" if isinstance(source, bytes) else str(source)
    try:
        model = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise RecipeError(
            f"data.tokenizer: {name} cannot be read ({error.strerror}); name a .model file, or fetch the official one "
            "with `hedgemix download`"
        ) from None
    try:
        processor = SentencePieceProcessor(model_proto=model) if model else None
    except RuntimeError:
        processor = None
    if processor is None:
        digest = hashlib.sha256(model).hexdigest()[:12]
        raise RecipeError(
            f"data.tokenizer: {name} ({len(model)} bytes, sha256 {digest}...) is not a SentencePiece model; "
            "name the .model file the shards were made with"
        )
    return processor


def encode(processor: SentencePieceProcessor, text: str) -> list[int]:
    """Tokenize one document, beginning with BOS. `decode` gives the text back, whatever it holds.

    That holds for tokenizers made by `train`; one that normalises text (the official one does: nmt_nfkc) gives back
    the normalised text. Raises UnicodeEncodeError for text with lone surrogates.
    """
    return encode_batch(processor, [text])[0].tolist()


def encode_exact(processor: SentencePieceProcessor, text: str) -> list[int]:
    """Tokenize a text so that `decode` gives exactly it, beginning with BOS, also where the tokenizer would normalise
    it: what it would change is written in byte tokens. Raises RecipeError when it cannot write this text so."""
    tokens = encode(processor, text)
    if decode(processor, tokens) != text.encode():
        odd = "".join(c for c in sorted(set(text)) if _literal(processor, c) is None)
        # Between odd characters the text keeps its usual pieces; of several spaces only the last begins a word.
        parts = re.split(f"([{re.escape(odd)}])|( (?= ))" if odd else "( (?= ))", text)
        tokens = [processor.bos_id()]
        for part in filter(None, parts):
            tokens += _exact(processor, part, first=len(tokens) == 1)
        if decode(processor, tokens) != text.encode():  # capitals of a part went on into the next
            tokens[1:] = _bytes(processor, text)
        if decode(processor, tokens) != text.encode():
            raise RecipeError("this tokenizer cannot write the text exactly: it has no byte tokens")
    return tokens


def encode_batch(processor: SentencePieceProcessor, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
    """Tokenize each document: uint16 arrays (n,), each beginning with BOS; what `encode` gives, but fast."""
    markers = tuple(case_markers.of(processor).values())
    ready = [case_markers.mark(text, markers, begins=True) for text in texts]
    arrays = processor.encode(ready, return_type="numpy", add_bos=True, num_threads=threads)
    encoded = [array.astype(np.uint16) for array in arrays]
    for index, text in enumerate(texts):
        if any(character in text for character in (SPACE, *markers)):
            encoded[index] = np.array(_encode_literal(processor, text, markers), dtype=np.uint16)
    return encoded


def decode(processor: SentencePieceProcessor, tokens: Iterable[int]) -> bytes:
    """Give the UTF-8 bytes of tokens; control, unknown and unused tokens and markers stand for none, and a space right
    after one of the first three is the prefix that `encode` put there. Any run of tokens can be decoded, also one that
    cuts a character in two; what a marker is about ends at a token that is no text."""
    text, after_control = bytearray(), False
    start, marker, escaped = 0, "", False
    markers = case_markers.of(processor)
    pieces: dict[int, bytes | None] = {token: None for token in markers}
    for token in map(int, tokens):
        if token not in pieces:
            pieces[token] = _piece_bytes(processor, token)
        piece = markers[token].encode() if escaped and token in markers else pieces[token]
        escaped = piece is None and markers.get(token) == case_markers.ESCAPE
        if piece is None:
            case_markers.restore(text, start, marker)
            start, marker = len(text), markers.get(token, "")
            after_control |= not marker
            continue
        drop = after_control and piece.startswith(b" ") and not processor.is_byte(token)
        text += piece[1:] if drop else piece
        after_control = False
    case_markers.restore(text, start, marker)
    return bytes(text)


def _exact(processor: SentencePieceProcessor, text: str, first: bool = False) -> list[int]:
    """Tokens of a part; a space right behind BOS would be taken for a prefix, so there it is a byte token."""
    tokens = None if first and text.startswith(" ") else _literal(processor, text)
    if tokens is not None:
        return tokens
    if len(text) == 1:
        return _bytes(processor, text)
    half = 1 if first else len(text) // 2
    return _exact(processor, text[:half], first) + _exact(processor, text[half:])


def _literal(processor: SentencePieceProcessor, text: str) -> list[int] | None:
    """Tokens of a text inside another one, None when they would not say exactly it."""
    # Between two NULs, which no piece holds, neither prefix nor strip touches the text.
    marked = case_markers.mark(text, case_markers.of(processor).values())
    tokens = _behind_nul(processor, f"{marked}\x00")[:-1]
    return tokens if decode(processor, tokens) == text.encode() else None


def _piece_bytes(processor: SentencePieceProcessor, token: int) -> bytes | None:
    if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
        return None
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
        return bytes([int(piece[3:-1], 16)])  # <0x41>
    return piece.replace(SPACE, " ").encode()


def _encode_literal(processor: SentencePieceProcessor, text: str, markers: Sequence[str]) -> list[int]:
    # Between literal U+2581 the text is encoded behind a NUL: that keeps the prefix space away from it, and since no
    # piece holds a NUL, what follows is encoded as if the text began there.
    literal = SPACE if case_markers.ESCAPE in markers else "".join((SPACE, *markers))
    first, *others = re.split(f"([{literal}])", text)
    tokens = [processor.bos_id(), *processor.encode(case_markers.mark(first, markers, begins=True))]
    for character, part in zip(others[::2], others[1::2], strict=True):
        tokens += _bytes(processor, character) + _behind_nul(processor, case_markers.mark(part, markers))
    return tokens


def _behind_nul(processor: SentencePieceProcessor, text: str) -> list[int]:
    return processor.encode(f"\x00{text}")[len(processor.encode("\x00")) :]


def _bytes(processor: SentencePieceProcessor, text: str) -> list[int]:
    return [processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def _sample(documents: Iterable[str]) -> Iterator[str]:
    left = SAMPLE_BYTES
    for document in documents:
        for start in range(0, len(document), SENTENCE_CHARACTERS):
            sentence = document[start : start + SENTENCE_CHARACTERS]
            left -= len(sentence.encode())
            if left < 0:
                return
            yield sentence


def _only_common(sentences: Sequence[str], most: int) -> list[str]:
    """The sentences with a tab, which no piece can hold, for each character that is to be written in byte tokens.

    SentencePiece's own character coverage cannot go below 0.98, which asks for thousands of pieces in Chinese.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    before = accumulate((count for _, count in counts.most_common(most)), initial=0)
    common = {
        character
        for (character, _), covered in zip(counts.most_common(most), before, strict=False)
        if covered < COVERAGE * counts.total() and character not in UNTRAINABLE
    }
    rare = str.maketrans({character: "\t" for character in counts if character not in common})
    return [sentence.translate(rare) for sentence in sentences]


def _reason(error: RuntimeError) -> str:
    # "INTERNAL: src/trainer_interface.cc(744) [condition] reason"
    return str(error).partition("] ")[2].strip() or "SentencePiece found nothing to train on"
