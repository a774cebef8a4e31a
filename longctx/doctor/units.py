"""Numbers with units, for people: bytes, rates and times."""


def size(number: float) -> str:
    """Write bytes: `512 MiB`, `80.0 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB" if number < 1024 else f"{number / 1024:.1f} TiB"


def rate(number: float) -> str:
    """Write bytes per second: `12.5 GB/s`."""
    return f"{_scaled(number)}B/s"


def flops(number: float) -> str:
    """Write FLOP/s: `312 TFLOP/s`."""
    return f"{_scaled(number)}FLOP/s"


def duration(seconds: float) -> str:
    """Write seconds, which may be negative: `23.4 us`, `1.5 s`."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        # 999.6 us would be written 1e+03 us.
        if abs(seconds) * scale >= 0.9995 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError("the last unit is for all numbers")


def _scaled(number: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g} "
