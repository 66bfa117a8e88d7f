"""Writes that become new values, and near spellings of them that someone could tell from a new value."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxaccel.canonical import canonicalize
from fxaccel.capture import capture
from fxaccel.effects import mutated_arguments
from fxaccel.evaluate import run
from fxaccel.ir import Program
from fxaccel.listing import lines, listing
from tests.canonical_checks import check, larger, state_of
from tests.spellings import Function, Written

STATE = {"w": (6, 6), "b": (6,)}


def exactly(before: Program, after: Program, module: Written, leaves: list[Tensor]) -> None:
    """Outputs, what is written to, gradients, random numbers and who shares storage with whom, bit by bit."""
    seen = []
    for program in (before, after):
        state = {k: v.detach().clone() for k, v in state_of(before, module).items()}
        inputs = [x.clone() for x in leaves]
        torch.manual_seed(3)
        outputs = run(program, {k: v for k, v in state.items() if k in program.state}, inputs)
        tensors = [t for t in (*outputs, *inputs, *state.values()) if isinstance(t, Tensor)]
        places = [t.untyped_storage().data_ptr() for t in tensors]
        shared = [a == b for i, a in enumerate(places) for b in places[:i]]
        layouts = [(t.dtype, t.shape, t.stride()) for t in tensors]
        seen.append(([t.clone() for t in tensors], layouts, shared, torch.get_rng_state()))
    (old, *old_rest, old_random), (new, *new_rest, new_random) = seen
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
    assert old_rest == new_rest
    assert torch.equal(old_random, new_random)
    for a, b in zip(*(_gradients(p, before, module, leaves) for p in (before, after)), strict=True):
        assert (a is None) == (b is None), "a gradient came or went"
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


def _gradients(program: Program, source: Program, module: Written, leaves: list[Tensor]):
    """Of a weighted sum of the outputs, in double precision."""

    def leaf(t: Tensor, wanted: bool) -> Tensor:
        return t.detach().double().requires_grad_(wanted) if t.is_floating_point() else t.clone()

    state = {k: leaf(v, v.requires_grad) for k, v in state_of(source, module).items()}
    inputs = [leaf(x, source.grad) for x in leaves]
    torch.manual_seed(3)
    given = [x.clone() for x in inputs]  # which may be written to
    outputs = run(program, {k: v for k, v in state.items() if k in program.state}, given, double=True)
    total = sum((o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in outputs if o.requires_grad)
    wanted = [t for t in (*state.values(), *inputs) if t.requires_grad]
    return torch.autograd.grad(total, wanted, allow_unused=True) if isinstance(total, Tensor) else []


def settled(function: Function, *inputs: Tensor, train: bool = True) -> Program:
    """The canonical form, compared with what was captured at two sets of sizes."""
    torch.manual_seed(0)
    module = Written(function, STATE).train(train)
    given = list(inputs) or [torch.randn(2, 5, 6)]
    before = capture(module, tuple(x.clone() for x in given), {})
    after = before.copy()
    canonicalize(after)
    after.graph.lint()
    assert canonicalize(after) == []
    for leaves in (given, larger(before, given, 2)):
        exactly(before, after, module, leaves)
    return after


def writes(program: Program) -> list[str]:
    return [n.target._opname for n in program.graph.nodes if mutated_arguments(n)]


def ops(program: Program) -> list[str]:
    return [line.op.removeprefix("aten.") for _, line in lines(program)]


def after(*values):
    """The last of several expressions, evaluated in order."""
    return values[-1]


def filled(m, x, *fill):
    """A new tensor, `fill`ed in steps."""
    y = x.new_empty(*x.shape[:-1], 12)
    for where, what in fill:
        y[where] = what
    return y


def _twin_parts(m, x):
    y = x.new_empty(*x.shape[:-1], 12)
    y[..., :6], y[..., 6:] = x * 2, x.sin()
    return y.cos()


def _no_grad_mask(m, x):
    with torch.no_grad():
        mask = x.sin()
        mask.masked_fill_(x > 0, 0.5)
    return x * mask


def _rows(m, x):
    y = torch.zeros(3, 6)
    y[0], y[2], y[1] = m.b, m.b * 2, 3 * m.b.exp()
    return x.unsqueeze(-2) * y


# What becomes new values: the function, and operators that must then be there.
NEW = {
    "dropout_": (lambda m, x: F.dropout(x * 2, 0.5, True, inplace=True).sin(), ["dropout"]),
    "dropout_ of nothing": (lambda m, x: F.dropout(x * 2, 0.0, True, inplace=True).sin(), ["mul.Tensor"]),
    "dropout_ in eval": (lambda m, x: F.dropout(x * 2, 0.5, False, inplace=True).sin(), ["mul.Tensor"]),
    "dropout_ in eval of an input": (lambda m, x: F.dropout(x, 0.5, False, inplace=True).sin(), ["sin"]),
    "dropout_ in eval beside a view": (
        lambda m, x: after(
            y := x * 2, v := y[:, 1], z := F.dropout(y, 0.5, False, inplace=True), v + z[:, 0]
        ),
        ["add.Tensor"],
    ),
    "alpha_dropout_": (lambda m, x: F.alpha_dropout(x * 2, 0.5, True, inplace=True).sin(), ["alpha_dropout"]),
    "two dropouts": (
        lambda m, x: F.dropout(F.dropout(x * 2, 0.5, True, inplace=True).neg_(), 0.3, True, inplace=True),
        ["dropout", "dropout"],
    ),
    "rrelu_": (lambda m, x: F.rrelu(x * 2, training=True, inplace=True), ["rrelu"]),
    "pow_": (lambda m, x: (x * 2).pow_(2).sin(), ["pow.Tensor_Scalar"]),
    "cumsum_": (lambda m, x: (x * 2).cumsum_(-1).sin(), ["cumsum"]),
    "fill_": (lambda m, x: (x * 2).fill_(3.0) * x, ["fill.Scalar"]),
    "a strided value": (lambda m, x: (x @ m.w).transpose(0, 1)[..., :4].mul_(2) @ m.w[:4], ["linear"]),
    "a strided value, twice": (
        lambda m, x: (x @ m.w)[..., 1:].mul_(2).add_(1) @ m.w[1:],
        ["mul.Tensor", "add.Tensor"],
    ),
    "a result of another dtype": (lambda m, x: (x > 0).int().eq_(1).float() * x.detach(), ["eq.Scalar"]),
    "a number that rounds": (
        lambda m, x: (x > 0).half().add_((x > 1).float() / 3).long() + x.long(),
        ["add.Tensor", "to.dtype"],
    ),
    "inside of no_grad": (_no_grad_mask, ["where.ScalarSelf"]),
    "parts of one": (_twin_parts, ["cat"]),
    "parts out of order": (
        lambda m, x: filled(m, x, ((..., slice(6, None)), x), ((..., slice(None, 6)), x * 2)).sin(),
        ["cat"],
    ),
    "parts counted from the end": (
        lambda m, x: (
            filled(m, x, ((..., slice(None, -5)), x[..., :1].sin()), ((..., slice(-5, None)), 2 * m.b[1:]))
            * 2
        ),
        ["cat", "expand"],
    ),
    "parts, then a write": (
        lambda m, x: filled(m, x, ((..., slice(6)), x), ((..., slice(6, 12)), -x)).mul_(2).sin(),
        ["cat", "mul.Tensor"],
    ),
    "parts of another dtype": (
        lambda m, x: filled(m, x, ((..., slice(6)), x.double()), ((..., slice(6, 12)), (x > 0))).sin(),
        ["cat", "to.dtype"],
    ),
    "rows": (_rows, ["cat"]),
    "narrow": (
        lambda m, x: after(
            y := x.new_zeros(*x.shape[:-1], 8),
            y.narrow(-1, 0, 2).copy_(x[..., :2]),
            y.narrow(-1, 2, 6).copy_(x),
            y.exp(),
        ),
        ["cat"],
    ),
    "another layout that ends": (lambda m, x: (x * 2)[..., 1:].mul_(2).sin(), ["slice.Tensor", "sin"]),
}


@pytest.mark.parametrize("name", NEW)
def test_writes_become_values(name: str):
    function, want = NEW[name]
    program = settled(function)
    assert writes(program) == [], listing(program)
    for op in want:
        assert ops(program).count(op) >= want.count(op), listing(program)
    if "dropout" not in name and "rrelu" not in name:
        check(Written(function, STATE), [torch.randn(2, 5, 6)])


def _no_grad_write(m, x):
    y = x * m.b
    with torch.no_grad():
        y.mul_(2)
    return y.sin()


def _no_grad_chain(m, x):
    y = x * m.b
    with torch.no_grad():
        y.mul_(2).add_(1)
    return y.sin()


def _no_grad_detach(m, x):
    y = x * m.b
    with torch.no_grad():
        y.fill_(2)
    return y * x


def _autocast(m, x):
    y = x.mT @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return (x * 2).baddbmm_(x, y).sin()


def _half(m, x):
    return (x * m.b).half().mul_(m.b).sin()


def _changed_source(m, x):
    a = x * 2
    return after(
        y := x.new_empty(*x.shape[:-1], 12), y[..., :6].copy_(a), a[:, 0].zero_(), y[..., 6:].copy_(a), y * 1
    )


# What must stay: the function, and the writes that are left.
LEFT = {
    "an input": (lambda m, x: F.dropout(x, 0.5, True, inplace=True).sin(), ["dropout_"]),
    "a view of an input": (lambda m, x: after(x[:, 1:].mul_(2), x.sin()), ["mul_"]),
    "a view read later": (
        lambda m, x: after(y := x * 2, v := y[:, 1], F.dropout(y, 0.5, True, inplace=True), v),
        ["dropout_"],
    ),
    "a view that is an output": (lambda m, x: after(y := x * 2, v := y[..., 0], y.add_(1), (y, v)), ["add_"]),
    "a write through a view": (lambda m, x: after(y := x * 2, y[:, 1:].mul_(3), y.sin()), ["mul_"]),
    "a write through two views": (lambda m, x: after(y := x * 2, y[:, 1:][..., 0].exp_(), y.sin()), ["exp_"]),
    "a write through a detached value": (
        lambda m, x: after(y := x * 2, y.detach().mul_(3), y.add(1)),
        ["mul_"],
    ),
    "without gradients": (_no_grad_write, ["mul_"]),
    "twice without gradients": (_no_grad_chain, ["mul_", "add_"]),
    "filled without gradients": (_no_grad_detach, ["fill_"]),
    "an output in another layout": (lambda m, x: (x * 2)[..., 1:].mul_(2), ["mul_"]),
    "an output that follows the layout": (lambda m, x: (x * 2)[..., 1:].mul_(2).mT, ["mul_"]),
    "copies of another layout": (
        lambda m, x: after(y := (x * 2)[..., 1:].mul_(2), r := y.reshape(-1), s := y.reshape(-1, 5), (r, s)),
        ["mul_"],
    ),
    "a copy that is written": (
        lambda m, x: after(
            y := (x * 2)[..., 1:].mul_(2), r := y.reshape(-1), r[:3].mul_(2), y.sum() + r.sum()
        ),
        ["mul_", "mul_"],
    ),
    "strides that are read": (
        lambda m, x: (x * 2)[..., 1:].mul_(2).as_strided((2, 2), (6, 1)).sum(),
        ["mul_"],
    ),
    "random numbers in another order": (
        lambda m, x: F.dropout((x * 2).transpose(0, 1), 0.5, True, inplace=True).sin(),
        ["dropout_"],
    ),
    "random numbers behind another layout": (
        lambda m, x: F.dropout((x * 2)[..., 1:].mul_(2), 0.5, True).sum(),
        ["mul_"],
    ),
    "a rounded gradient": (_half, ["mul_"]),
    "autocast": (_autocast, ["baddbmm_"]),
    "noise": (lambda m, x: x * x.new_empty(x.shape).bernoulli_(0.5), ["bernoulli_"]),
    "uniform": (lambda m, x: x * x.new_empty(x.shape).uniform_(), ["uniform_"]),
    "zeroed": (lambda m, x: (x * m.b).zero_() + x, ["zero_"]),
    "a gap": (
        lambda m, x: filled(m, x, ((..., slice(5)), x[..., 1:]), ((..., slice(6, 12)), x))[..., :5].sin(),
        ["copy_", "copy_"],
    ),
    "a gap at the end": (
        lambda m, x: filled(m, x, ((..., slice(5)), x[..., 1:]), ((..., slice(5, 11)), x))[..., :11].sin(),
        ["copy_", "copy_"],
    ),
    "a part of a part": (
        lambda m, x: filled(
            m, x, ((..., slice(6)), x), ((..., slice(6, 12)), x), ((..., slice(3, 5)), x[..., :2])
        ).sin(),
        ["copy_"] * 3,
    ),
    "every other, then half": (
        lambda m, x: after(
            y := x.new_zeros(*x.shape[:-1], 12), y[..., ::2].copy_(x), y[..., 6:].copy_(-x), y.sin()
        ),
        ["copy_", "copy_"],
    ),
    "a product of what it is added to": (
        lambda m, x: after(z := x.detach().mT @ x.detach(), z.baddbmm_(z, z)) * m.b,
        ["baddbmm_"],
    ),
    "a product of a view of it": (
        lambda m, x: after(z := x.detach().mT @ x.detach(), z.baddbmm_(z.mT, z.detach())) * m.b,
        ["baddbmm_"],
    ),
    "an overlap": (
        lambda m, x: filled(m, x, ((..., slice(6)), x), ((..., slice(5, 12)), x[..., :1])).sin(),
        ["copy_", "copy_"],
    ),
    "one part twice": (
        lambda m, x: filled(
            m, x, ((..., slice(6)), x), ((..., slice(6, 12)), x), ((..., slice(6)), -x)
        ).sin(),
        ["copy_"] * 3,
    ),
    "a part read in between": (
        lambda m, x: after(
            y := x.new_zeros(*x.shape[:-1], 12), y[..., :6].copy_(x), s := y.sum(), y[..., 6:].copy_(x), y * s
        ),
        ["copy_", "copy_"],
    ),
    "a part read before": (
        lambda m, x: (
            after(
                y := x.new_zeros(*x.shape[:-1], 12),
                v := y[..., :6],
                y[..., 6:].copy_(x.detach()),
                v.copy_(-x.detach()),
                y * v.sum(),
            ).detach()
            * m.b.sum()
        ),
        ["copy_", "copy_"],
    ),
    "a source that changes": (_changed_source, ["copy_", "zero_", "copy_"]),
    "other dimensions": (
        lambda m, x: after(
            y := x.new_zeros(x.shape), y[..., :3].copy_(x[..., 3:]), y[:, 1:].copy_(x[:, 1:]), y.sin()
        ),
        ["copy_", "copy_"],
    ),
    "every other": (
        lambda m, x: filled(m, x, ((..., slice(0, None, 2)), x), ((..., slice(1, None, 2)), -x)).sin(),
        ["copy_", "copy_"],
    ),
    "a value that was there": (
        lambda m, x: after(y := x * 1.5, y[..., :3].copy_(x[..., 3:]), y[..., 3:].copy_(x[..., :3]), y.sin()),
        ["copy_", "copy_"],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_writes_that_are_left(name: str):
    function, want = LEFT[name]
    program = settled(function)
    assert writes(program) == want, listing(program)


def _halves(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    z[..., :2], z[..., 2:] = y[..., 4:], x[..., 2:]
    return z


# Each takes the module and two tensors of one shape [..., 6] and gives two of one shape again.
MOVES = [
    lambda m, x, y: (F.dropout(x * 2, 0.5, True, inplace=True), y),
    lambda m, x, y: (F.dropout(x + y, 0.0, True, inplace=True), x * 1),
    lambda m, x, y: ((x * m.b).mul_(y), y + 0),
    lambda m, x, y: (x.sin().add_(m.b).sigmoid_(), y),
    lambda m, x, y: ((x @ m.w)[..., 1:].mul_(y[..., :1]) @ m.w[1:], y),
    lambda m, x, y: (after(z := x * 3, z[..., 0].add_(1), z), y),
    lambda m, x, y: (_halves(x * 3, x, y), y),
    lambda m, x, y: (_halves(torch.empty_like(x), x, y), x),
    lambda m, x, y: (next(z + v.sum() for z in [x * 3] for v in [z[..., 1]] for _ in [z.add_(1)]), y),
    lambda m, x, y: (x.transpose(0, 1).contiguous().mul_(2).transpose(0, 1), y),
    lambda m, x, y: ((z := x * 2), z.masked_fill_(y > 0, 0.5) + y),
    lambda m, x, y: (F.linear(x, m.w, m.b).clamp_(-2, 2), F.relu_(y - 1)),
    lambda m, x, y: (x + 1, y.cumsum(-1).div_(3)),
    lambda m, x, y: (x, (y * 2).detach_().mul_(x)),
]


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, len(MOVES) - 1), min_size=1, max_size=5))
def test_random_writes(moves: list[int]):
    def function(m, x, y):
        x, y = x * m.b, y + m.b
        for i in moves:
            x, y = MOVES[i](m, x, y)
        return x.sin(), y * 2

    try:
        settled(function, torch.randn(2, 5, 6), torch.randn(2, 5, 6))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):  # else the model does not train as it is
            raise
