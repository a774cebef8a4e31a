"""What the command line itself says: on stderr, so that stdout belongs to the command's result."""

import sys


def echo_error(text: str) -> None:
    """Print the text of an error, whole and unwrapped, so that `file:line` can be copied."""
    # Imported here: an error is rare, and `--help` should not wait for it.
    from rich.console import Console
    from rich.text import Text

    message = Text("error: ", style="bold red").append(text, style="not bold default")
    Console(stderr=True, soft_wrap=True, highlight=False).print(message)


def echo(text: str) -> None:
    """Print a line about what the launcher does."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def show_cursor() -> None:
    """Undo what a live display leaves behind where its process was killed."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")
        sys.stdout.flush()
