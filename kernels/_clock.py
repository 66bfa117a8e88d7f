"""The least time that each of several functions takes, run by turns in one process."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 5
LEAST = 2e-4  # seconds of a measurement on the CPU, below which its clock is too coarse


def least(runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """Milliseconds a call of each: of one thread's time on the CPU, between two events on a GPU.

    One thread, for with more the time would be that of waiting for the slowest, which depends on what else
    the machine does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return by_turns(runs, device, rounds)
    finally:
        torch.set_num_threads(threads)


def by_turns(runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS) -> list[float]:
    """`least` on as many threads as there are: of this one's time, which works or waits as the others do."""
    return [min(taken) for taken in all_of(runs, device, rounds)]


def all_of(
    runs: Sequence[Callable[[], Any]], device: torch.device, rounds: int = ROUNDS
) -> list[list[float]]:
    """What `by_turns` takes the least of: for each run, the times of all rounds."""
    clock = _on_gpu if device.type == "cuda" else _on_cpu
    repeats = [1] * len(runs)
    found: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):  # the first warms up
        for i, run in enumerate(runs):
            taken = clock(run, repeats[i])
            if turn:
                found[i].append(taken / repeats[i])
            elif device.type != "cuda":
                taken = clock(run, 1)
                repeats[i] = max(1, math.ceil(1000 * LEAST / max(taken, 1e-6)))
    return found


def _on_cpu(run: Callable[[], Any], repeat: int) -> float:
    start = time.thread_time()
    for _ in range(repeat):
        run()
    return 1000 * (time.thread_time() - start)


def _on_gpu(run: Callable[[], Any], repeat: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeat):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
