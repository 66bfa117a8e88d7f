"""Schedules that move values to the host, and a host that is watched."""

import weakref

import torch

from fxaccel import recompute
from fxaccel.offload import Host, Mover
from fxaccel.replay import lazily, lives, write
from fxaccel.schedule import HIDDEN, Again, Moved, Schedule


def moving(step, names=None, dropped=frozenset()):
    """The schedule that moves values, those of these names or all that can be; others are dropped."""
    draft, calls = lazily(step.profile, dropped), step.profile.calls
    low, moved = lives(step.profile, draft).lowest, []
    for number, value in enumerate(step.profile.values):
        chosen = not value.name.endswith(HIDDEN) if names is None else value.name in names
        if chosen and number in low and number not in dropped:
            above = [c for c in calls if c >= max([low[number], *value.needed])]
            moved.append(Moved(value.name, calls[above[0]].name, calls[low[number]].name))
    made = write(step.profile, draft)
    return Schedule(made.dropped, made.again, tuple(moved))


class Elsewhere(Host):
    """A copy that torch does not know of, so that a meter does not count it."""

    def __init__(self, tensor, log, run):
        self.log, self.run = log, run
        super().__init__(tensor)

    def leave(self, whole):
        self.copy = whole.numpy().copy()

    def left(self):
        self.log.append(("left", self.run().step.index))

    def begin(self):
        if self.back is None:
            self.back = torch.empty(len(self.copy), dtype=torch.uint8)
            self.back.numpy()[:] = self.copy
            self.log.append(("back", self.run().place, weakref.ref(self.back.untyped_storage())))


class Watched(recompute.Run):
    """A run that notes what its copies do."""

    log: list

    def __init__(self, table):
        super().__init__(table)
        self.mover = mover = Mover()
        mover.host = lambda tensor: self.out(tensor, weakref.ref(self))

    def out(self, tensor, run):
        self.log.append(("out", self.step.index))
        return Elsewhere(tensor, self.log, run)

    def arrive(self, index):
        super().arrive(index)
        self.log.append(("arrive", index))


def watching(monkeypatch):
    """From now on runs note what their copies do: here."""
    found = []
    monkeypatch.setattr(Watched, "log", found, raising=False)
    monkeypatch.setattr("fxaccel.scheduled.Run", Watched)
    return found


def places(log, word):
    return [entry[1] for entry in log if entry[0] == word]


def place(step, name):
    return next(i for i, n in enumerate(step.program.graph.nodes) if n.name == name)


def mixed(fetch="linear_2"):
    """A schedule for `chain`: the second activation is computed again from the first, which was moved."""
    again = Again("linear_2", ("linear_1", "sigmoid"), (("sigmoid", "sigmoid"),))
    return Schedule(("linear_1", "sigmoid"), (again,), (Moved("tanh", fetch, "tanh"),))
