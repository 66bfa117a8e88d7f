"""The choice between ways to compute one thing, and torch's attention as one of them."""

import math

import pytest
import torch

from fxaccel.kernels import _attention_torch, _fastest
from fxaccel.kernels import attention as kernel

SCALE = 0.3


def doubled(x, *rest):
    return x * 2


def added(x, *rest):
    return x + x


class Clock:
    """A timer that runs each way once and says what it is told."""

    def __init__(self, *times):
        self.times, self.calls = times, 0

    def __call__(self, runs):
        self.calls += 1
        self.results = [run() for run in runs]
        return list(self.times[: len(runs)])


def chooser(*times, fits=lambda *args: True):
    calls = []
    ways = {
        "first": lambda *a: calls.append("first") or doubled(*a),
        "second": lambda *a: calls.append("second") or added(*a),
    }
    clock = Clock(*times)
    return _fastest.Fastest("twice", ways, {"second": fits}, clock), clock, calls


@pytest.mark.parametrize(("times", "best"), [((1.0, 2.0), "first"), ((2.0, 1.0), "second")])
def test_the_faster_way_is_called_and_said(times, best):
    run, _, calls = chooser(*times)
    x = torch.randn(3, 5)
    assert torch.equal(run(x, [], "k <= q"), x * 2)
    assert calls[-1] == best
    del calls[:]
    run(x, [], "k <= q")
    assert calls == [best]
    (line,) = run.lines()
    other = {"first": "second 2 ms", "second": "first 2 ms"}[best]
    assert line == f"twice [4, 8] float32, k <= q: {best} 1 ms; {other}"


def test_like_sizes_are_tried_once_and_others_again():
    run, clock, _ = chooser(1.0, 2.0)
    for length in (5, 6, 8):
        run(torch.randn(3, length))
    assert clock.calls == 1
    for other in (torch.randn(3, 9), torch.randn(3, 5).double(), torch.randn(3, 5, requires_grad=True)):
        run(other)
    assert clock.calls == 4
    run(torch.randn(3, 5), 0.5)
    assert clock.calls == 5


def test_gradients_are_part_of_the_trial_and_leave_the_users_alone():
    run, clock, _ = chooser(1.0, 2.0)
    x = torch.randn(3, 5, requires_grad=True)
    out = run(x * 1)
    assert torch.equal(clock.results[0][0], torch.full((3, 5), 2.0))
    assert x.grad is None
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 5), 2.0))
    with torch.no_grad():
        run(x)
    assert clock.calls == 2
    assert [("with gradients" in line) for line in run.lines()] == [True, False]


def test_a_way_that_does_not_fit_is_neither_tried_nor_called():
    run, clock, calls = chooser(2.0, 1.0, fits=lambda x, *rest: x.shape[1] < 7)
    run(torch.randn(3, 8))
    assert (clock.calls, calls) == (0, ["first"])
    assert list(run.lines()) == ["twice [4, 8] float32: first; second does not fit"]
    run, clock, calls = chooser(2.0, 1.0, fits=lambda x, *rest: x.shape[1] < 7)
    run(torch.randn(3, 5))
    run(torch.randn(3, 8))  # alike, and yet it does not fit
    assert calls[-2:] == ["second", "first"]


def test_a_way_that_raises_is_left_out_and_said():
    def broken(x):
        raise torch.OutOfMemoryError("no memory")

    run = _fastest.Fastest("twice", {"first": doubled, "second": broken}, {}, Clock(1.0))
    assert torch.equal(run(torch.ones(2)), torch.full((2,), 2.0))
    assert list(run.lines()) == ["twice [2] float32: first 1 ms; second raises OutOfMemoryError"]


def test_an_error_of_the_call_itself_is_the_users_to_see():
    run, *_ = chooser(1.0, 2.0)
    with pytest.raises(TypeError):
        run(torch.ones(2), fits=1)
    ways = {"first": torch.linalg.inv, "second": torch.linalg.pinv}
    run = _fastest.Fastest("inverse", ways, {}, Clock(1.0, 2.0))
    with pytest.raises(RuntimeError):
        run(torch.zeros(2, 3))


def test_random_numbers_of_the_user_are_not_drawn_by_a_trial():
    run = _fastest.Fastest("drop", {"a": torch.rand_like, "b": torch.randn_like}, {}, Clock(1.0, 2.0))
    x = torch.ones(4)
    torch.manual_seed(0)
    got = run(x)
    torch.manual_seed(0)
    assert torch.equal(got, torch.rand_like(x))


def test_deterministic_algorithms_and_traces_take_the_first_untried():
    run, clock, calls = chooser(2.0, 1.0)
    torch.use_deterministic_algorithms(True)
    try:
        run(torch.randn(3, 5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (clock.calls, calls) == (0, ["first"])
    plain = _fastest.Fastest("twice", {"first": doubled, "second": added}, {}, Clock(2.0, 1.0))
    x = torch.randn(3, 5)
    torch.testing.assert_close(torch.compile(lambda x: plain(x), backend="eager", fullgraph=True)(x), x * 2)
    assert not plain.chosen


TEXTS = ["", "k <= q", "k <= q - 3", "t0[b, k]", "(k <= q) & t0[b, k]", "q // 4 == k // 4"]


@pytest.mark.parametrize("bias", ["", "t1[h, q, k]"])
@pytest.mark.parametrize("mask", TEXTS)
def test_torchs_attention_is_ours_where_it_fits(mask, bias):
    q, k, v = (torch.randn(2, h, 9, 8, dtype=torch.float64) for h in (4, 2, 2))
    padding = torch.rand(2, 9) > 0.4
    padding[1] = False
    table = torch.randn(4, 9, 9, dtype=torch.float64)
    table[1, 2] = -math.inf
    results = []
    for way in (_attention_torch.attention, kernel.reference):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, table)]
        out = way(*leaves[:3], [padding, leaves[3]], mask, bias, SCALE)
        grads = torch.autograd.grad(out.cos().sum(), leaves, allow_unused=True)
        results.append([out, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert not results[0][0].isnan().any()


@pytest.mark.parametrize(("options", "fitting"), [
    ({}, True), ({"mask": "k <= q"}, True), ({"mask": "t0[b, k]"}, True),
    ({"mask": "(k <= q) & t0[b, k]"}, False), ({"bias": "t0[b, k] * 1.0"}, True),
    ({"bias": "1.0 * (q - k)"}, True), ({"bias": "h * 1.0 * (q - k)"}, False),
    ({"softcap": 3.0}, False), ({"sinks": torch.zeros(2)}, False), ({"dropout": 0.1}, True),
    ({"empty": "mean", "mask": "t0[b, k]"}, False), ({"empty": "mean", "mask": "k <= q"}, True),
    ({"empty": "nan", "bias": "t0[b, k] * 1.0"}, False),
])  # fmt: skip
def test_where_torchs_attention_fits(options, fitting):
    """The mask must not be larger than q, k and v: 3 * 2 * 2 * 64 * 8 elements here."""
    q = torch.randn(2, 2, 64, 8)
    given = {"mask": "", "bias": ""} | options
    assert _attention_torch.fits(q, q, q, [torch.ones(2, 64)], scale=1.0, **given) == fitting
    wide = torch.randn(2, 2, 64, 64)
    if options == {"mask": "(k <= q) & t0[b, k]"}:
        assert _attention_torch.fits(wide, wide, wide, [torch.ones(2, 64)], scale=1.0, **given)
    assert not _attention_torch.fits(
        q.double(), q.double(), q.double(), [torch.ones(2, 64)], scale=1.0, **given
    )


def test_the_kernel_and_torch_are_the_ways_on_a_gpu():
    run = kernel.fastest()
    assert list(run.ways) == ["fxaccel", "SDPA"]
    run.timer = Clock(2.0, 1.0)
    q = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(
        run(q, q, q, [], "k <= q", "", SCALE), kernel.op(q, q, q, [], "k <= q", "", SCALE)
    )
    assert [line.split(":")[1].split()[0] for line in run.lines()] == ["SDPA"]
