"""fake_quantize and fake_quantize_rows: values of the grid, gradients straight through and of scales."""

import itertools
import math

import pytest
import torch
from structured import DTYPES, within

from fxaccel.kernels import _fake, _fake_tiles, dequantize, fake_quantize_rows, quantize_rows
from fxaccel.kernels import fake_quantize as kernel
from fxaccel.passes.quantized import Grid
from tests.helpers import thinned

FLOAT8 = torch.float8_e4m3fn
D = torch.float64
ALL = [*DTYPES, D]
GRIDS = [
    Grid("int8"), Grid("int8", 7), Grid("int4"), Grid("int4", 8), Grid("int4", 8, True),
    Grid("int4", 0, True), Grid("nf4", 8), Grid("nf4"), Grid("float8"), Grid("float8", 8), Grid("float8", -1),
]  # fmt: skip
grids = pytest.mark.parametrize("grid", GRIDS, ids=str)
SHAPES = [(1, 1), (5, 20), (3, 123), (40, 64), (2, 300)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def stored(grid, columns):
    """format, group, zeros: as the operator takes them."""
    return grid.format, grid.group if grid.group < 0 else grid.width(columns), grid.zeros


def scales(grid, w, shrunk=0.6):
    """Scales too small for the largest weights of each group, and zeros off the middle."""
    scale, zero = grid.scales(w)
    scale = scale * shrunk
    return scale, None if zero is None else zero + scale


def units(grid, w, scale, zero):
    """(w - zero) / scale in float64, element by element."""
    each = torch.arange(w.shape[1]) // max(1, grid.width(w.shape[1])) % scale.shape[1]
    s, z = scale.double()[:, each], 0.0 if zero is None else zero.double()[:, each]
    return (w.double() - z) / s, s, z, each


def reach(grid):
    """Half a step beyond the ends, in units."""
    if grid.format == "nf4":
        t = torch.tensor(kernel._quantized.NF4, dtype=D)
        return float(t[0] - (t[1] - t[0]) / 2), float(t[-1] + (t[-1] - t[-2]) / 2)
    ends = {"int8": (-127.5, 127.5), "int4": (-8.5 if grid.zeros else -7.5, 7.5), "float8": (-464, 464)}
    return ends[grid.format]


@grids
@shapes
def test_values_are_those_of_the_grid(grid, shape):
    """In float64 the arithmetic is the grid's own: bit for bit, of scales that are observed and that clip."""
    for w in (drawn(*shape, dtype=D), drawn(*shape, dtype=D).abs() + 1, torch.zeros(shape, dtype=D)):
        given, (scale, zero) = stored(grid, shape[1]), scales(grid, w)
        want = grid.dense(grid.quantize(w), shape[1])
        assert torch.equal(kernel.op(w, None, None, *given), want)
        assert torch.equal(kernel.op(w, *grid.scales(w), *given), want)
        clipped = grid.dense(grid.quantize(w, (scale, zero)), shape[1])
        for f in (kernel.op, kernel.direct, kernel.reference):
            assert torch.equal(f(w, scale, zero, *given), clipped)
            assert torch.equal(f(w, scale.double(), zero, *given), clipped)


@thinned(3, shape=SHAPES, grid=GRIDS, dtype=DTYPES)
def test_values_in_other_dtypes(grid, shape, dtype):
    """fp32 rounds twice on the way to x, so that of two levels the farther is taken by 2 eps of x at most."""
    w, given = drawn(*shape, dtype=dtype), stored(grid, shape[1])
    for scale, zero in (grid.scales(w), scales(grid, w)):
        v = kernel.op(w, scale, zero, *given)
        x, s, z, _ = units(grid, w, scale, zero)
        levels = _fake.joined(
            _fake.nearest(_fake.units(w, scale, zero, *given[:2]), grid.format, grid.zeros).double(), x
        )
        far = (levels - x).abs() - (grid.nearest(x.clone()) - x).abs()
        assert (far <= 2 * torch.finfo(torch.float32).eps * x.abs()).all()
        fp32 = (levels.float() * s.float() + (z if zero is None else z.float())).to(dtype)
        assert torch.equal(v, fp32)
        q = grid.pack(grid.codes_of(levels), scale, zero)
        width = grid.width(shape[1])
        held = dequantize.op(q.q, scale, zero, grid.format, width, shape[1], dtype)
        assert torch.equal(v, held)


def test_ties_and_ends():
    def values(x, format, zeros=False, dtype=D):
        one, none = torch.ones(1, 1), torch.zeros(1, 1) if zeros else None
        return kernel.op(torch.tensor(x, dtype=dtype), one, none, format, -1, zeros).tolist()

    for dtype in (D, torch.float32):
        assert values([0.5, 1.5, 2.5, -0.5, -1.5, 7.4, 9.0, -7.4, -99.0], "int4", dtype=dtype) == [
            0, 2, 2, 0, -2, 7, 7, -7, -7,
        ]  # fmt: skip
        assert values([-7.6, -8.4, -9.0, 8.0], "int4", True, dtype) == [-8, -8, -8, 7]
        assert values([126.5, 127.5, -200.0, 0.4], "int8", dtype=dtype) == [126, 127, -127, 0]
        assert values([17.0, 19.0, 448.0, 470.0, -1e9, 2.0**-10, 3 * 2.0**-10], "float8", dtype=dtype) == [
            16, 20, 448, 448, -448, 0, 2.0**-8,
        ]  # fmt: skip
        table = list(kernel._quantized.NF4)
        middles = [(a + b) / 2 for a, b in itertools.pairwise(table)]
        want = [table[i + i % 2] for i in range(15)]
        got = values(middles, "nf4", dtype=dtype)
        held = torch.tensor(middles, dtype=dtype).double() == torch.tensor(middles, dtype=D)
        assert held.any()  # a middle that fp32 rounds is none any more
        assert [g for g, h in zip(got, held, strict=True) if h] == [
            w for w, h in zip(want, held, strict=True) if h
        ]
        assert values([-2.0, 2.0], "nf4", dtype=dtype) == [-1, 1]
    nan = torch.tensor([[math.nan, 1.0]])
    for format in kernel._quantized.FORMATS:
        assert kernel.op(nan, torch.ones(1, 1), None, format, 2).isnan().tolist() == [[True, False]]


def test_gradients_by_hand():
    """LSQ's formula on three weights: inside, on a level, and beyond the end."""
    w = torch.tensor([[0.3, 5.0, -9.0]], dtype=D, requires_grad=True)
    scale = torch.ones(1, 1, dtype=D, requires_grad=True)
    dw, ds = torch.autograd.grad(kernel.op(w, scale, None, "int4", 4), (w, scale), torch.ones(1, 3, dtype=D))
    assert dw.tolist() == [[1, 1, 0]]
    torch.testing.assert_close(ds.item(), (-0.3 + 0.0 - 7.0) / math.sqrt(3 * 7), rtol=1e-15, atol=0)
    zero = torch.zeros(1, 1, dtype=D, requires_grad=True)
    ds, dz = torch.autograd.grad(kernel.op(w, scale, zero, "int4", 4, True).sum(), (scale, zero))
    torch.testing.assert_close(ds.item(), (-0.3 + 0.0 - 8.0) / math.sqrt(21), rtol=1e-15, atol=0)
    torch.testing.assert_close(dz.item(), 1 / math.sqrt(21), rtol=1e-15, atol=0)


def expected(grid, w, scale, zero, dy):
    """The gradients by their definition, in float64, the absolute terms of sums, and how many they have."""
    x, _, _, each = units(grid, w, scale, zero)
    low, high = reach(grid)
    moves = (x > low) & (x < high)
    level = grid.nearest(x.clone())
    terms = dy.double() * torch.where(moves, level - x, level)
    beyond = torch.where(moves, 0.0, dy.double())
    # what is summed is off by what level - x is: 2 eps of x
    sizes = dy.double().abs() * torch.where(moves, x.abs() + level.abs(), level.abs())

    def summed(values):
        if grid.group < 0:
            return values.sum().view(1, 1)
        return torch.zeros(scale.shape, dtype=D).index_add_(1, each, values)

    n = summed(torch.ones_like(x))[:1] if grid.group >= 0 else torch.tensor([[float(x.numel())]], dtype=D)
    top = {"int8": 127, "int4": 7, "nf4": 1, "float8": 448}[grid.format]
    share = (n * top).rsqrt()
    sums = [(summed(terms) * share, summed(sizes) * share)]
    if zero is not None:
        sums.append((summed(beyond) * share, summed(beyond.abs()) * share))
    return torch.where(moves, dy, 0.0).to(w.dtype), sums, int(n.max())


def compare(grid, w, scale, zero, dy, dw, others):
    """fp32 (fp64) sums lose an eps a summand."""
    want, sums, n = expected(grid, w, scale, zero, dy)
    assert torch.equal(dw.cpu(), want)
    eps = torch.finfo(D if w.dtype == D else torch.float32).eps
    for got, (exact, terms) in zip(others, sums, strict=True):
        within(got, exact, terms, eps, n + 6)


def clear(grid, w, scale, zero):
    """w, where it is not as near to the middle of two levels or to the ends that fp32 decides otherwise."""
    x, *_ = units(grid, w, scale, zero)
    eps = 4 * torch.finfo(torch.float32).eps * x.abs()
    low, high = reach(grid)
    same = grid.nearest(x + eps) == grid.nearest(x - eps)
    ends = ((x - low).abs() > eps) & ((x - high).abs() > eps)
    return torch.where(same & ends, w, torch.zeros_like(w) if zero is None else (w * 0.999).to(w.dtype))


@thinned(3, shape=SHAPES, grid=GRIDS, dtype=ALL)
def test_gradients(grid, shape, dtype):
    w, given = drawn(*shape, dtype=dtype), stored(grid, shape[1])
    scale, zero = (None if t is None else t.to(D if dtype == D else torch.float32) for t in scales(grid, w))
    held = (scale, zero) if grid.bits == 8 else [t if t is None else t.bfloat16() for t in (scale, zero)]
    w = clear(grid, w, *held)
    dy = drawn(*shape, dtype=dtype, seed=1)
    leaves = [t.requires_grad_() for t in (w, scale, zero) if t is not None]
    for f in (kernel.op, kernel.direct):
        dw, *others = torch.autograd.grad(f(w, scale, zero, *given), leaves, dy)
        assert dw.dtype == dtype
        assert all(g.dtype == t.dtype and g.shape == t.shape for g, t in zip(others, leaves[1:], strict=True))
        compare(grid, w.detach(), *held, dy, dw, others)
    (only,) = torch.autograd.grad(kernel.op(w, *held, *given), [w], dy)
    assert torch.equal(only, dw)
    (alone,) = torch.autograd.grad(kernel.op(w.detach(), scale, zero, *given), [scale], dy)
    assert torch.equal(alone, others[0])


@grids
def test_observed_scales_let_every_gradient_through(grid):
    """Also that of the largest weights, of which a scale that was rounded falls short."""
    for seed in range(5):
        w = drawn(6, 40, seed=seed)
        w[2] = 0
        w[3] = w[3].abs() + 100
        w.requires_grad_()
        dy = drawn(6, 40, seed=1)
        (dw,) = torch.autograd.grad(kernel.op(w, None, None, *stored(grid, 40)), [w], dy)
        assert torch.equal(dw, dy)


def test_a_scale_that_has_passed_zero_comes_back():
    w = drawn(3, 8, dtype=D)
    scale = torch.full((3, 1), 0.2, dtype=D).requires_grad_()
    away = (-scale).detach().requires_grad_()
    one, other = (kernel.op(w, s, None, "int8", 8) for s in (scale, away))
    assert torch.equal(one, other)
    ds, back = torch.autograd.grad(one.sum() + other.sum(), (scale, away))
    assert torch.equal(ds, -back)
    assert ds.any()
    for format, least in (("int8", torch.float32), ("int4", torch.bfloat16)):
        tiny = kernel.op(w, torch.zeros(3, 1), None, format, 8)
        assert tiny.abs().max() == torch.finfo(least).smallest_normal * _fake.TOP[format]


def test_scales_count_as_they_will_be_stored():
    w, scale = drawn(4, 8), torch.full((4, 1), 0.1234567)
    for format, kind in (("int4", torch.bfloat16), ("nf4", torch.bfloat16), ("int8", torch.float32)):
        v = kernel.op(w, scale, None, format, 8)
        assert torch.equal(v, kernel.op(w, scale.to(kind).float(), None, format, 8))
    assert not torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0, 4)], ids=str)
def test_any_tensor_by_one_scale(shape):
    x = drawn(*shape).requires_grad_()
    scale = torch.tensor([0.01], requires_grad=True)
    v = kernel.op(x, scale, None, "int8", -1)
    assert v.shape == x.shape
    assert torch.equal(v, (x / scale[0]).round().clamp(-127, 127) * scale[0])
    dx, ds = torch.autograd.grad(v.sum(), (x, scale))
    assert torch.equal(dx, ((x / scale[0]).abs() < 127.5).float())
    assert ds.shape == scale.shape
    assert bool(ds.isfinite())


@thinned(3, shape=SHAPES, grid=GRIDS, dtype=DTYPES)
def test_launch(grid, shape, dtype, device):
    """Bit for bit but in bf16, which the interpreter truncates."""
    w, given = drawn(*shape, dtype=dtype), stored(grid, shape[1])
    dy = drawn(*shape, dtype=dtype, seed=1)
    for scale, zero in (grid.scales(w), scales(grid, w)):
        w = clear(grid, w, scale, zero)
        there = [None if t is None else t.to(device) for t in (w, scale, zero)]
        v, want = kernel.launch(*there, *given).cpu(), kernel.reference(w, scale, zero, *given)
        if dtype == torch.bfloat16 and device.type == "cpu":
            within(v, want, want.double().abs(), torch.finfo(dtype).eps, 1)
        else:
            assert torch.equal(v, want)
        seen = kernel.launch_backward(dy.to(device), *there, *given[:2], True)
        others = [g.cpu() for g in seen[1:] if g.numel()]
        assert [g.dtype for g in others] == [scale.dtype] * len(others)
        if scale.dtype == torch.float32:
            compare(grid, w, scale, zero, dy, seen[0], others)
        dw, *none = kernel.launch_backward(dy.to(device), *there, *given[:2], False)
        assert torch.equal(dw, seen[0])
        assert [g.numel() for g in none] == [0, 0]
        wide = [None if t is None else t.float() for t in there[1:]]
        seen = kernel.launch_backward(dy.to(device), there[0], *wide, *given[:2], True)
        compare(grid, w, scale, zero, dy, seen[0], [g for g in seen[1:] if g.numel()])
    assert torch.equal(kernel.launch(there[0], None, None, *given), kernel.launch(
        there[0], *_fake.observed(there[0], *given), *given
    ))  # fmt: skip


def test_launch_in_pieces(device, monkeypatch):
    monkeypatch.setattr(_fake_tiles, "TILE", 32)
    for grid in (Grid("int8"), Grid("int4", 50, True), Grid("float8", -1)):
        w, dy = drawn(3, 123), drawn(3, 123, seed=1)
        given, (scale, zero) = stored(grid, 123), scales(grid, w)
        w = clear(grid, w, scale, zero)
        there = [None if t is None else t.float().to(device) for t in (w, scale, zero)]
        assert torch.equal(kernel.launch(*there, *given).cpu(), kernel.reference(w, scale, zero, *given))
        seen = kernel.launch_backward(dy.to(device), *there, *given[:2], True)
        compare(grid, w, scale, zero, dy, seen[0], [g for g in seen[1:] if g.numel()])


def test_launch_keeps_nan(device):
    nan = torch.tensor([[math.nan, 1.0]], device=device)
    for format in kernel._quantized.FORMATS:
        v = kernel.launch(nan, torch.ones(1, 1, device=device), None, format, 2)
        assert v.isnan().tolist() == [[True, False]]


@grids
def test_strides_and_empty_weights(grid):
    w = drawn(20, 6).t()
    given, held = stored(grid, 20), scales(grid, w.contiguous())
    v = kernel.op(w, *held, *given)
    assert v.is_contiguous()
    assert torch.equal(v, kernel.op(w.contiguous(), *held, *given))
    before = w.clone()
    kernel.direct(w, *held, *given)
    assert torch.equal(w, before)
    for given_scales in (held, (None, None)):
        none = torch.zeros(0, 20, requires_grad=True)
        v = kernel.op(none, *(None if t is None else t[:0] for t in given_scales), *given)
        assert v.shape == (0, 20)
        v.sum().backward()
        assert none.grad.shape == (0, 20)


# of formats and dtypes the operator reads one at a time
CHECKED = [*((grid, torch.float16) for grid in GRIDS), *((Grid("int4", 8, True), d) for d in ALL)]


@thinned(3, checked=list(dict.fromkeys(CHECKED)))
def test_opcheck(checked):
    grid, dtype = checked
    w, given = drawn(6, 20, dtype=dtype), stored(grid, 20)
    wide = D if dtype == D else torch.float32
    scale, zero = (None if t is None else t.to(wide) for t in scales(grid, w))
    for grad in (False, True):
        args = [t if t is None else t.clone().requires_grad_(grad) for t in (w, scale, zero)]
        torch.library.opcheck(kernel.op, (*args, *given))
        torch.library.opcheck(kernel.op, (args[0], None, None, *given))
        torch.library.opcheck(kernel.backward_op, (w, w, scale, zero, *given[:2], grad))


def test_no_second_derivative():
    w, scale = drawn(2, 8, dtype=D).requires_grad_(), torch.ones(2, 1, dtype=D).requires_grad_()
    (dw,) = torch.autograd.grad(kernel.op(w, scale, None, "int8", 8).square().sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="FakeQuantize has no second derivative"):
        dw.sum().backward()


W, S = torch.empty(5, 10), torch.empty(5, 3)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((W.int(), S, None, "int8", 4), "w is torch.int32, not one of"),
        ((W, S, None, "int3", 4), "format 'int3' is not one of int8, float8, int4, nf4"),
        ((W, S, S, "int8", 4, True), "int8 has no zero"),
        ((W, S, S, "int4", 4), "zeros is False, with a zero beside a scale"),
        ((W, S, None, "int4", 4, True), "zeros is True, with no zero beside a scale"),
        ((W, None, S, "int4", 4, True), "zeros is True, with a zero beside no scale"),
        ((W, S, None, "int8", 0), "a group has 0 columns; the kernel takes at least 1, or -1 for one scale"),
        ((W[0], S, None, "int8", 4), "w has 1 dimensions; with groups the kernel takes 2"),
        ((W, S.int(), None, "int8", 4), "scale is torch.int32, not one of"),
        ((W, S, None, "int8", -1), "scale is [5, 3]; the kernel takes one element"),
        ((W, S[:, :2], None, "int8", 4), "scale is [5, 2]; w has 5 rows of 3 groups"),
        ((W, S, S[0], "int4", 4, True), "zero is [3]; w has 5 rows of 3 groups"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(W, S, None, "int8", 4)) == []
    assert list(kernel.unsupported(W, S, S, "int4", 4, True)) == []
    assert list(kernel.unsupported(W, None, None, "int4", 4, True)) == []
    assert list(kernel.unsupported(W.view(5, 2, 5), torch.empty(1), None, "int8", -1)) == []


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 123), (2, 5, 64), (0, 8), (4, 0)], ids=str)
def test_rows(shape, dtype, kind):
    x = drawn(*shape, dtype=dtype).requires_grad_()
    q, scale = quantize_rows.reference(x.detach(), kind)
    want = (q.to(scale.dtype) * scale).to(dtype)
    for f in (fake_quantize_rows.op, fake_quantize_rows.direct, fake_quantize_rows.reference):
        assert torch.equal(f(x.detach(), kind), want)
    v, dy = fake_quantize_rows.direct(x, kind), drawn(*shape, dtype=dtype, seed=1)
    assert torch.equal(v, want)
    assert torch.equal(torch.autograd.grad(v, x, dy)[0], dy)
    assert list(fake_quantize_rows.unsupported(x, kind)) == []
    assert any("is not one of" in s for s in fake_quantize_rows.unsupported(x, torch.int32))


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_launch_rows(dtype, kind, device):
    x = drawn(3, 123, dtype=dtype)
    assert torch.equal(
        fake_quantize_rows.launch(x.to(device), kind).cpu(), fake_quantize_rows.reference(x, kind)
    )


@pytest.mark.parametrize("kind", [torch.int8, FLOAT8], ids=str)
def test_rows_opcheck(kind):
    for dtype in ALL:
        for grad in (False, True):
            x = drawn(3, 20, dtype=dtype).requires_grad_(grad)
            torch.library.opcheck(fake_quantize_rows.op, (x, kind))
