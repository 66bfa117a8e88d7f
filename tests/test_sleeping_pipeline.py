"""The simulator beside steps that torch runs, in processes over gloo, with stages that sleep."""

import pytest

from tests.sleeping import measured, predicted

CASES = [
    ("1F1B", 3, 1, [(0.05, 0.03, 0.06), (0.04, 0.08, 0.05)]),
    ("InterleavedZeroBubble", 4, 1, [(0.05, 0.03, 0.06), (0.04, 0.08, 0.05)]),
]


def test_a_step_of_two_processes_takes_what_the_simulator_says(tmp_path):
    """The machine may be busy, so the fastest of some steps is taken; the bench has the medians."""
    found = measured(2, CASES, tmp_path, count=2)
    for (name, many, chunks, seconds), taken in zip(CASES, found, strict=True):
        assert min(taken) == pytest.approx(predicted(name, 2, many, chunks, seconds), rel=0.1)
