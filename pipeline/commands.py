"""The `hedgemix` command with what reads a record's table: the library's commands, and those of this package."""

from __future__ import annotations

from hedgemix import cli

COMMANDS: cli.Commands = {**cli.COMMANDS}


def main() -> None:
    """Entry point; exits with 2 after a user's mistake."""
    cli.main(COMMANDS)


if __name__ == "__main__":
    main()
