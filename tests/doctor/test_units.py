"""Numbers with units."""

import pytest

from longctx.doctor.units import duration, flops, rate, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (size(0), "0 B"),
        (size(64 * 2**20), "64 MiB"),
        (size(80 * 2**30), "80.0 GiB"),
        (size(1.5 * 2**40), "1.5 TiB"),
        (rate(12.5e9), "12.5 GB/s"),
        (rate(7), "7 B/s"),
        (flops(3.12e14), "312 TFLOP/s"),
        (duration(23.4e-6), "23.4 us"),
        (duration(-1.5), "-1.5 s"),
        (duration(0), "0 us"),
        (duration(2e-3), "2 ms"),
        (duration(999.6e-6), "1 ms"),
    ],
)
def test_numbers_have_units(text: str, expected: str) -> None:
    assert text == expected
