"""Terminal output of the command line: messages and errors on stderr; stdout is for results."""

import sys

from longctx.printable import printable


def echo_error(text: str) -> None:
    """Print an error, unwrapped, so that `file:line` can be copied."""
    # Imported here to keep `--help` fast.
    from rich.console import Console
    from rich.text import Text

    message = Text("error: ", style="bold red").append(printable(text, lines=True), style="not bold default")
    Console(stderr=True, soft_wrap=True, highlight=False).print(message)


def echo(text: str) -> None:
    """Print a message."""
    sys.stderr.write(f"{printable(text, lines=True)}\n")
    sys.stderr.flush()


def show_cursor() -> None:
    """Show the cursor again after the process of a live display was killed."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")
        sys.stdout.flush()
