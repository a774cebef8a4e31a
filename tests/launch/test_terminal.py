"""Terminal output: messages and errors go to stderr, as they are."""

import io

import pytest

from longctx.launch import terminal
from longctx.launch.terminal import echo, echo_error, show_cursor


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_message_is_a_line_on_stderr(capsys):
    echo("step 3 [of 7]")
    assert capsys.readouterr() == ("", "step 3 [of 7]\n")


def test_an_error_is_printed_after_its_word(capsys):
    echo_error("recipe.toml:3: wrong")
    assert capsys.readouterr() == ("", "error: recipe.toml:3: wrong\n")


def test_a_long_error_is_not_wrapped_and_brackets_are_no_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = f"/data/{'folder/' * 30}recipe.toml:3: [red]model[/red].layers: " + "words " * 40 + "\nsecond line"
    echo_error(text)
    assert capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize("say", [echo, echo_error])
def test_control_characters_in_names_are_spelled_out(capsys, say):
    say("corpus \x1b]0;owned\x07\x9b31m\r\x7f:\né")
    assert capsys.readouterr().err.removeprefix("error: ") == "corpus \\x1b]0;owned\\x07\\x9b31m\\r\\x7f:\né\n"


@pytest.mark.parametrize(("stream", "written"), [(Terminal(), "\x1b[?25h\n"), (io.StringIO(), "")])
def test_the_cursor_is_shown_on_a_terminal_only(monkeypatch, stream, written):
    monkeypatch.setattr(terminal.sys, "stdout", stream)
    show_cursor()
    assert stream.getvalue() == written
