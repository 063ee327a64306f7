"""Where the `hedgemix` command begins: what signals do is settled before the imports, which take seconds."""

from __future__ import annotations

import os
from contextlib import suppress

from hedgemix.runtime.surroundings import settle
from pipeline.execution.stopping import CODE, exit_on_signals, raise_on_signals

STOPPED = "stopped"


def main() -> None:
    """Run the command line; exits with 2 after a user's mistake, and with 130 when it is stopped."""
    exit_on_signals(STOPPED)
    settle()
    from pipeline import cli

    raise_on_signals()
    try:
        cli.main()
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, f"{STOPPED}\n".encode())
        os._exit(CODE)


if __name__ == "__main__":
    main()
