"""What a canonical form gets wrong silently: writes, aliases, randomness, regions, casts, rounding."""

from __future__ import annotations

import copy
import gc
import time

import pytest
import torch
from torch import Tensor, nn

import fxaccel
from fxaccel.canonical import canonicalize, steps
from fxaccel.capture import capture
from fxaccel.evaluate import run
from fxaccel.ir import Program
from fxaccel.listing import lines, listing
from tests import helpers
from tests.canonical_checks import check, state_of, text
from tests.spellings import Function, Written


def canonical_of(
    function: Function, *inputs: Tensor, train: bool = True, **state: tuple[int, ...]
) -> Program:
    """The canonical form of a function, its values checked."""
    module = Written(function, state).train(train)
    return check(module, list(inputs) or [torch.randn(2, 5, 12)])


def ops(program: Program) -> list[str]:
    return [line.op.removeprefix("aten.") for _, line in lines(program)]


IN_PLACE = {
    "relu_ of a temporary": (lambda m, x: torch.relu_(x * 2), ["mul.Tensor", "relu"]),
    "add_ read before and after": (
        lambda m, x: ((y := x * 2).exp(), y.add_(1).sin(), y.cos()),
        ["mul.Tensor", "exp", "add.Tensor", "sin", "cos"],
    ),
    "a view is read later": (
        lambda m, x: next(v for y in [x * 2] for v in [y.select(1, 0)] for _ in [y.add_(1)]),
        ["mul.Tensor", "select.int", "add_.Tensor"],
    ),
    "a slice is written": (
        lambda m, x: next(y for y in [x * 2] for _ in [y.narrow(1, 0, 2).add_(1)]),
        ["mul.Tensor", "narrow", "add_.Tensor"],
    ),
    "an input is written": (lambda m, x: x.add_(1) * 2, ["add_.Tensor", "mul.Tensor"]),
    "twice": (lambda m, x: (x * 2).add_(1).mul_(3).sin(), ["mul.Tensor", "add.Tensor", "mul.Tensor", "sin"]),
    "read between writes": (
        lambda m, x: next(a + y for y in [x * 2] for a in [y * 1] for _ in [y.select(1, 0).zero_()]),
        ["mul.Tensor", "mul.Tensor", "select.int", "zero_", "add.Tensor"],
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators(name: str):
    """A write becomes a new value only where nobody can tell."""
    function, want = IN_PLACE[name]
    program = capture(Written(function, {}), (torch.randn(2, 5, 12),), {})
    before = program.copy()
    canonicalize(program)
    assert sorted(ops(program)) == sorted(want), listing(program)
    x, y = (torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    old, new = run(before, state_of(before, Written(function, {})), [x]), run(program, {}, [y])
    for a, b in zip([*old, x], [*new, y], strict=True):
        torch.testing.assert_close(a, b)


ALIASES = {
    "x + 0": lambda m, x: x + 0,
    "x * 1": lambda m, x: (x * 1, x.sin()),
    "clone": lambda m, x: x.clone(),
    "two equal outputs": lambda m, x: (x * 2, x * 2),
    "a value and a copy": lambda m, x: (y := x * 2, y + 0),
    "dropout of nothing": lambda m, x: torch.nn.functional.dropout(x, 0.0, True),
    "a copied view": lambda m, x: x.transpose(1, 2).contiguous().view(-1),
    "casts there and back": lambda m, x: x.double().float(),
    "a cast with a copy": lambda m, x: x.to(torch.float32, copy=True),
}


@pytest.mark.parametrize("name", ALIASES)
def test_outputs_alias_what_they_did(name: str):
    program = capture(Written(ALIASES[name], {}), (torch.randn(2, 5, 12),), {})
    before = program.copy()
    canonicalize(program)
    x = torch.randn(3, 4, 12)

    def shared(p: Program) -> list[bool]:
        values = [x, *run(p, {}, [x])]
        places = [v.untyped_storage().data_ptr() for v in values]
        return [a == b for i, a in enumerate(places) for b in places[:i]]

    assert shared(program) == shared(before)


def test_random_operators_are_neither_merged_nor_moved():
    def function(m, x):
        drop = torch.nn.functional.dropout
        a, b = drop(x, 0.5, True), drop(x, 0.5, True)
        return b * 2, a * 3, drop((x @ m.w).view(-1, 12), 0.5, True).view(x.shape)

    program = canonical_of(function, w=(12, 12))
    assert ops(program).count("dropout") == 3


def test_a_dropout_that_is_rebuilt_draws_once():
    def function(m, x):
        y = x.transpose(1, 2).reshape(-1, 12)
        y = torch.nn.functional.dropout(torch.nn.functional.linear(y, m.w), 0.5, True)
        z = torch.nn.functional.dropout(x, 0.5, True)
        return y.view(x.shape[0], x.shape[1], 12) * 2, z

    program = canonical_of(function, torch.randn(2, 5, 4, 3), w=(12, 12))
    assert sorted(ops(program)) == ["dropout", "dropout", "linear", "mul.Tensor", "permute", "reshape"]


def test_regions_are_not_combined():
    def function(m, x):
        with torch.no_grad():
            a, gate = x.sin(), torch.sigmoid(x)
        return a + x.sin().exp(), x * gate

    program = canonical_of(function)
    assert sorted(ops(program)) == ["add.Tensor", "exp", "mul.Tensor", "sigmoid", "sin", "sin"]


def test_regions_stay_in_one_piece():
    def function(m, x):
        with torch.no_grad():
            a, b = x.sin() + m.w, x.cos() * m.w
        return b.exp() * a + x

    program = canonical_of(function, w=(12,))
    inside = ["grad" in line.regions for _, line in lines(program)]
    assert "".join("1" if i else "0" for i in inside).strip("0").count("0") == 0
    assert inside.count(True) == 4


def test_autocast_keeps_its_casts():
    def function(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.nn.functional.linear(x, m.w) + m.b
            return y.softmax(-1), x.exp() / x.exp().sum(-1, keepdim=True)

    before = capture(Written(function, {"w": (12, 12), "b": (12,)}), (torch.randn(2, 5, 12),), {})
    after = before.copy()
    canonicalize(after)
    assert [
        n.meta["val"].dtype for n in after.graph.nodes if n.op == "call_function" and "linear" in n.name
    ] == [torch.bfloat16]
    state, x = state_of(before, Written(function, {"w": (12, 12), "b": (12,)})), torch.randn(3, 4, 12)
    for a, b in zip(run(before, state, [x]), run(after, state, [x]), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _half_norm(m, x):
    f = x.float()
    return m.w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_of_a_norm(dtype: torch.dtype):
    module = Written(_half_norm, {"w": (12,)}, dtype)
    program = check(module, [torch.randn(2, 5, 12).to(dtype)])
    want = ["rms_norm"] if dtype is torch.float32 else ["to.dtype", "rms_norm", "to.dtype", "mul.Tensor"]
    assert ops(program) == want


@pytest.mark.parametrize(
    ("dtype", "ops_"), [(torch.float16, ["mul.Tensor", "matmul"]), (torch.bfloat16, ["matmul", "mul.Tensor"])]
)
def test_scales_in_half_precision(dtype: torch.dtype, ops_: list[str]):
    """In float16 the product of unscaled operands could overflow, in bfloat16 it cannot."""
    q, k = torch.randn(2, 3, 5, 4).to(dtype), torch.randn(2, 3, 4, 5).to(dtype)
    program = capture(Written(lambda m, q, k: (q * 0.3) @ k, {}), (q, k), {})
    canonicalize(program)
    assert ops(program) == ops_


def test_casts_that_lose_stay():
    program = capture(
        Written(lambda m, x: (x.half().float().sin(), x.double().float().cos(), x.double().half().exp()), {}),
        (torch.randn(2, 5),), {},
    )  # fmt: skip
    canonicalize(program)
    casts = [str(line.args) for _, line in lines(program) if line.op == "aten.to.dtype"]
    assert casts == ["%inputs, f16", "%to, f32"]


def test_rounding_before_an_integer_stays():
    """A division whose result is truncated keeps its last bit."""
    program = canonical_of(lambda m, x: (x.exp().log() / 2.0794 * 16).long())
    assert ops(program) == ["exp", "log", "div.Tensor", "mul.Tensor", "to.dtype"]


def test_training_keeps_its_effects():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
    before = capture(module, (torch.randn(2, 3, 5, 6),), {})
    after = before.copy()
    canonicalize(after)
    x = torch.randn(2, 3, 5, 6)
    states = []
    for program in (before, after):
        state = {k: v.detach().clone() for k, v in state_of(program, module).items()}
        torch.manual_seed(3)
        states.append([*run(program, state, [x]), *state.values()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_detach_stays_where_gradients_flow():
    program = canonical_of(lambda m, x: x * m.w.detach() + m.b.long().detach(), w=(12,), b=(12,))
    assert ops(program).count("detach") == 1


def test_the_form_does_not_depend_on_names_or_time():
    def one(m, x):
        a, b = torch.sin(x), torch.cos(x)
        return a * b + m.w

    def other(m, zebra):
        apple = torch.cos(zebra)
        return m.w + apple * torch.sin(zebra)

    first, second = (text(canonical_of(f, w=(12,))) for f in (one, other))
    assert first.replace("inputs", "x") == second.replace("inputs", "x")


def test_every_step_is_told():
    told = dict(steps())
    assert len(told) > 60
    assert all(sentence.endswith((".", ";")) or ";" in sentence for sentence in told.values())


@pytest.mark.slow
def test_time_is_linear():
    """Ten times the layers take about ten times as long."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    seconds = []
    for depth in (4, 40):
        model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(depth)))
        program = capture(model, (torch.randn(2, 5, 8),), {})
        seconds.append(min(taken(program.copy()) for _ in range(3)))
    assert seconds[1] < 25 * max(seconds[0], 0.02)


def taken(program):
    """CPU seconds of the canonical form, without the garbage of the tests before."""
    gc.collect()
    start = time.thread_time()
    canonicalize(program)
    return time.thread_time() - start


def test_nothing_compares_with_nan():
    function = lambda m, x: (x.masked_fill(~(x > 0), 5.0), torch.where(x < 0, 5.0, x))  # noqa: E731
    before = capture(Written(function, {}), (torch.randn(2, 5),), {})
    after = before.copy()
    canonicalize(after)
    x = torch.tensor([[float("nan"), 1.0, -1.0]] * 3)
    for a, b in zip(run(before, {}, [x]), run(after, {}, [x]), strict=True):
        assert torch.equal(a.nan_to_num(77), b.nan_to_num(77))


@pytest.mark.parametrize("name", ["amax", "amin"])
def test_reductions_over_all_dimensions_name_none(name):
    x = torch.randn(3, 4)
    fast = fxaccel.accelerate(helpers.Function(lambda x: getattr((x + 1).mT, name)()), [])
    assert torch.equal(fast(x), getattr(x + 1, name)())


def test_sizes_that_a_step_asks_for_in_vain_are_no_reason_to_go_on():
    """The reshape that an unflatten would be lays an output out otherwise, and has made two size nodes."""

    def function(x):
        y = x.unflatten(2, (-1, 2))
        return (y * 1.5).add_(y)

    program = capture(helpers.Function(function), (torch.randn(3, 6, 8),), {})
    canonicalize(program)
    assert ops(program) == ["unflatten.int", "mul.Tensor", "add.Tensor"]
