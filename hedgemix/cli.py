"""The `hedgemix` command: what comes before a run and after, and text coded with an artifact. Bad input is one line on
stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hedgemix import options
from hedgemix.artifact import inspection
from hedgemix.artifact.format import ArtifactError
from hedgemix.audit import auditor, external_scorer
from hedgemix.codec import text_codec
from hedgemix.codec.text_codec import CodecError
from hedgemix.config import DataConfig, EvaluateConfig, RecipeError, from_dict
from hedgemix.data import dataset, fineweb
from hedgemix.runtime.files import Log, check_new, read_json, told
from hedgemix.runtime.surroundings import settle
from hedgemix.validate import check_read


@dataclass(frozen=True)
class Download:
    """Fetch the official FineWeb shards and their tokenizer."""

    folder: Path
    """Where to; files that are there and whole are kept."""
    train_shards: int = 10
    """Training shards of 100 M tokens (200 MB) each."""
    variant: str = "sp1024"
    """The tokenizer the shards were made with: sp and its vocabulary size, as sp8192, and what follows it in names."""
    repo: str = ""
    """Dataset repository on the hub (default: the one known for the variant, or the official one)."""


@dataclass(frozen=True)
class Prepare:
    """Tokenize text, or check shards, and write down what they are (dataset.json)."""

    folder: Path
    """Where dataset.json goes, and for docs and text the tokenizer and the shards."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Compress:
    """Code a text with an artifact: the bits of its score, as a file."""

    artifact: tyro.conf.Positional[Path]
    """The artifact (.hmx) that a run made."""
    text: tyro.conf.Positional[Path]
    """A UTF-8 file."""
    out: tyro.conf.Positional[Path]
    """The coded file."""
    recipe: Path | None = None
    """Evaluation settings from a recipe.json (a run keeps its own under _records/); by default they follow the
    artifact's context. The coded file carries them."""


@dataclass(frozen=True)
class Decompress:
    """Get the text back from an artifact and a coded file."""

    artifact: tyro.conf.Positional[Path]
    """The artifact the file was coded with."""
    coded: tyro.conf.Positional[Path]
    """What `hedgemix compress` wrote."""
    text: tyro.conf.Positional[Path]
    """Where the text goes."""
    force: bool = False
    """Try although the file was coded under other conditions; a wrong text is still refused."""


@dataclass(frozen=True)
class Inspect:
    """Show where the bytes of an artifact go: by section and by tensor, with bits a weight and steps."""

    artifact: tyro.conf.Positional[Path]
    """The artifact (.hmx) that a run made."""


@dataclass(frozen=True)
class Audit:
    """Derive the score of a finished run again and check every rule it has to keep; or audit another scorer.

    `hedgemix audit RUN` writes its findings beside the run and into its table; `hedgemix audit --scorer module:object
    --tokens FILE` prints a report. Exit code 0: every check passed, 1: one failed, 2: it could not be audited.
    """

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """The record's parquet file, which the record prints as its table."""
    seeds: tuple[int, ...] = ()
    """Of RUN: which rows (default: all that are done)."""
    claim: Literal["final", "published"] = "final"
    """Of RUN: which number is taken for the score. The published rule's is none, and fails."""
    first_tokens: int = 0
    """Of RUN: audit this many tokens from the start, rounded up to whole chunks (0: all)."""
    streamed_tokens: int = 131_072
    """Of RUN: most tokens whose rows are committed before they are told; of a longer text the first, the last and drawn
    pieces."""
    coded_tokens: int = 1024
    """Of RUN: most tokens from the start that are really compressed and decompressed."""
    tolerance: float = 1e-6
    """Of RUN: largest relative difference of bits from another machine's, or another number of ranks'."""
    draws: int = 64
    """With --scorer: positions at which predict() is asked twice."""
    cuts: int = 32
    """With --whole-text: positions from which on a new process of the scorer is given other tokens."""
    windows: int = 1000
    """Of RUN: windows of each validation shard looked for in the training text."""
    draw_seed: int | None = None
    """Draw what an earlier audit drew, which printed its seed (default: from the system's randomness; only such an
    audit sets `audited`)."""
    scorer: str = ""
    """module:object, a callable that makes a scorer (docs/audit.md), instead of RUN. It is told each token once its row
    is there."""
    whole_text: bool = False
    """With --scorer: give it the whole text at once. What is found then is weaker, and says so."""
    files: tuple[Path, ...] = ()
    """With --scorer: files that it may read beside code."""
    tokens: Path | None = None
    """With --scorer: the text, a shard (.bin) or a NumPy file of integers (.npy)."""
    report: Path | None = None
    """With --scorer: write the report there (default: print it)."""


Commands = dict[type, Callable[[Any], None]]
"""What carries out a command, by the dataclass of its options."""


def main(commands: Commands | None = None) -> None:
    """Run the command line, of these commands or the library's own; exits with 2 after a user's mistake."""
    if code := options.run(lambda: _main(sys.argv[1:], commands or COMMANDS)):
        sys.exit(code)


def _main(arguments: list[str], commands: Commands) -> int:
    try:
        settle()
        options.check_arguments(arguments)
        command = _parse(arguments, {kind.__name__.lower(): kind for kind in commands})
        commands[type(command)](command)
        return 0
    except (RecipeError, ArtifactError, CodecError) as mistake:
        error = str(mistake)
    except OSError as failure:
        if isinstance(failure, BrokenPipeError) and options.output_is_unread():
            return options.READER_GONE
        error = told(failure)
    except ModuleNotFoundError as missing:
        if not missing.name or missing.name.partition(".")[0] in ("hedgemix", "pipeline"):
            raise
        error = f"the package {missing.name} is not installed; install it (pip install {missing.name})"
    print(f"error: {error}", file=sys.stderr)
    return 2


def _parse(arguments: list[str], kinds: dict[str, type]) -> Any:
    """The options of the command named first. Raises RecipeError."""
    if arguments and arguments[0] in kinds:
        return options.parse(kinds[arguments[0]], arguments[1:], f"hedgemix {arguments[0]}")
    if arguments and not arguments[0].startswith("-"):
        meant = options.nearest(arguments[0], list(kinds))
        raise RecipeError(f"there is no command {arguments[0]}{meant or '; choose one of ' + ', '.join(kinds)}")
    if not {"-h", "--help"} & set(arguments):
        raise RecipeError(f"name a command first: {', '.join(kinds)}; hedgemix --help tells of each")
    either: Any = Union[tuple(kinds.values())]  # noqa: UP007
    return tyro.cli(either, args=arguments, prog="hedgemix", description=__doc__)


def _download(command: Download) -> None:
    fineweb.download(command.folder, command.train_shards, command.variant, command.repo)
    size = command.variant.removeprefix("sp").partition("_")[0]
    print(f"use it with: --data.source shards --data.shards-dir {command.folder} --data.vocab-size {size}")


def _prepare(command: Prepare) -> None:
    check_read(command.data, DataConfig())
    made = dataset.prepare(command.data, command.folder)
    dataset.save(made, command.folder)
    table = Table("", "training", "validation", title=f"{made.source} in {command.folder}", title_justify="left")
    train_documents = f"{made.train_documents:,}" if made.train_documents else "not counted"
    table.add_row("documents", train_documents, f"{made.valid_documents:,}")
    table.add_row("tokens", f"{made.train_tokens:,}", f"{made.valid_tokens:,}")
    table.add_row("bytes of text", f"{made.train_bytes:,}" if made.train_bytes else "", f"{made.valid_bytes:,}")
    table.add_row("bytes left out", f"{made.train_bytes_removed:,}", "")
    table.add_row(f"windows of {made.overlap_window} in training", "", f"{made.valid_overlap_share:.3%}")
    table.add_row("bytes per token", "", f"{made.valid_bytes / max(1, made.valid_tokens - 1):.4f}")
    table.add_row("sha256 of tokens", made.train_sha256[:16], made.valid_sha256[:16])
    if made.text_sha256:
        table.add_row("sha256 of text", made.text_sha256[:16], "")
    table.add_row("sha256 of tokenizer", made.tokenizer_sha256[:16], "")
    Console(markup=False).print(table)


def _compress(command: Compress) -> None:
    config = None
    check_new(command.out)
    if command.recipe is not None:
        try:
            config = from_dict(EvaluateConfig, read_json(command.recipe)["evaluate"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise RecipeError(
                f"{command.recipe} is not a recipe.json ({error!r}); a run keeps one in _records/"
            ) from None
    with _bar("coding") as log:
        coded = text_codec.compress(command.artifact, command.text, command.out, config, log)
    size, header = len(coded.data), len(coded.data) - coded.payload_bits // 8
    rate = f"{8 * size / coded.text_bytes:.4f} bits per byte" if coded.text_bytes else "empty"
    print(
        f"{coded.text_bytes:,} bytes of text in {size:,} bytes, {rate}: {coded.payload_bits:,} bits of code for "
        f"{coded.ideal_bits:,.1f} bits of information, and {header} bytes of header and checksum"
    )


def _decompress(command: Decompress) -> None:
    check_new(command.text)
    with _bar("decoding") as log:
        size = text_codec.decompress(command.artifact, command.coded, command.text, command.force, log)
    print(f"{size:,} bytes of text in {command.text}; the checksum is right")


@contextmanager
def _bar(name: str) -> Iterator[Log]:
    """A progress bar on a terminal, nothing elsewhere; gone when it is done."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(name, total=1.0)
        yield lambda record: bar.update(task, completed=record["fraction"])


def _inspect(command: Inspect) -> None:
    inspection.show(command.artifact, Console(highlight=False, markup=False))


def _audit(command: Audit) -> None:
    console = Console(highlight=False, markup=False)
    for name in (
        "first_tokens",
        "streamed_tokens",
        "coded_tokens",
        "windows",
        "tolerance",
        "draws",
        "cuts",
        "draw_seed",
    ):
        if not (getattr(command, name) or 0) >= 0:  # nor is NaN
            raise RecipeError(f"--{name.replace('_', '-')} is {getattr(command, name)}; it must not be negative")
    if (command.run is None) == (not command.scorer):
        raise RecipeError("give the parquet file of a record, or --scorer and --tokens")
    if command.run is not None:
        if command.tokens or command.report or command.files or command.whole_text:
            raise RecipeError(
                "--tokens, --files, --whole-text and --report go with --scorer; --first-tokens bounds the audit of a "
                "record"
            )
        plan = auditor.Plan(
            first_tokens=command.first_tokens,
            streamed_tokens=command.streamed_tokens,
            coded_tokens=command.coded_tokens,
            windows=command.windows,
            tolerance=command.tolerance,
            seed=command.draw_seed,
        )
        sys.exit(auditor.record(command.run, command.seeds, command.claim, plan, console))
    if command.tokens is None:
        raise RecipeError("--scorer needs --tokens, the file of a text")
    if command.report is not None:
        check_new(command.report)
    draws = command.draws, command.cuts, command.draw_seed, command.report
    given = external_scorer.Given(command.scorer, command.files, command.whole_text)
    sys.exit(external_scorer.report(given, command.tokens, *draws, console))


COMMANDS: Commands = {
    Download: _download,
    Prepare: _prepare,
    Compress: _compress,
    Decompress: _decompress,
    Inspect: _inspect,
    Audit: _audit,
}


if __name__ == "__main__":
    main()
