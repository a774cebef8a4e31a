"""Order of the sources in a blend: which source sequence i is from, and which of its sequences it is.

The sources are the leaves of a Huffman tree over their weights. A node with weights a and b of its two parts sends
round(n a / (a + b)) of its first n sequences to the first part and the others to the second. These counts grow by 0 or
1 per sequence, so that each part gets its sequences in order, without gaps; they are functions of n, so that any
sequence is found in a few integer divisions, without a state and without a table.

After any n sequences, a source has had its share of them to within 2. Rounding at a node moves its parts by at most
1/2. The error of a node reaches a part times that part's share of it, which is at most 2/3 for a part that is a node
itself: when its two children were joined they were the two smallest, so neither is larger than its sibling. The errors
e of nodes thus grow along a path as e' <= 2/3 e + 1/2 < 3/2, from 0 at the root, and that of a source is below
3/2 + 1/2. With two sources it is at most 1/2. All is integer arithmetic, equal on every machine; shares are exact after
any multiple of the sum of the weights' ratio, such as 10 for the weights 0.3 and 0.7.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Node:
    """Two parts of a blend; a part is a node, or the number of a source."""

    first: "_Node | int"
    second: "_Node | int"
    first_weight: int
    weight: int

    def first_count(self, count: int) -> int:
        """Return how many of the node's first `count` sequences are of its first part."""
        return (2 * count * self.first_weight + self.weight) // (2 * self.weight)


class BlendOrder:
    """The endless order of the sources of a blend, in which each has the share of its weight.

    ratio: the weights as integers without a common divisor.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """Order sources by their weights, above 0, on any scale."""
        # The decimal text of a weight is what its author wrote: 0.1 and 0.9 are as 1 and 9, binary fractions are not.
        exact = [Fraction(repr(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"weights must be above 0, not {list(weights)}")
        scale = math.lcm(*(weight.denominator for weight in exact))
        scaled = [int(weight * scale) for weight in exact]
        self.ratio = tuple(weight // math.gcd(*scaled) for weight in scaled)
        # Of equal weights the later source is taken first, so that the earlier one is the first part.
        queue: list[tuple[int, int, _Node | int]] = [(w, -number, number) for number, w in enumerate(self.ratio)]
        heapq.heapify(queue)
        while len(queue) > 1:
            second_weight, key, second = heapq.heappop(queue)
            first_weight, first_key, first = heapq.heappop(queue)
            weight = first_weight + second_weight
            heapq.heappush(queue, (weight, max(key, first_key), _Node(first, second, first_weight, weight)))
        self._root = queue[0][2]

    def share(self, source: int) -> float:
        """Return the fraction of all sequences that are of a source."""
        return self.ratio[source] / sum(self.ratio)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the source of sequence `index`, from 0, and the number of the sequence in that source, from 0."""
        part = self._root
        while isinstance(part, _Node):
            before = part.first_count(index)
            if part.first_count(index + 1) > before:
                part, index = part.first, before
            else:
                part, index = part.second, index - before
        return part, index

    def counts(self, count: int) -> list[int]:
        """Return how many of the first `count` sequences are of each source."""
        found = [0] * len(self.ratio)
        parts = [(self._root, count)]
        while parts:
            part, total = parts.pop()
            if isinstance(part, _Node):
                first = part.first_count(total)
                parts += [(part.first, first), (part.second, total - first)]
            else:
                found[part] = total
        return found
