"""RAY_ADDRESS: every form that is none is refused by name at once, and so is a place where no Ray is."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from hedgemix.config import RecipeError
from pipeline.execution import ray_address, resources

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def listening(talk: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server of one connection, which `talk` is given; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            wire, _ = server.accept()
            with wire:
                talk(wire)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(5)


@pytest.mark.parametrize("address", ["", "  ", "local", " local "])
def test_what_names_no_cluster_is_this_machine_alone(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not resources.on_cluster()
    ray_address.check_cluster()
    assert ray_address.settle_address() == "" and "RAY_ADDRESS" not in ray_address.os.environ


def test_space_around_an_address_is_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", " 10.0.0.1:6379\n")
    assert ray_address.settle_address() == ray_address.os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert ray_address.split_address("[fe80::1]:6379") == ("fe80::1", 6379)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://head:8265", "dashboard's address.*RAY_API_SERVER_ADDRESS"),
        ("https://head", "dashboard's address"),
        ("ray://head:10001", "Ray Client.*submit the command as a job"),
        ("head", "not host:port"),
        ("head:port", "not host:port"),
        ("head:0", "not host:port"),
        ("head:65536", "not host:port"),
        ("10.0.0.1 :6379", "not host:port"),
        ("ssh://head:22", "not host:port"),
    ],
)
def test_an_address_of_another_kind_is_named_with_the_fix(
    address: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RecipeError, match=f"RAY_ADDRESS .*{expected}.*host:port.*unset RAY_ADDRESS"):
        ray_address.check_cluster()


def test_a_place_where_nobody_listens_is_told_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(RecipeError, match=f"RAY_ADDRESS 127.0.0.1:{port}: nobody answers there .*refused"):
        ray_address.check_cluster(patience_seconds=0)
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(RecipeError, match="nobody answers there"):
        ray_address.check_cluster()


def test_a_head_that_is_just_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start() -> None:
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as server:
            wire, _ = server.accept()
            with wire:
                wire.sendall(SETTINGS)

    thread = Thread(target=start, daemon=True)
    thread.start()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    ray_address.check_cluster()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("talk", "expected"),
    [
        (lambda wire: wire.sendall(SETTINGS[:2]) or wire.sendall(SETTINGS[2:]), None),
        (lambda wire: wire.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "no Ray's head"),
        (lambda wire: None, "no Ray's head"),
        (lambda wire: wire.recv(100) and time.sleep(0.5), "says nothing"),
    ],
    ids=["grpc", "http", "closes", "silent"],
)
def test_who_listens_has_to_speak_as_a_head_does(
    talk: Callable[[socket.socket], object], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_address, "ANSWER_SECONDS", 0.2)
    with listening(talk) as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        if expected is None:
            ray_address.check_cluster()
        else:
            with pytest.raises(RecipeError, match=f"RAY_ADDRESS 127.0.0.1:{port}: .*{expected}"):
                ray_address.check_cluster()


def test_the_word_auto_wants_a_ray_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where the address of the last one would stand
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    with pytest.raises(RecipeError, match="RAY_ADDRESS auto: no Ray runs on this machine.*ray start --head"):
        ray_address.check_cluster()
    with listening(lambda wire: wire.sendall(SETTINGS)) as port:
        monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: {f"127.0.0.1:{port}"})
        monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)
        ray_address.check_cluster()
