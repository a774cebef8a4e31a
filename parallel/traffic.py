"""What a rank communicates, counted by layer and collective: always on, a few additions for each call.

A model says where it is with `layer`; an autograd function over ranks (`longctx.parallel.autograd`) takes the name
along to its backward pass. Bytes are those that a rank receives from others.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_layer: ContextVar[str] = ContextVar("layer", default="")


def current_layer() -> str:
    """The layer that is being computed, "" outside of all."""
    return _layer.get()


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Count, and name in errors, what is communicated inside the block as that of a layer."""
    token = _layer.set(name)
    try:
        yield
    finally:
        _layer.reset(token)


@dataclass
class Traffic:
    """Calls of collectives and the bytes that a rank received by them."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    """Seconds that this rank stood still for others; of a GPU's streams nothing is known."""
    layers: dict[str, "Traffic"] = field(default_factory=dict)
    """The same for each layer; a layer has no layers."""

    def add(self, name: str, received: int) -> None:
        """Count one call."""
        self.calls[name] += 1
        self.bytes[name] += received

    @property
    def received(self) -> int:
        """Bytes, over all collectives."""
        return self.bytes.total()


_total = Traffic()
_counters: list[Traffic] = [_total]


def total() -> Traffic:
    """What this process has communicated since it began. Not to be changed."""
    return _total


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank communicates inside the block, the backward pass included."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: equal counts are equal.
        _counters[:] = [each for each in _counters if each is not traffic]


def waited(seconds: float) -> None:
    """Note that this rank has waited for a collective."""
    for traffic in _counters:
        traffic.waited += seconds
        if current_layer():
            traffic.layers.setdefault(current_layer(), Traffic()).waited += seconds


def count(name: str, received: int) -> None:
    """Count one call of a collective."""
    for traffic in _counters:
        traffic.add(name, received)
        if current_layer():
            traffic.layers.setdefault(current_layer(), Traffic()).add(name, received)
