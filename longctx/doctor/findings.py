"""Findings: what was looked at, how it is, and what to do about it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Status = Literal["ok", "warning", "wrong"]
_SHOWN = 3
"""Different values, or names of nodes, that one line shows."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """What: `open files`."""
    value: str
    """How it is, with units."""
    status: Status = "ok"
    """`wrong`: a run would fail or take much longer; `warning`: it may."""
    remedy: str = ""
    """What to do, unless it is ok."""
    where: str = ""
    """The nodes or ranks that this is about; empty: all."""

    def __post_init__(self) -> None:
        """Check that what is not ok says what to do."""
        assert (self.status == "ok") == (not self.remedy), self


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Return the findings of nodes as one list: one for all nodes that have the same to report.

    Findings of one name, status and remedy become one, with their different values, and say where unless that is
    everywhere.
    """
    alike: dict[tuple[str, Status, str], dict[str, str]] = defaultdict(dict)
    order = list(dict.fromkeys(finding.name for findings in by_node.values() for finding in findings))
    for node, findings in by_node.items():
        for finding in findings:
            alike[finding.name, finding.status, finding.remedy][node] = finding.value
    found = [
        Finding(name, few(dict.fromkeys(values.values()), "; "), status, remedy, _where(values, len(by_node)))
        for (name, status, remedy), values in alike.items()
    ]
    return sorted(found, key=lambda finding: order.index(finding.name))


def _where(nodes: Mapping[str, str], count: int) -> str:
    return "" if len(nodes) == count else few(nodes)


def few(texts: Iterable[str], separator: str = ", ") -> str:
    """Join texts; of many, the first ones and the number of the others."""
    every = list(texts)
    shown = every if len(every) <= _SHOWN + 1 else [*every[:_SHOWN], f"{len(every) - _SHOWN} more"]
    return separator.join(shown)


def at(where: str, findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with their place."""
    return [replace(finding, where=where) for finding in findings]


def worst(findings: Iterable[Finding]) -> Status:
    """Return the most severe status: `wrong`, else `warning`, else `ok`."""
    found = {finding.status for finding in findings}
    return "wrong" if "wrong" in found else "warning" if "warning" in found else "ok"
