"""Numbers that people write, and strictness."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from longctx.config import Config, Duration, Integer, parse_duration, parse_integer, parse_path, without_password

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class Numbers(Config):
    """What a recipe's table looks like."""

    steps: Integer = 1
    timeout: Duration = 1.0
    rate: float = 1.0


@given(st.integers(-(10**12), 10**12), st.sampled_from(list(UNITS)), st.sampled_from(["", " "]))
def test_whole_numbers_with_a_unit(number, unit, space):
    assert parse_integer(f"{number}{space}{unit}") == number * UNITS[unit]
    assert parse_integer(f" {number:_}{unit} ") == number * UNITS[unit]


@given(st.integers(-999, 999), st.text("0123456789", min_size=1, max_size=8), st.sampled_from(list(UNITS)))
def test_fractions_are_exact_or_refused(whole, digits, unit):
    text = f"{whole}.{digits}{unit}"
    value = Fraction(f"{whole}.{digits}") * UNITS[unit]
    if value.denominator == 1:
        assert parse_integer(text) == value
    else:
        with pytest.raises(ValueError, match="is not a whole number"):
            parse_integer(text)


@pytest.mark.parametrize(
    "text", ["", "M", "1e6", "1,000", "0x10", "1 000", "4 KiB", "1m", "1K", "_1", "one", "1.", ".5M"]
)
def test_what_is_no_integer_is_refused_with_what_would_be(text):
    with pytest.raises(ValueError, match=r"is not an integer; write 4096, '4_096', '4Ki' \(4096\) or '4k' \(4000\)"):
        parse_integer(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), (" 2 s ", 2.0), (3, 3.0)]
)
def test_durations_are_seconds(text, seconds):
    assert parse_duration(text) == seconds
    assert type(parse_duration(text)) is float


@pytest.mark.parametrize("text", ["", "10", "-1s", "1d", "1h30m", "1e3s"])
def test_what_is_no_duration_is_refused_with_what_would_be(text):
    with pytest.raises(ValueError, match=r"is not a duration; write '90s', '10m' or '1\.5h'"):
        parse_duration(text)


def test_a_table_reads_them():
    numbers = Numbers(steps="1.5Ki", timeout="2m", rate=1)
    assert (numbers.steps, numbers.timeout, numbers.rate) == (1536, 120.0, 1.0)


@pytest.mark.parametrize(
    "wrong", [{"steps": 1.0}, {"steps": True}, {"rate": "1.0"}, {"rate": True}, {"timeout": True}, {"step": 1}], ids=str
)
def test_nothing_is_silently_converted_and_no_key_silently_ignored(wrong):
    (key,) = wrong
    with pytest.raises(ValidationError, match=key):
        Numbers(**wrong)


def test_values_are_frozen():
    numbers = Numbers()
    with pytest.raises(ValidationError, match="frozen"):
        numbers.steps = 2


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is empty: give a path"),
        ("a\0b", "'a\\x00b' has a NUL character, which no path has"),
        ("a/" + "é" * 128, "has 130 characters: a path has at most 4,095 bytes, each name in it 255"),
        ("a/" * 2048, "has 4,096 characters"),
    ],
)
def test_what_is_no_path_is_refused_with_the_reason(path, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_path(path)


@pytest.mark.parametrize("path", ["/", "a b/c", "é" * 127, ("x" * 255 + "/") * 15, "caf\udce9"])
def test_a_path_stays_as_it_is(path):
    assert parse_path(path) == path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a", "https://***@host/a"),
        ("postgresql+psycopg2://me:p@w@host:5432/db?a=b@c", "postgresql+psycopg2://***@host:5432/db?a=b@c"),
        ("uri=s3://me@bucket/x y=http://a:b@c", "uri=s3://***@bucket/x y=http://***@c"),
        ("https://host/a@b", "https://host/a@b"),
        ("sqlite:///a@b.db", "sqlite:///a@b.db"),
        ("me@host:a", "me@host:a"),
    ],
)
def test_users_and_passwords_of_urls_are_left_out(text, shown):
    assert without_password(text) == shown
