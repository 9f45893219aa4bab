# SPDX-License-Identifier: Apache-2.0
"""When to prune how much, for networks that are pruned while they are trained."""

from __future__ import annotations


def gradual(density: float, start: int, stop: int, times: int, *, initial: float = 1.0) -> dict[int, float]:
    """Prune often at first and little at the end: the density falls along a cubic curve.

    density(t) = density + (initial - density) · (1 - (t - start) / (stop - start))³, to which the weights are pruned at
    `times` steps, evenly spaced (rounded), the last at `stop`. At `start` the curve has not fallen yet.

    Args:
        density: what is left at the end, in (0, initial]. initial: what is left before, in (0, 1].
        start, stop: steps, 0 <= start < stop. times: prunings, at most stop - start.

    Returns:
        Step -> the fraction of the survivors that goes then, as :meth:`zipfast.Masks.prune` takes it.

    Raises:
        ValueError: numbers outside these ranges.

    Example:
        >>> rates = gradual(0.1, 0, 100, 4)
        >>> {step: round(rate, 3) for step, rate in rates.items()}
        {25: 0.52, 50: 0.557, 75: 0.463, 100: 0.123}
        >>> left = 1.0
        >>> for rate in rates.values():
        ...     left *= 1 - rate
        >>> round(left, 6)
        0.1

    Reference: Zhu & Gupta 2017 (to prune, or not to prune, arXiv 1710.01878), §3.
    """
    for what, value, low, high in (("initial", initial, 0.0, 1.0), ("density", density, 0.0, initial)):
        if not low < value <= high:
            raise ValueError(f"gradual: '{what}' must be above {low:g} and at most {high:g}, got {value}")
    if not 0 <= start < stop:
        raise ValueError(f"gradual: 'start' and 'stop' must be steps, 0 <= start < stop, got {start} and {stop}")
    if not 1 <= times <= stop - start:
        raise ValueError(f"gradual: 'times' must be from 1 to {stop - start}, got {times}")
    rates, before = {}, initial
    for i in range(1, times + 1):
        left = density + (initial - density) * (1 - i / times) ** 3
        rates[start + round(i * (stop - start) / times)] = 1 - left / before
        before = left
    return rates
