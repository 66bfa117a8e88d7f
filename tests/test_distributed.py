"""Stages in processes of their own, over gloo: what they learn is what one process learns."""

import pytest

from fxaccel.pipeline.orders import ONE, SCHEDULES, TWO
from tests.pipeline_runs import MODELS, agree, prepared, run

PAIRS = [(s, c) for s in SCHEDULES for c in ((1,) if s in ONE else (2,) if s in TWO else (1, 2))]
"""Each schedule with the stages a process that it takes."""


def learn_alike(folder, size, names, steps):
    """All schedules on so many processes learn what one process does."""
    microbatches = {2: 4, 3: 6, 4: 8}[size]
    one = prepared(folder, names, 2 * size, 2 * microbatches, (size, 2 * size), steps)
    runs = [
        (f"{name}{chunks * size}.fxa", schedule, microbatches, (name,), steps)
        for name in names
        for schedule, chunks in PAIRS
    ]
    ranks = run(size, folder, runs)
    for file, schedule, _, (name,), _ in runs:
        agree(ranks, (file, schedule), one[name])


def test_two_processes_learn_what_one_does_under_every_schedule(tmp_path):
    learn_alike(tmp_path, 2, ("tied",), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_learn_what_one_does(tmp_path, size, name):
    learn_alike(tmp_path, size, (name,), 5)
