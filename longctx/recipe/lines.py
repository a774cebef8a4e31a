"""Line numbers of TOML keys, for error messages.

tomllib returns values without positions; this scanner returns positions without values. It reads text that tomllib has
already accepted, so it only recognises the structure of TOML (headers, dotted keys, strings, arrays, inline tables,
comments) and validates nothing.
"""

import tomllib
from bisect import bisect_right

Key = tuple[str | int, ...]
"""The path of a value: names of tables and keys, and array indices. The root is `()`."""

_BLANK = " \t"
_SPACE = " \t\n"


def key_lines(text: str) -> dict[Key, int]:
    """Return the line (from 1) on which each table, key and array element of `text`, valid TOML, begins."""
    return _KeyLocator(text.replace("\r\n", "\n")).key_lines()


class _KeyLocator:
    """A recursive-descent scanner that records the line of each key."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line_starts = [0, *(i + 1 for i, character in enumerate(text) if character == "\n")]
        self._lines: dict[Key, int] = {}
        self._table_arrays: dict[Key, int] = {}

    def key_lines(self) -> dict[Key, int]:
        table: Key = ()
        self._skip_space()
        while self._at < len(self._text):
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip_space()
        return self._lines

    def _header(self) -> Key:
        """Read `[a.b]` or `[[a.b]]` and return the path of the table that it opens."""
        line = self._line()
        is_array = self._text.startswith("[[", self._at)
        self._at += 2 if is_array else 1
        names = self._key()
        self._at += 2 if is_array else 1
        path: Key = ()
        for depth, name in enumerate(names, start=1):
            path = (*path, name)
            self._lines.setdefault(path, line)
            if is_array and depth == len(names):
                self._table_arrays[path] = self._table_arrays.get(path, -1) + 1
            if path in self._table_arrays:
                path = (*path, self._table_arrays[path])
                self._lines.setdefault(path, line)
        # The line of its own header takes precedence over earlier dotted keys and sub-tables.
        self._lines[path] = line
        return path

    def _pair(self, table: Key) -> None:
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self._lines.setdefault(path, line)
        self._at += 1  # =
        self._value(path)

    def _key(self) -> list[str]:
        """Read a dotted key up to its `=` or `]` and return its parts."""
        names = []
        while True:
            self._skip_blank()
            if self._peek() in "\"'":
                start = self._at
                self._string()
                names.append(next(iter(tomllib.loads(f"{self._text[start : self._at]} = 0"))))
            else:
                start = self._at
                while self._peek() not in " \t.=]":
                    self._at += 1
                names.append(self._text[start : self._at])
            self._skip_blank()
            if self._peek() != ".":
                return names
            self._at += 1

    def _value(self, path: Key) -> None:
        self._skip_blank()
        if self._peek() in "\"'":
            self._string()
        elif self._peek() == "[":
            self._array(path)
        elif self._peek() == "{":
            self._inline_table(path)
        else:
            while self._at < len(self._text) and self._peek() not in ",]}#\n":
                self._at += 1

    def _array(self, path: Key) -> None:
        self._at += 1
        index = 0
        self._skip_space()
        while self._peek() != "]":
            self._lines[*path, index] = self._line()
            self._value((*path, index))
            index += 1
            self._skip_space(",")
        self._at += 1

    def _inline_table(self, path: Key) -> None:
        self._at += 1
        self._skip_space()
        while self._peek() != "}":
            self._pair(path)
            self._skip_space(",")
        self._at += 1

    def _string(self) -> None:
        quote = self._peek()
        long = self._text.startswith(quote * 3, self._at)
        end = quote * 3 if long else quote
        self._at += len(end)
        while not self._text.startswith(end, self._at):
            self._at += 2 if quote == '"' and self._peek() == "\\" else 1
        self._at += len(end)
        while long and self._at < len(self._text) and self._peek() == quote:
            self._at += 1  # a multi-line string may end in quotes before the three that close it

    def _skip_blank(self) -> None:
        while self._at < len(self._text) and self._peek() in _BLANK:
            self._at += 1

    def _skip_space(self, also: str = "") -> None:
        """Skip blanks, line ends, comments, and the characters of `also`."""
        while self._at < len(self._text) and self._peek() in _SPACE + "#" + also:
            if self._peek() == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            else:
                self._at += 1

    def _peek(self) -> str:
        return self._text[self._at]

    def _line(self) -> int:
        return bisect_right(self._line_starts, self._at)
