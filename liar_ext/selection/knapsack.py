"""One choice per list of options, at least total loss within a total cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_GRAINS = 8192


def choose(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], limit: float
) -> list[int]:
    """Minimise ``Σ losses[i][choice_i]`` subject to ``Σ costs[i][choice_i] ≤ limit``.

    Dynamic programming over the cost: ``best[c]`` is the least loss of the lists so far at a cost
    of at most c grains. What the first options cost is set aside; the rest is counted in grains,
    rounded up. If all costs are whole numbers, the grain is their greatest common divisor, and the
    result exact, as long as what is left of the limit holds at most ``MAX_GRAINS`` of them. Else it
    is that rest divided by ``MAX_GRAINS``, and rounding wastes less than one grain per list: the
    loss is at most the least one of a limit that is lower by a grain per list.

    ``costs`` ascend strictly in each list, ``losses`` has one per option, and ``limit`` is at least
    the cost of all the first options. Returns the index of the option taken, by list.
    """
    extra = [[cost - options[0] for cost in options] for options in costs]
    room = min(limit - sum(options[0] for options in costs), sum(each[-1] for each in extra))
    if room <= 0:
        return [0] * len(costs)
    costs_of_all = [cost for each in extra for cost in each]
    whole = all(float(cost).is_integer() for cost in costs_of_all)
    grain = float(math.gcd(*map(int, costs_of_all))) if whole else 0.0
    if room > MAX_GRAINS * grain:
        grain = room / MAX_GRAINS
    grains = int(room / grain + 1e-6)
    steps = [[math.ceil(cost / grain - 1e-6) for cost in each] for each in extra]

    best, choices = np.zeros(grains + 1), []
    for spent, lost in zip(steps, losses, strict=True):
        better = np.full(grains + 1, np.inf)
        choice = np.zeros(grains + 1, dtype=np.int32)
        for option, (step, loss) in enumerate(zip(spent, lost, strict=True)):
            if step > grains:
                break
            total = best[: grains + 1 - step] + loss
            wins = total < better[step:]
            better[step:][wins] = total[wins]
            choice[step:][wins] = option
        best = better
        choices.append(choice)

    taken = []
    for spent, choice in zip(reversed(steps), reversed(choices), strict=True):
        taken.append(int(choice[grains]))
        grains -= spent[taken[-1]]
    return taken[::-1]
