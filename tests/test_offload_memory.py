"""When values that are moved to the host take memory of the device, and how they come back."""

import pytest
import torch

from fxaccel.offload import STEPS, Host, Layout, Pinned
from fxaccel.schedule import Moved, Schedule
from tests.helpers import Method
from tests.offloading import Watched, moving, place, places, watching
from tests.random_graphs import (
    Captured,
    Outcome,
    alive_after,
    chain,
    equal,
    grads,
    identical,
    linears,
    listed,
    loss,
)


@pytest.fixture
def log(monkeypatch):
    return watching(monkeypatch)


# -- when ------------------------------------------------------------------------------------------


def test_memory_is_free_between_forward_and_backward(log):
    step = chain()
    alive = {}
    for names in ((), ("tanh",), ("sigmoid",), ("tanh", "sigmoid")):
        forward = step.emitted(moving(step, names))
        alive[names] = alive_after(step, forward)
    assert alive[()] == 2 * 6 * 16 * 4 + 6 * 4 * 4  # tanh, sigmoid and the result
    assert {alive[()] - live for names, live in alive.items() if len(names) == 1} == {6 * 16 * 4}
    assert alive["tanh", "sigmoid"] == 6 * 4 * 4


def test_the_peak_falls_by_what_is_away(log):
    layers = linears(*[64] * 9)

    def forward(m, x):
        for i in range(8):
            x = m.get_submodule(f"l{i}")(x).tanh()
        return x.square().mean()

    step = Captured(Method(forward, **layers), torch.randn(256, 64))
    names = [n.name for n in step.program.graph.nodes if n.name.startswith("tanh")][:4]
    size = 256 * 64 * 4
    assert step.peak() - step.peak(moving(step, names)) == 4 * size


@pytest.mark.parametrize("fetch", ["exp", "linear_2", "linear_1", "tanh"])
def test_the_copy_back_begins_where_the_schedule_says(fetch, log):
    step = chain()
    made = Schedule(moved=(Moved("tanh", fetch, "tanh"),))
    identical(step.run(step.emitted(made)), step.run(step.emitted()))
    read = place(step, "linear_1")  # the first reader; the schedule may come too late for it
    assert places(log, "back") == [max(place(step, fetch), read)]


def test_a_copy_begins_later_where_autograd_does_not_come_to_the_call_that_is_said(log):
    model = Method(lambda m, x: m.l1(m.l0(x).tanh() + 1).exp(), **linears(8, 16, 4))
    step = Captured(model, torch.randn(6, 8))
    made = Schedule(moved=(Moved("tanh", "add", "tanh"),))  # an addition saves nothing
    identical(step.run(step.emitted(made)), step.run(step.emitted()))
    assert places(log, "back") == [place(step, "tanh")]


def test_memory_is_given_back_after_the_last_reader(log):
    step = chain(learns=True)
    made = Schedule(moved=(Moved("sigmoid", "exp", "sigmoid"),))
    alive = []

    class Asked(Watched):
        def arrive(self, index):
            super().arrive(index)
            alive.append((index, any(e[0] == "back" and e[2]() is not None for e in self.log)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxaccel.scheduled.Run", Asked)
        out = step.emitted(made)(*step.args)
        loss(out).backward(retain_graph=True)  # so that autograd's notes are all there
    first, last = place(step, "exp"), place(step, "sigmoid")
    assert {i for i, _ in alive} > {first, last, place(step, "linear")}
    assert all(there is (last <= i <= first) for i, there in alive)


def test_the_host_is_waited_for_some_calls_on_or_at_the_end(log):
    def forward(m, x):
        h = m.l0(x).tanh()
        for _ in range(STEPS):
            x = x + 1
        return (m.l1(h) * x.sum()).sigmoid()

    step = Captured(Method(forward, **linears(8, 16, 4)), torch.randn(6, 8))
    made = moving(step, ["tanh", "sigmoid"])
    step.emitted(made)(*step.args)
    first, second = places(log, "out")
    assert (first, second) == (place(step, "tanh"), place(step, "sigmoid"))
    assert places(log, "left") == [first + STEPS, second]


# -- how it lies -----------------------------------------------------------------------------------

STORED = torch.arange(24.0)
TENSORS = {
    "whole": STORED,
    "two-byte": STORED.bfloat16().view(4, 6),
    "part": STORED.view(4, 6)[1:3, 2:],
    "transposed": STORED.view(2, 3, 4).permute(2, 0, 1),
    "overlapping": STORED.as_strided((4, 6), (1, 2), 3),
    "expanded": STORED[:4].expand(3, 4),
    "another type": STORED.view(torch.int64),
    "conjugate": torch.view_as_complex(STORED.view(12, 2))[3:].conj(),
    "negative": torch.view_as_complex(STORED.view(12, 2)).conj().imag,
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_back_as_it_lay(name):
    tensor = TENSORS[name]
    made, storage = Layout.of(tensor), Host(tensor).storage()
    back = made.over(storage)
    assert Layout.of(back) == made
    assert torch.equal(back, tensor)
    assert back.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert back.untyped_storage().data_ptr() == storage.data_ptr()
    assert not tensor.numel() or back.data_ptr() != tensor.data_ptr()


# -- beside what a GPU computes --------------------------------------------------------------------


class Stream:
    """A stream that notes what is asked of it."""

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self):
        return f"what {self.name} has done after {len(self.notes)}"

    def wait_event(self, event):
        self.notes.append(f"{self.name} waits for {event}")


@pytest.fixture
def streams(monkeypatch):
    """Torch's streams replaced by some that take notes; memory is the processor's."""
    notes, empty, copy_ = [], torch.empty, torch.Tensor.copy_
    main, side, other = (Stream(name, notes) for name in ("main", "side", "other"))
    present = [main]

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            present.append(self.stream)

        def __exit__(self, *exc):
            present.pop()

    def copied(to, source, non_blocking=False):
        notes.append(f"{present[-1].name} copies{'' if non_blocking else ' and all wait'}")
        return copy_(to, source)

    def allocated(*size, pin_memory=False, **words):
        notes.append(f"{'pinned' if pin_memory else present[-1].name} memory")
        return empty(*size, **words)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: present[-1])
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: notes.append(f"{stream.name} reads"))
    return notes, side, other, On


def test_streams_wait_for_each_other(streams):
    notes, side, other, on = streams
    host = Pinned(tensor := torch.randn(5), side)
    out = "what side has done after 4"
    assert notes == ["main memory", "pinned memory", "side waits for main", "side copies"]
    assert host.leaving is not None  # its memory is in use
    notes.clear()
    host.left()
    host.left()
    assert notes == [f"main waits for {out}"]
    assert host.leaving is None
    notes.clear()
    host.begin()
    host.begin()
    assert notes == ["main memory", "side waits for main", "side copies"]
    done = "what side has done after 3"
    notes.clear()
    back = host.storage()
    assert notes == [f"main waits for {done}"]
    assert torch.equal(back.view(torch.float32), tensor)
    notes.clear()
    with on(other):
        host.storage()
    assert notes == [f"other waits for {done}", "other reads"]
    notes.clear()
    host.free()
    host.free()
    assert notes == [f"main waits for {done}"]
    assert host.back is None
    notes.clear()
    assert torch.equal(host.storage().view(torch.float32), tensor)  # a second backward
    assert notes == ["main memory", "side waits for main", "side copies", f"main waits for {done}"]


def test_memory_is_not_given_back_before_the_copy_is_done(streams):
    notes, side, _, _ = streams
    host = Pinned(torch.randn(5), side)
    host.begin()
    notes.clear()
    del host
    assert len(notes) == 2
    assert all(n.startswith("main waits for what side has done") for n in notes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_peak_falls_by_what_is_away():
    width, rows, count, away = 1024, 4096, 24, 6

    def forward(m, x):
        for i in range(count):
            x = m.get_submodule(f"l{i}")(x).tanh()
        return x.square().mean()

    model = Method(forward, **linears(*[width] * (count + 1))).cuda()
    step = Captured(model, torch.randn(rows, width, device="cuda"))
    calls = [c.name for c in step.profile.calls.values()]
    late = moving(step, [n for n in calls if n.startswith("tanh")][:away])
    assert len(late.moved) == away
    early = tuple(Moved(m.value, calls[calls.index(m.fetch) + 4], m.until) for m in late.moved)
    peaks, outcomes = [], []
    for schedule in (None, Schedule(moved=early), late):
        forward = step.emitted(schedule)
        for _ in range(3):  # memory that has been used before holds other numbers
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = step.run(forward)
            peak = torch.cuda.max_memory_allocated() - before
            outcomes.append(Outcome(*([t if t is None else t.cpu() for t in part] for part in found)))
            del found
        peaks.append(peak)
    for got in outcomes[1:]:
        identical(got, outcomes[0])
    size = rows * width * 4
    for peak in peaks[1:]:
        assert (away - 1) * size < peaks[0] - peak < (away + 1) * size
    total = loss(listed(forward(*step.args)))
    total.backward(retain_graph=True)
    want = grads(step.model)
    total.backward()
    equal(grads(step.model), want)
