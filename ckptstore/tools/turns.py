"""In which order rivals are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Tell = Callable[[str, int, int], None]
"""Called with what is running, measurements done and measurements in all."""


def turns(names: Sequence[str], rounds: int, tell: Tell | None = None) -> Iterator[str]:
    """Each name once a round, in an order in which everybody follows everybody.

    What ran before matters: it may have used up what a disk or a processor can do in a burst. The orders are those of
    E. J. Williams, "Experimental designs balanced for the estimation of residual effects of treatments" (1949):
    balanced over as many rounds as there are names; twice as many, every other one backwards, where that is odd.
    """
    count = len(names)
    zigzag = [place // 2 if place % 2 == 0 else count - 1 - place // 2 for place in range(count)]
    for turn in range(rounds):
        order = [(place + turn) % count for place in zigzag]
        for index, place in enumerate(reversed(order) if count % 2 and turn % 2 else order):
            if tell is not None:
                tell(names[place], turn * count + index, rounds * count)
            yield names[place]
