"""The entry point: finds the subcommand, loads only its module, and says errors in a line instead of a traceback.

Exit status: 0 done, 1 refused or failed, 2 wrong usage or an expression that is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click

from kbpf.errors import FilterError, FilterSyntaxError, KbpfError
from kbpf.runtime.backends import chosen

_COMMANDS = ("compile", "count", "doctor", "events", "explain", "link", "load", "map", "prog", "run")


class _Lazy(click.Group):
    """A group whose commands are functions called ``command`` in the modules of their names."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kbpf.cli.{name}").command
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kbpf")
def cli() -> None:
    """Filters on sockets, eBPF programs and their maps."""
    try:
        chosen()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def describe(error: Exception) -> str:
    """An error as it is said on standard error: the message first, then lines of detail."""
    if isinstance(error, FilterSyntaxError):
        message, _, caret = str(error).partition("\n")
        return f"{message}, at position {error.position}\n{caret}"
    return str(error)


def main() -> None:
    """Run the command line and exit."""
    if sys.stdout is None:
        # Closed by whoever started this: what is printed is for nobody.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        status = cli.main(prog_name="kbpf", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = 130
    except BrokenPipeError:
        # The reader left, as head(1) does.
        _drop_output()
        status = 1
    except (KbpfError, OSError) as error:
        click.echo(f"kbpf: {describe(error)}", err=True)
        status = 2 if isinstance(error, FilterError) else 1
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    sys.exit(status)


def _drop_output() -> None:
    """Nothing more is to be flushed at exit, where Python would fail with a status of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
