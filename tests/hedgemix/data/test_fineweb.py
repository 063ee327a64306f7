from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

from hedgemix.config import DataConfig, RecipeError
from hedgemix.data import bpb, dataset, fineweb, shards, tokenizer
from support.text_data import documents, escaping_processor, processor

PREFIX = "datasets/datasets/fineweb10B_sp512"


class Hub:
    """The two calls that leave the machine, answered from a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []
        self.failure: Exception | None = None
        self.asked = ""

    def list_repo_files(self, repo: str, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        self.asked = repo
        if self.failure:
            raise self.failure
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]

    def download(self, repo: str, name: str, repo_type: str, local_dir: Path) -> str:
        if self.failure:
            raise self.failure
        target = Path(local_dir) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / name, target)
        self.fetched.append(target.name)
        return str(target)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    for name, count in (("val", 2), ("train", 3)):
        for index in range(count):
            tokens = np.arange(1, 300 + index)
            shards.write_shard(hub.root / PREFIX / f"fineweb_{name}_{index:06d}.bin", tokens)
    model = hub.root / "datasets/tokenizers/fineweb_512_bpe.model"
    model.parent.mkdir()
    model.write_bytes(processor().serialized_model_proto())
    shards.write_shard(hub.root / "datasets/datasets/fineweb10B_sp4096/fineweb_val_000000.bin", np.arange(5))
    (hub.root / "datasets/manifest.json").write_text("{}")
    monkeypatch.setattr(fineweb, "HfApi", lambda: hub)
    monkeypatch.setattr(fineweb, "hf_hub_download", hub.download)
    return hub


def fetch(folder: Path, train_shards: int = 2, variant: str = "sp512") -> Path:
    return fineweb.download(folder, train_shards, variant, log=lambda line: None)


ALL = [
    "fineweb_512_bpe.model",
    "fineweb_train_000000.bin",
    "fineweb_train_000001.bin",
    "fineweb_val_000000.bin",
    "fineweb_val_000001.bin",
]


def test_the_folder_is_flat_and_can_be_prepared(hub: Hub, tmp_path: Path) -> None:
    model = fetch(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted(hub.fetched) == ALL
    config = DataConfig(source="shards", shards_dir=str(tmp_path / "data"), tokenizer=str(model), vocab_size=512)
    made = dataset.prepare(config, tmp_path / "prepared", lambda line: None)
    assert (len(made.train_shards), len(made.valid_shards)) == (2, 2)


def test_a_variant_with_markers_brings_the_bytes_of_its_tokens(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch(tmp_path / "official") and hub.asked == fineweb.REPOSITORY
    variant = "sp400_lossless_caps"
    monkeypatch.setitem(fineweb.OTHERS, variant, "somebody/else")
    p, there = escaping_processor(), hub.root / f"datasets/datasets/fineweb10B_{variant}"
    texts = [f"{' '.join(text.split())[:1500].strip()} \ue001NASA" for text in documents()[60:70]]
    tokens = np.concatenate(tokenizer.encode_batch(p, texts))
    sizes = bpb.token_bytes(bpb.byte_tables(p), tokens, 0, len(tokens))
    told = sizes + (np.arange(len(tokens)) == 7)  # a character of three bytes that was normalised to one of two, say
    for name, numbers in (("val", tokens), ("val_bytes", told), ("train", tokens[::-1])):
        shards.write_shard(there / f"fineweb_{name}_000000.bin", numbers)
    (hub.root / "datasets/tokenizers/fineweb_400_bpe_lossless_caps.model").write_bytes(p.serialized_model_proto())
    root = tmp_path / "fetched"
    said = list[str]()
    model = fineweb.download(root, 1, variant, log=said.append)
    assert hub.asked == "somebody/else" and model.name == "fineweb_400_bpe_lossless_caps.model"
    assert [path.name for path in sorted(root.glob("*.bin"))] == [
        "fineweb_train_000000.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin",
    ]  # fmt: skip
    config = DataConfig(source="shards", shards_dir=str(root), vocab_size=400)
    made = dataset.prepare(config, tmp_path / "data", said.append)
    assert "shards: 1 for training and 1 for validation are sound" in said
    n_bytes = sum(len(text.encode()) for text in texts)
    assert made.valid_bytes == n_bytes and made.valid_tokens == len(tokens)
    assert (
        f"bytes: {n_bytes:,} that the validation tokens decode to, which count; {n_bytes + 1:,} by the files beside "
        "them, which differ at 1 tokens" in said
    )
    marker = int(np.flatnonzero((tokens == 4) & (sizes == 0))[0])
    for wrong, reason in (
        (told[:-1], f"tell the bytes of {len(told) - 1:,} tokens, and there are {len(told):,} of validation"),
        (told + (np.arange(len(told)) == marker), f"give bytes to the token at {marker:,}, which stands for no text"),
        (np.where(sizes == 4, 5, sizes), "and its tokens decode to"),
    ):
        shards.write_shard(root / "fineweb_val_bytes_000000.bin", wrong)
        with pytest.raises(RecipeError, match=reason):
            fineweb.download(root, 1, variant, log=said.append)


def test_only_what_is_missing_or_broken_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path)
    hub.fetched.clear()
    fetch(tmp_path)
    assert hub.fetched == []
    (tmp_path / "fineweb_val_000001.bin").unlink()
    cut = tmp_path / "fineweb_train_000000.bin"
    cut.write_bytes(cut.read_bytes()[:-7])
    fetch(tmp_path, train_shards=3)
    assert sorted(hub.fetched) == ["fineweb_train_000000.bin", "fineweb_train_000002.bin", "fineweb_val_000001.bin"]
    assert cut.read_bytes() == (hub.root / PREFIX / cut.name).read_bytes()


def test_what_was_there_and_is_not_the_hub_s_is_kept_aside(hub: Hub, tmp_path: Path) -> None:
    mine = tmp_path / "fineweb_512_bpe.model"
    for content in (b"mine", b"mine too"):
        mine.write_bytes(content)
        fetch(tmp_path)
    found = {path.name: path.read_bytes() for path in tmp_path.glob("*.aside*")}
    assert found == {f"{mine.name}.aside": b"mine", f"{mine.name}.aside2": b"mine too"}


def test_a_broken_file_of_the_hub_never_gets_its_name(hub: Hub, tmp_path: Path) -> None:
    source = hub.root / PREFIX / "fineweb_train_000001.bin"
    source.write_bytes(source.read_bytes()[:-2])
    with pytest.raises(RecipeError, match=r"fineweb_train_000001\.bin is cut short"):
        fetch(tmp_path / "data")
    assert not (tmp_path / "data" / source.name).exists()
    assert not list((tmp_path / "data").rglob(source.name))


def test_a_tokenizer_of_another_size_is_refused(hub: Hub, tmp_path: Path) -> None:
    model = hub.root / "datasets/tokenizers/fineweb_512_bpe.model"
    model.rename(model.with_name("fineweb_300_bpe.model"))
    for path in (hub.root / PREFIX).iterdir():
        shards.write_shard(hub.root / "datasets/datasets/fineweb10B_sp300" / path.name, np.arange(9))
    with pytest.raises(RecipeError, match="has 512 pieces, expected 300"):
        fetch(tmp_path / "data", variant="sp300")


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (ConnectionError("Name or service not known"), "could not reach the hub .*Name or service.*network"),
        (RuntimeError("transport of some client"), "could not reach the hub"),
        (OfflineModeIsEnabled("offline"), "could not reach the hub"),
        (LocalEntryNotFoundError("no connection"), "could not reach the hub"),
        (EntryNotFoundError("404"), "the hub refused .*404"),
    ],
)
def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, failure: Exception, reason: str) -> None:
    hub.failure = failure
    with pytest.raises(RecipeError, match=reason):
        fetch(tmp_path / "data")


@pytest.mark.parametrize(
    ("count", "variant", "reason"),
    [
        (4, "sp512", "has 3 training shards.*train_shards"),
        (0, "sp512", "train_shards is 0"),
        (1, "sp9", "no validation shards of variant 'sp9'"),
        (1, "byte260", "variant 'byte260' is unknown"),
    ],
)
def test_requests_that_cannot_be_met(hub: Hub, tmp_path: Path, count: int, variant: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        fetch(tmp_path / "data", count, variant)
