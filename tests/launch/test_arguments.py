"""Arguments of the command line: what is accepted, and the reason where it is not."""

import json

import pytest

from longctx.errors import UserError
from longctx.launch.arguments import at_least, check_json_file, integer, link_speed, two_lengths, write_json


def test_numbers_are_read_with_their_units():
    assert integer("--tokens", "4Ki") == at_least(1, "--tokens", "4096") == 4096
    assert (link_speed("2.5"), link_speed("none")) == (2.5, None)
    assert (two_lengths("--scaling", "1Ki,2Ki"), two_lengths("--scaling", "none")) == ((1024, 2048), None)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "inf", "nan"])
def test_what_is_no_link_speed_is_refused(text):
    with pytest.raises(UserError, match=r"expected a speed in Gbit/s, or none"):
        link_speed(text)


@pytest.mark.parametrize("text", ["", "1", "2,1", "1,1", "1,2,3", "a,b", ","])
def test_what_are_no_two_lengths_is_refused(text):
    with pytest.raises(UserError, match=r"^--scaling"):
        two_lengths("--scaling", text)


def test_a_number_that_is_too_small_is_refused_with_its_option():
    with pytest.raises(UserError, match="--tokens 0: expected at least 1"):
        at_least(1, "--tokens", "0")


def test_results_are_written_to_a_file_that_is_checked_first(tmp_path):
    write_json(None, {})
    check_json_file(None)
    check_json_file(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1]}
    with pytest.raises(UserError, match=r"there is no directory .*gone; create it first"):
        check_json_file(tmp_path / "gone" / "a.json")
    with pytest.raises(UserError, match="it is a directory; give the name of a file"):
        check_json_file(tmp_path)
