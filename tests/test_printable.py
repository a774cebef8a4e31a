"""Text for a terminal: control characters are spelled out, all else stays."""

import pytest

from longctx.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a name é ☃ א[red]\\x1b", "a name é ☃ א[red]\\x1b"),
        ("\x1b]0;owned\x07\x9b31m\r\x7f\x00", "\\x1b]0;owned\\x07\\x9b31m\\r\\x7f\\x00"),
        ("exe\u202etxt\u2066\u2028", "exe\\u202etxt\\u2066\\u2028"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_control_characters_are_spelled_out(text, shown):
    assert printable(text) == shown
    assert printable(text, lines=True) == shown
    assert shown.encode().decode() == shown


def test_a_text_of_lines_keeps_them_and_a_name_does_not():
    assert printable("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
    assert printable("a\n\tb\x1b") == "a\\n\\tb\\x1b"
