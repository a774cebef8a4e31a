"""Communication of this process: the current collective, and calls and bytes per layer and collective, always on.

A model names the current layer with `layer`; autograd functions over ranks (`longctx.parallel.autograd`) restore that
name in the backward pass. Bytes are those that this rank receives from other ranks.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

_layer: ContextVar[str] = ContextVar("layer", default="")


def current_layer() -> str:
    """Return the name of the layer that is being computed, "" outside of any layer."""
    return _layer.get()


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Attribute the communication inside the block to a layer, in the counters and in error messages."""
    token = _layer.set(name)
    try:
        yield
    finally:
        _layer.reset(token)


@dataclass
class Traffic:
    """Calls of collectives, and the bytes that this rank received in them."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    waited: float = 0.0
    """Seconds that this rank's CPU blocked on other ranks; waits of CUDA streams are not measured."""
    layers: dict[str, "Traffic"] = field(default_factory=dict)
    """The same counters per layer; empty within a layer."""

    def add(self, name: str, received: int) -> None:
        """Count one call."""
        self.calls[name] += 1
        self.bytes[name] += received

    @property
    def received(self) -> int:
        """Bytes received, over all collectives."""
        return self.bytes.total()


_total = Traffic()
_counters: list[Traffic] = [_total]


def total() -> Traffic:
    """Return the counters of this process since it started. Read-only."""
    return _total


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count this rank's communication inside the block, the backward pass included."""
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: dataclasses with equal counts compare equal.
        _counters[:] = [counter for counter in _counters if counter is not traffic]


@dataclass(frozen=True)
class Communication:
    """A collective that is being started, or waited for."""

    description: str
    layer: str
    number: int
    """Tells it from others of the same description."""


_numbers = itertools.count()
_current: Communication | None = None


def communication() -> Communication | None:
    """Return what this process communicates right now; None if nothing. For a thread that watches it."""
    return _current


@contextmanager
def communicating(description: str, layer: str) -> Iterator[None]:
    """Show the block as communication, to a thread that watches."""
    global _current
    _current = Communication(description, layer, next(_numbers))
    try:
        yield
    finally:
        _current = None


def record_wait(seconds: float) -> None:
    """Add the time that this rank waited for a collective."""
    for traffic in _counters:
        traffic.waited += seconds
        if current_layer():
            traffic.layers.setdefault(current_layer(), Traffic()).waited += seconds


def record_call(name: str, received: int) -> None:
    """Count one call of a collective."""
    for traffic in _counters:
        traffic.add(name, received)
        if current_layer():
            traffic.layers.setdefault(current_layer(), Traffic()).add(name, received)
