"""What RAY_ADDRESS names, tried before any work: Ray itself takes minutes to say that nobody is there."""

from __future__ import annotations

import os
import re
import socket
import time

from hedgemix.config import RecipeError

CONNECT_SECONDS = 5.0
PATIENCE_SECONDS = 10.0
"""How long a head that is just starting is waited for."""
ANSWER_SECONDS = 10.0
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of gRPC says first: that it speaks HTTP/2, and settings, of which it has none."""
SETTINGS = 4
"""Kind of the frame that a server of gRPC says first."""
PLACE = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\s:/@\[\]]+)):(?P<port>[0-9]{1,5})")
FIX = "name the head of a running cluster as host:port (docs/cluster.md), or unset RAY_ADDRESS for this machine alone"
KINDS = {
    "http": "is a dashboard's address, which `ray job submit` takes (RAY_API_SERVER_ADDRESS)",
    "https": "is a dashboard's address, which `ray job submit` takes (RAY_API_SERVER_ADDRESS)",
    "ray": "is a Ray Client's address, and records do not run through one: submit the command as a job",
}


def settle_address() -> str:
    """Leave in RAY_ADDRESS what `cluster_address` says, since Ray reads it too; returns it."""
    address = cluster_address()
    os.environ.pop("RAY_ADDRESS", None)
    if address:
        os.environ["RAY_ADDRESS"] = address
    return address


def cluster_address() -> str:
    """Return what RAY_ADDRESS names; empty for a Ray of this machine alone, which Ray's word local means too."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return "" if address == "local" else address


def check_cluster(patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Raise RecipeError, within half a minute, when RAY_ADDRESS names something else than a cluster that answers."""
    address = cluster_address()
    if not address:
        return
    host, port = split_address(found_here() if address == "auto" else address)
    until = time.monotonic() + patience_seconds
    while True:
        try:
            problem = greet(host, port)
            break
        except OSError as error:
            problem = f"nobody answers there ({error.strerror or error})"
            if isinstance(error, socket.gaierror) or time.monotonic() >= until:
                break
            time.sleep(0.5)
    if problem:
        raise RecipeError(f"RAY_ADDRESS {address}: {problem}; {FIX}")


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of a cluster's head. Raises RecipeError for an address of another kind."""
    scheme, mark, _ = address.partition("://")
    found = PLACE.fullmatch(address)
    if not found or not 0 < int(found["port"]) < 1 << 16:
        kind = KINDS.get(scheme.lower() if mark else "", "is not host:port")
        raise RecipeError(f"RAY_ADDRESS {address!r} {kind}; {FIX}")
    return found["six"] or found["name"], int(found["port"])


def found_here() -> str:
    """Return the address of the cluster that runs on this machine, as Ray's word auto means. Raises RecipeError when
    there is none."""
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address("auto"))
    except (ConnectionError, OSError, ValueError):
        raise RecipeError(
            f"RAY_ADDRESS auto: no Ray runs on this machine; start one (`ray start --head`), {FIX}"
        ) from None


def greet(host: str, port: int) -> str:
    """Return what is wrong with who listens there; empty for a server of gRPC, as Ray's head is. Raises OSError when
    nobody does."""
    with socket.create_connection((host, port), CONNECT_SECONDS) as wire:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return ""
        wire.settimeout(ANSWER_SECONDS)
        try:
            wire.sendall(GREETING)
            answer = b""
            while len(answer) < 4 and (more := wire.recv(4 - len(answer))):
                answer += more
        except TimeoutError:
            return f"something listens there and says nothing for {ANSWER_SECONDS:g} s, which is no Ray"
        except OSError:
            answer = b""
    return "" if len(answer) == 4 and answer[3] == SETTINGS else "what listens there is no Ray's head"
