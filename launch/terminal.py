"""Terminal output of the command line: messages and errors on stderr; stdout is for results."""

import re
import sys

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and newline. A name from a file may contain them, and a terminal obeys them."""


def _spelled_out(text: str) -> str:
    """Return a text with its control characters as escape sequences, such as `\\x1b`."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def echo_error(text: str) -> None:
    """Print an error, unwrapped, so that `file:line` can be copied."""
    # Imported here to keep `--help` fast.
    from rich.console import Console
    from rich.text import Text

    message = Text("error: ", style="bold red").append(_spelled_out(text), style="not bold default")
    Console(stderr=True, soft_wrap=True, highlight=False).print(message)


def echo(text: str) -> None:
    """Print a message."""
    sys.stderr.write(f"{_spelled_out(text)}\n")
    sys.stderr.flush()


def show_cursor() -> None:
    """Show the cursor again after the process of a live display was killed."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")
        sys.stdout.flush()
