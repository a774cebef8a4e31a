"""Text for a terminal: what a file names is shown, not obeyed."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line separators, changes of the direction of writing, and bytes of a name that are not UTF-8."""


def printable(text: str, *, lines: bool = False) -> str:
    """Return a text with its control characters as escape sequences, such as `\\x1b`.

    Names of files, documents and keys may contain them, and a terminal would obey them. `lines`: keep newlines and
    tabs, for a text of several lines.
    """
    return _CONTROL.sub(lambda match: match[0] if lines and match[0] in "\n\t" else repr(match[0])[1:-1], text)
