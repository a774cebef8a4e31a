"""Limits of a run's phases, learned from how long earlier ones of their kind took."""

from collections import defaultdict, deque

_LEAST = 120.0
"""Seconds that a phase may take whatever it took before: long enough for one rank to compile kernels again."""
_TIMES = 20
"""How many times the longest of its kind a phase may take."""
_LEARNED_FROM = 3
_REMEMBERED = 50


class PhaseLimits:
    """Seconds after which a phase is overdue, by its kind, such as `step` or `evaluation`."""

    def __init__(self, cap: float) -> None:
        """No limit exceeds `cap` seconds, which is that of a kind with fewer than three phases so far."""
        self._cap = cap
        self._took: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def learn(self, kind: str, seconds: float) -> None:
        """Take into account a phase that ended."""
        self._took[kind].append(seconds)

    def limit(self, kind: str) -> float:
        """Return the limit of the next phase of this kind."""
        took = self._took[kind]
        return self._cap if len(took) < _LEARNED_FROM else min(self._cap, max(_LEAST, _TIMES * max(took)))
