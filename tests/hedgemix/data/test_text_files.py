from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import tempfile
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgemix.config import RecipeError
from hedgemix.data import text_files
from hedgemix.data.archive import ZstdFile
from hedgemix.data.reading import Reading


def pack(path: Path, content: bytes) -> None:
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    elif path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_kind_of_file_is_read_in_path_order(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "deep").mkdir()
    pack(tmp_path / f"a.txt{suffix}", "ünï\r\nsecond".encode())
    pack(tmp_path / f"b.jsonl{suffix}", "\n".join(json.dumps({"body": t}) for t in ("one", "\u2028", "zwei")).encode())
    pq.write_table(pa.table({"body": ["p", None, "q"], "n": [1, 2, 3]}), tmp_path / "c.parquet")
    pack(tmp_path / "deep" / f"d.md{suffix}", b"# deep")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = list(text_files.documents([tmp_path], "body"))
    assert found == ["ünï\r\nsecond", "one", "zwei", "p", "q", "# deep"]


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["wörd ", "line\n", "\n\n", "\r\n", "x" * 70_000, "\U0001f600" * 20_000]), max_size=12))
def test_long_files_are_split_without_losing_anything(parts: list[str]) -> None:
    content = "".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "book.txt"
        path.write_bytes(content.encode())
        found = list(text_files.documents([path]))
    if len(content.encode()) <= 64 * 1024:
        assert found == ([content] if content.strip() else [])
    else:
        assert "".join("".join(found).split()) == "".join(content.split())
        assert all(len(text.encode()) <= 64 * 1024 for text in found)


def test_a_book_is_cut_at_blank_lines(tmp_path: Path) -> None:
    content = "".join(f"Paragraph {n} of the book.\nIt has two lines.\n\n" for n in range(5000))
    (tmp_path / "book.txt").write_text(content)
    found = list(text_files.documents([tmp_path]))
    assert "".join(found) == content
    assert all(text.startswith("Paragraph") and text.endswith("\n\n") for text in found)
    assert all(16_000 < len(text) < 17_000 for text in found[:-1])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 at byte 3"),
        ("a.txt", b"abc\n\n" * 40_000 + b"\xff", r"a\.txt is not UTF-8 at byte 200000"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}', r"a\.jsonl:3 .*'text'.*data\.text_field"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\xff', r"a\.jsonl is not UTF-8 at byte 14"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1 holds a lone surrogate"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.zst", zstandard.compress(bytes(range(256)) * 1000)[:-20], r"a\.txt\.zst cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet cannot be read as parquet"),
        ("a.txt.gz", gzip.compress(b"text")[:-3], r"a\.txt\.gz cannot be read .*gzip -t"),
        ("a.txt.gz", b"", r"a\.txt\.gz cannot be read .*empty"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is UTF-16; convert it .iconv -f UTF-16"),
        ("a.doc", b"x", r"a\.doc cannot be read; .*\.txt"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=rf"data\.paths: .*{reason}"):
        list(text_files.documents([tmp_path / name]))


def test_parquet_columns_that_do_not_fit(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(RecipeError, match="has no column 'text', but n; set data.text_field"):
        list(text_files.documents([tmp_path]))
    with pytest.raises(RecipeError, match="is int64, not string"):
        list(text_files.documents([tmp_path], "n"))


def test_places_without_text(tmp_path: Path) -> None:
    for paths, reason in (([], "empty"), ([tmp_path / "none"], "does not exist"), ([tmp_path], "holds no file")):
        with pytest.raises(RecipeError, match=f"data.paths.*{reason}"):
            list(text_files.documents(paths))


def read(path: Path, field: str = "text") -> tuple[list[str], dict[str, int]]:
    reading = Reading()
    found = list(text_files.documents([path], field, reading))
    return found, {what: count for what, count in reading.passed_over.items() if count}


def test_what_a_folder_holds_is_read_or_counted(tmp_path: Path) -> None:
    """Links are followed once, hidden names, other kinds and links to nothing are not read."""
    root, other = tmp_path / "root", tmp_path / "other"
    for folder in (root / ".git", root / "inner" / ".ipynb_checkpoints", other):
        folder.mkdir(parents=True)
    for path in (root / ".git" / "a.txt", root / "inner" / ".ipynb_checkpoints" / "a.txt", root / "._x.parquet"):
        path.write_text("hidden")
    (root / "inner" / "b.txt").write_text("plain")
    (root / "inner" / "c.py").write_text("code")
    (other / "d.txt").write_text("behind a link")
    (root / "linked").symlink_to(other)
    (root / "inner" / "loop").symlink_to(root)
    (root / "e.txt").symlink_to(other / "d.txt")
    (root / "gone.txt").symlink_to(other / "gone")
    os.mkfifo(root / "pipe.txt")
    assert read(root) == (
        ["behind a link", "plain", "behind a link"],
        {
            "hidden files": 1,
            "hidden folders": 2,
            "files of other kinds": 2,
            "links to a folder that is read already": 1,
            "links that lead nowhere": 1,
        },
    )
    assert read(root / ".git" / "a.txt") == (["hidden"], {})  # a hidden name that somebody gave is read


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    scandir = os.scandir

    def refused(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(RecipeError, match="folder .*locked cannot be read .Permission denied."):
        read(tmp_path)


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/n\xfcr")
    Path(odd + ".txt").write_text("text")
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "t.parquet")
    os.rename(tmp_path / "t.parquet", odd + ".parquet")
    with open(odd + ".jsonl.zst", "wb") as file:
        file.write(zstandard.compress(b'{"text": "line"}'))
    assert sorted(read(tmp_path)[0]) == ["line", "row", "text"]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content", "expected", "passed_over"),
    [
        ("a.txt", MARK + "é".encode(), ["é"], {"byte order marks": 1}),
        ("a.txt", MARK, [], {"byte order marks": 1}),
        ("a.txt", b"", [], {}),
        ("a.jsonl", MARK + b'{"text": "a"}\r\n{"text": "b"}', ["a", "b"], {"byte order marks": 1}),
        ("a.jsonl", b'{"text": null}\n{"text": "b"}', ["b"], {"rows whose text is null": 1}),
        ("a.jsonl", b'{"text": " "}\n\n{"text": "b"}', ["b"], {"empty documents": 1}),
        ("a.txt.gz", gzip.compress(b"one ") + gzip.compress(b"two") + bytes(1000), ["one two"], {}),
        ("a.txt.gz", gzip.compress(MARK + b"one"), ["one"], {"byte order marks": 1}),
        ("a.txt.zst", zstandard.compress(b"one ") + zstandard.compress(b"two") + bytes(1000), ["one two"], {}),
    ],
)
def test_sound_files_of_odd_form(
    tmp_path: Path, name: str, content: bytes, expected: list[str], passed_over: dict[str, int]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == (expected, passed_over)


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
TEXT = bytes(range(5)) * 60_000
FRAME = zstandard.compress(TEXT)


@pytest.mark.parametrize(
    ("archive", "content"),
    [
        (FRAME, TEXT),
        (SKIPPABLE + FRAME + SKIPPABLE, TEXT),
        (FRAME + bytes(300_000), TEXT),
        (FRAME + bytes(7) + FRAME, TEXT + TEXT),
        (FRAME[:-2], "ends in the middle"),
        (FRAME + b"junk", "Unknown frame"),
    ],
)
def test_archives_of_zstandard(archive: bytes, content: bytes | str) -> None:
    if isinstance(content, bytes):
        assert io.BufferedReader(ZstdFile(io.BytesIO(archive))).read() == content
    else:
        with pytest.raises((OSError, EOFError), match=content):
            io.BufferedReader(ZstdFile(io.BytesIO(archive))).read()


TYPES = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_every_column_that_holds_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    values = ["é", None, "é", "x"] if "str" in str(inner) else ["é".encode(), None, "é".encode(), b"x"]
    column = pa.array(values, inner)
    column = column.dictionary_encode().cast(kind) if pa.types.is_dictionary(kind) else column
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path) == (["é", "é", "x"], {"rows whose text is null": 1})


def test_a_column_of_nulls_and_rows_that_are_not_utf_8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    assert read(tmp_path) == ([], {"rows whose text is null": 3})
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"fine", b"\xff"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"a\.parquet: row 2 of 'text' is not UTF-8"):
        read(tmp_path)


def test_the_first_ten_of_many_are_named(tmp_path: Path) -> None:
    rows = ['{"text": "fine"}', *["{"] * 3]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    for number in range(4):
        (tmp_path / f"b{number}.txt").write_bytes(b"\xff")
    with pytest.raises(RecipeError) as told:
        read(tmp_path)
    lines = str(told.value).splitlines()
    assert [line.split()[1].partition("/")[0] for line in lines] == [""] * 7 and "a.jsonl:4" in lines[2]
    (tmp_path / "a.jsonl").write_text("{\n" * 30)
    with pytest.raises(RecipeError) as told:
        read(tmp_path)
    assert len(str(told.value).splitlines()) == 11 and "the first 10" in str(told.value)
    with pytest.raises(RecipeError, match="(?s)none.txt does not exist.*empty name.*x.doc cannot be read"):
        (tmp_path / "x.doc").write_text("x")
        list(text_files.documents([tmp_path / "none.txt", "", tmp_path / "x.doc"]))


@pytest.mark.parametrize(
    ("unit", "ends"),
    [("wörter und ", lambda a, b: a[-1].isspace()), ("字　", lambda a, b: a[-1].isspace()),
     ("e\u0301\u0323", lambda a, b: not unicodedata.combining(b[0])),
     ("\U0001f469\u200d\U0001f467", lambda a, b: b[0] == "\U0001f469"), ("字", lambda a, b: True)],
)  # fmt: skip
def test_text_without_line_breaks_is_cut_where_it_hurts_least(tmp_path: Path, unit: str, ends: object) -> None:
    content = "x" + unit * (200_000 // len(unit.encode()))
    (tmp_path / "a.txt").write_text(content)
    found, _ = read(tmp_path)
    assert "".join(found) == content and len(found) > 3
    assert all(ends(a, b) for a, b in itertools.pairwise(found))  # type: ignore[operator]
    assert all(len(part.encode()) <= 64 * 1024 for part in found)
