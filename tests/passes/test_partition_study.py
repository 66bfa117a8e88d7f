"""A pipeline is chosen: the fastest that fits, of stages that cost what a microbatch of their size does."""

import re

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.discover import resolve
from fxaccel.errors import OptionError
from fxaccel.passes import Partition
from fxaccel.passes._partition_study import sized
from fxaccel.profile import profile
from tests.helpers import session
from tests.passes.partition_models import Chain


def program_of(model, *args):
    return session(fxaccel.accelerate(model.train(), [], example_inputs=args, check=False)).all[0].program


@pytest.fixture(scope="module")
def program():
    return program_of(Chain((8, 64, 64, 64, 64, 32, 8)), torch.randn(8, 8))


def peak(found):
    return max(found.choice.simulated.peaks)


def test_less_memory_takes_longer_and_is_kept(program):
    def at(nbytes):
        memory = None if nbytes is None else f"{nbytes / 2**10}KiB"
        return Partition(stages=2, memory=memory, optimizer="adam").study(program, batch=8, schedule="1F1B")

    free = at(None)
    with pytest.raises(OptionError, match=r"expected a schedule within 1024\.0 bytes a rank") as error:
        at(2**10)
    least = int(re.search(r"the smallest cap that does is (\d+) bytes", str(error.value))[1])
    assert least < peak(free)
    tight = at(least)
    assert peak(tight) <= least
    assert tight.choice.simulated.seconds > free.choice.simulated.seconds
    between = at((least + peak(free)) // 2)
    assert peak(between) <= (least + peak(free)) // 2
    times = [s.choice.simulated.seconds for s in (free, between, tight)]
    assert times == sorted(times)


def test_a_cut_that_lacks_memory_is_made_again():
    """The embedding has most of the parameters and little of the time."""
    model = nn.Sequential(nn.Embedding(400, 8), *(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 1))
    words = program_of(model, torch.randint(0, 400, (64, 8)))
    only = {"microbatches": 4, "schedule": "1f1b"}
    free = Partition(stages=2).study(words, **only)
    assert free.plan.stages[0].held > free.plan.stages[1].held
    with pytest.raises(OptionError) as error:
        Partition(stages=2, memory="1KiB").study(words, **only)
    cap = int(re.search(r"the smallest cap that does is (\d+) bytes", str(error.value))[1])
    assert cap < peak(free)
    tight = Partition(stages=2, memory=f"{cap / 2**10}KiB").study(words, **only)
    assert peak(tight) <= cap
    assert tight.plan.order != free.plan.order


def test_each_device_has_its_own_memory():
    """Most of the parameters are the embedding's, for which the first device has too little."""
    model = nn.Sequential(nn.Embedding(400, 8), *(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 1))
    words, only = program_of(model, torch.randint(0, 400, (64, 8))), {"microbatches": 4, "schedule": "1f1b"}
    free = Partition(stages=2).study(words, **only).choice.simulated.peaks
    caps = free[0] - 1024, 2 * free[0]
    tight = Partition(stages=2, memory=[f"{c / 2**10}KiB" for c in caps]).study(words, **only)
    peaks = tight.choice.simulated.peaks
    assert all(p <= c for p, c in zip(peaks, caps, strict=True))
    assert peaks[1] > free[1]
    assert " each" not in str(tight.asked)
    again = resolve([tight.option])[0].plan(words)
    assert all(s.held <= c for s, c in zip(again.stages, caps, strict=True))
    with pytest.raises(OptionError, match=r"expected a schedule within \[1024\.0, 2097152\.0\] bytes"):
        Partition(stages=2, memory=["1KiB", "2MiB"]).study(words, **only)


def test_the_memory_of_a_device_is_that_of_its_stages():
    parted = Partition(stages=4, memory="6GiB|4GiB", schedule="zbvzerobubble").terms().memory
    assert parted == tuple(n * 2**30 for n in (3, 2, 2, 3))
    assert Partition(stages=2, memory=("6GiB", "4GiB")).terms().memory == (6 * 2**30, 4 * 2**30)
    with pytest.raises(OptionError, match=r"memory is of 3 devices, .* each of 2\n?.*hint: as memory="):
        Partition(stages=2, memory=["1GiB"] * 3).terms()
    with pytest.raises(OptionError, match="'six', expected bytes"):
        Partition(stages=2, memory=["6GiB", "six"])


def test_a_microbatch_costs_what_a_run_of_its_size_does(program):
    small = profile(sized(program, 4))
    again = profile(program_of(Chain((8, 64, 64, 64, 64, 32, 8)), torch.randn(4, 8)))
    assert [c.nbytes for c in small.calls.values()] == [c.nbytes for c in again.calls.values()]
    whole = profile(program)  # parameters are read whole by each
    assert sum(c.nbytes for c in small.calls.values()) > sum(c.nbytes for c in whole.calls.values()) / 2
    few, many = (Partition(stages=2).study(program, batch=64, microbatches=m) for m in (4, 32))
    assert many.choice.simulated.busy[0] > few.choice.simulated.busy[0]


def test_latency_takes_larger_microbatches(program):
    quick, slow = (
        Partition(stages=2).study(program, batch=64, latency=s, schedule="1F1B") for s in (0, 1e-3)
    )
    assert slow.choice.candidate.microbatches < quick.choice.candidate.microbatches


def test_a_fixed_batch_is_that_of_a_microbatch():
    fixed = program_of(Chain(), torch.randn(1, 8))
    found = Partition(stages=2).study(fixed, batch=4)
    assert {t.candidate.microbatches for t in found.choice.tried} == {4}
    assert found.choice.candidate.microbatches == 4
    other = program_of(Chain(), torch.randn(6, 8))
    with pytest.raises(OptionError, match=r"a batch of 6 cannot be cut into 4 .*\n?.*one of 1, 2, 3, 6"):
        Partition(stages=2).study(other, microbatches=4)
