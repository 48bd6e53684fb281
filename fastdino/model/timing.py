"""How long a part of the step takes on the device at hand, and which of several ways is the fastest on all of them."""

from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastdino.capture import StuckCapture, capture
from fastdino.errors import reason

WARM_UP, TIMINGS, REPLAYS = 3, 5, 5


class Choice(NamedTuple):
    """A way to compute something, and why it; printed as the latter."""

    way: str
    reason: str

    def __str__(self) -> str:
        return self.reason


def _captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The work as a graph, after a warm-up on a side stream, which allocates, compiles and plans."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    current.wait_stream(side)
    return capture(work, side, torch.device("cuda", torch.cuda.current_device()))


def time_ms(work: Callable[[], object]) -> float:
    """Median over replays of the work as a graph: the device's time, whatever the host would take to launch it."""
    graph = _captured(work)
    times = []
    for _ in range(1 + TIMINGS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPLAYS)
    return median(times[1:])


def outcome(name: str, make: Callable[[], Callable[[], object]]) -> float | str:
    """`time_ms` of the work that `make` makes, or why it cannot be done here, in words that begin with the name."""
    try:
        return time_ms(make())
    except StuckCapture:
        raise
    except Exception as error:  # a missing module, library or kernel, each with an exception of its own
        return f"{name} does not run here: {reason(error)}"


def agreed(outcomes: dict[str, float | str]) -> dict[str, float | str]:
    """Of all ranks' outcomes per way (ms, or why not) the worst, the same on every rank: a collective.

    The slowest rank's time, since the others wait for it; and what cannot run on one rank can run on none.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return outcomes
    ranks: list[dict[str, float | str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, outcomes)
    worst: dict[str, float | str] = {}
    for name in outcomes:
        times = [x for x in (rank[name] for rank in ranks) if isinstance(x, float)]
        reasons = {i: x for i, x in enumerate(rank[name] for rank in ranks) if isinstance(x, str)}
        if not reasons:
            worst[name] = max(times)
        else:
            rank, words = next(iter(reasons.items()))
            worst[name] = f"{words} (rank {rank})" if times else words
    return worst


def said(outcomes: Mapping[str, float | str], titles: Mapping[str, Callable[[], str]] | None = None) -> Choice:
    """The fastest way (at least one has a time), and the words for all outcomes. titles: of ways that have another."""
    times = {name: ms for name, ms in outcomes.items() if isinstance(ms, float)}
    reasons = [words for words in outcomes.values() if isinstance(words, str)]
    ranking = sorted(times, key=times.__getitem__)
    named = {name: titles[name]() if titles and name in titles else name for name in ranking}
    return Choice(
        ranking[0], "; ".join([", ".join(f"{named[name]} {times[name]:.2f} ms" for name in ranking), *reasons])
    )
