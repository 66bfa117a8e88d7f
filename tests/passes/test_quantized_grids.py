"""Grids: what is stored, and that weights are rounded to the nearest; scales; refusals of all methods."""

import math
from fractions import Fraction

import pytest
import torch

from fxaccel.errors import OptionError
from fxaccel.kernels._quantized import NF4, dequantized
from fxaccel.passes.quantized import Grid, Observer, awq, clipped, gptq, hqq, percentile, smooth
from tests.passes.quantized_weights import EPS, GRIDS, D, correlated, drawn, every, grids

FOUR = [g for g in GRIDS if g.bits == 4]


def apart(grid, scale, zero, rows, columns):
    """Scales and zeros of each element, [N, K] float64; zeros 0 where there are none."""
    wide = [(torch.zeros_like(scale) if t is None else t).double().expand(rows, -1) for t in (scale, zero)]
    return [t.repeat_interleave(grid.width(columns), 1)[:, :columns] for t in wide]


def possible(grid):
    """All levels of a grid, in the order of their codes; what is no number, of float8, left out."""
    if grid.format == "nf4":
        return torch.tensor(NF4).double()
    if grid.format == "float8":
        every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        return every[torch.isfinite(every)]
    top = 127 if grid.format == "int8" else 7
    return torch.arange(-8 if grid.zeros else -top, top + 1, dtype=D)


# grids


def test_names_sizes_and_bytes_follow_from_the_settings():
    known = {
        Grid("int8"): ("int8", 1, (3, 10), (3, 1), 3 * 10 + 3 * 4),
        Grid("int4", 4): ("int4-g4", 3, (3, 6), (3, 3), 3 * 6 + 9 * 2),
        Grid("int4", 64, True): ("int4-g64 with zeros", 1, (3, 32), (3, 1), 3 * 32 + 2 * 3 * 2),
        Grid("nf4"): ("nf4", 1, (3, 5), (3, 1), 3 * 5 + 3 * 2),
        Grid("float8", 4): ("float8-g4", 3, (3, 10), (3, 3), 3 * 10 + 9 * 4),
        Grid("float8", -1): ("float8 of the tensor", 1, (3, 10), (1, 1), 3 * 10 + 4),
    }
    for grid, (name, groups, q, scale, size) in known.items():
        parts = grid.empty(3, 10)
        assert str(grid) == name
        assert grid.groups(10) == groups
        assert (tuple(parts.q.shape), tuple(parts.scale.shape)) == (q, scale)
        assert grid.nbytes(3, 10) == size
        assert grid.bits == (4 if grid.format in ("int4", "nf4") else 8)
    assert Grid("int4").empty(2, 5).q.shape == (2, 3)  # a row is whole bytes


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Grid("int3"), "the format is 'int3', expected one of int8, int4, nf4, float8"),
        (lambda: Grid("int8", -1), r"group of a grid of int8 is -1, expected an integer from 0"),
        (lambda: Grid("float8", -2), "group of a grid of float8 is -2, expected an integer from -1"),
        (lambda: Grid("int4", 7), "group of a grid of int4 is 7, expected an even integer from 0"),
        (lambda: Grid("int4", 8.0), r"group of a grid of int4 is 8\.0"),
        (lambda: Grid("nf4", 8, True), "zeros of a grid of nf4 is True, expected False: int4 alone has them"),
        (lambda: Grid("int4", 8, 1), "zeros of a grid of int4 is 1, expected True or False"),
        (lambda: Grid("int8").nbytes(0, 4), "rows of a weight are 0, expected an integer from 1"),
        (lambda: Grid("int8").quantize(drawn(2, 3, 4)), r"the weight is torch.float32 \[2, 3, 4\], expected"),
        (lambda: Grid("int8").quantize(torch.zeros(0, 4)), r"is torch.float32 \[0, 4\]"),
        (lambda: Grid("nf4").quantize(torch.tensor([[3.4e38]])), r"the scale is not finite in .*bfloat16"),
        (lambda: percentile(Grid("int8"), drawn(2, 2), 0.0), r"the share is 0\.0, expected"),
        (lambda: hqq(Grid("int8"), drawn(2, 2), 1.0), r"p is 1\.0, expected a number between 0 and 1"),
        (lambda: gptq(Grid("int8"), drawn(2, 2), torch.eye(2), damp=-1), "damp is -1, expected"),
        (lambda: gptq(Grid("int8"), drawn(2, 2), torch.eye(2), order="x"), "the order is 'x', expected"),
        (lambda: gptq(Grid("int8"), drawn(2, 2), torch.eye(3)), r"the gram is \[3, 3\], expected \[2, 2\]"),
        (lambda: awq(Grid("int8"), drawn(2, 2)), "neither a gram nor sizes of the inputs are given"),
        (lambda: awq(Grid("int8"), drawn(2, 2), sizes=-torch.ones(2)), "that are negative or not finite"),
        (lambda: smooth(torch.ones(3), [drawn(2, 2)]), r"the sizes of inputs are \[3\], expected \[2\]"),
        (lambda: smooth(torch.ones(2), [drawn(2, 2), drawn(2, 3)]), r"is \[2, 3\], expected \[N, 2\]"),
        (lambda: smooth(torch.ones(2), []), "there are no weights"),
        (lambda: smooth(torch.ones(2), [drawn(2, 2)], 1.5), r"the strength is 1\.5, expected"),
        (lambda: Observer("median"), "the method is 'median', expected one of"),
        (lambda: Observer(bins=100), "there are 100 bins, expected a power of two"),
        (lambda: Observer(share=2.0), r"the share is 2\.0"),
        (lambda: Observer().add(torch.tensor([1.0, math.nan])), "hold some that are not finite"),
        (lambda: Observer().scale(), "nothing was observed"),
    ],
)
def test_what_makes_no_sense_is_refused(make, why):
    with pytest.raises(OptionError, match=why):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "method", [Grid.quantize, percentile, clipped, hqq, lambda g, w: gptq(g, w, torch.eye(4)),
               lambda g, w: awq(g, w, torch.eye(4)), lambda g, w: smooth(torch.ones(4), [w])],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused(method, bad):
    w = drawn(3, 4)
    w[1, 2] = bad
    with pytest.raises(OptionError, match=r"holds 1 values that are not finite, the first at \[1, 2\]"):
        method(Grid("int4", 2), w)


@every
@grids
def test_parts_are_of_the_shapes_and_dtypes_and_kernels_read_the_same_values(grid, weight):
    rows, columns = weight.shape
    parts, meta = grid.quantize(weight), grid.empty(rows, columns)
    for part, expected in zip(parts, meta, strict=True):
        assert (part is None) == (expected is None)
        if part is not None:
            assert (part.shape, part.dtype, part.is_contiguous()) == (expected.shape, expected.dtype, True)
    assert parts.nbytes == grid.nbytes(rows, columns)
    values = grid.dense(parts, columns)
    assert torch.equal(values, grid.values(grid.codes(weight, parts.scale, parts.zero), *parts[1:]))
    assert torch.equal(values, dequantized(*parts, grid.format, grid.width(columns), columns, D))


@every
@grids
def test_values_are_the_nearest_that_the_stored_scale_has(grid, weight):
    parts, w = grid.quantize(weight), weight.double()
    scale, zero = apart(grid, parts.scale, parts.zero, *w.shape)
    gap = (w - grid.dense(parts, w.shape[1])).abs()
    nearest = (w[..., None] - (possible(grid) * scale[..., None] + zero[..., None])).abs().amin(-1)
    rounding = 8 * EPS * (w.abs() + zero.abs() + scale)  # of a quotient, a product and two sums, each eps / 2
    assert (gap <= nearest + rounding).all()
    if grid.format in ("int8", "int4"):
        # a stored scale or zero is off by half a bfloat16 eps, 2**-9: of 15 / 2 scales and of 8, below half a
        # step; so no end of a range is further off than what lies between two values
        assert (gap <= scale / 2 + rounding).all()


@every
@grids
def test_codes_are_those_of_exact_fractions(grid, weight):
    weight = weight.double()
    scale, zero = grid.scales(weight)
    levels = [Fraction(v) for v in possible(grid).tolist()]
    codes = grid.levels(grid.codes(weight, scale, zero))
    scales, zeros = apart(grid, scale, zero, *weight.shape)
    if grid.zeros:  # the difference is rounded to float64 first
        weight, zeros = weight - zeros, torch.zeros_like(zeros)
    for i, j in [(i, j) for i in range(weight.shape[0]) for j in range(weight.shape[1])]:
        t = Fraction(weight[i, j].item()) / Fraction(scales[i, j].item())
        assert codes[i, j].item() == float(slow(grid, levels, t))


def slow(grid, levels, t):
    """The nearest level, of two the one of even code; of float8 codes count from 0 on both sides."""
    first = 1 if grid.format == "int4" and not grid.zeros else 0

    def odd(place):
        return (place + first - (127 if grid.format == "int8" else 0)) % 2

    if grid.format == "float8":  # 127 numbers from 0, then those below it
        return min((abs(v - t), place % 127 % 2, place, v) for place, v in enumerate(levels))[-1]
    return min((abs(v - t), odd(place), v) for place, v in enumerate(levels))[-1]


@grids
def test_ties_go_to_even_codes(grid):
    levels = possible(grid).sort().values.unique()
    between = (levels[1:] + levels[:-1]) / 2
    one = torch.ones_like(grid.empty(1, len(between)).scale, device="cpu")
    codes = grid.codes(between[None], one, torch.zeros_like(one) if grid.zeros else None)
    assert grid.groups(len(between)) == one.shape[1]
    assert not (codes.view(torch.uint8) % 2).any()


@grids
def test_groups_of_zeros_are_exact(grid):
    parts = grid.quantize(torch.zeros(3, 9))
    assert (parts.scale == 1).all()
    assert not grid.dense(parts, 9).any()
    if parts.zero is not None:
        assert not parts.zero.any()


@pytest.mark.parametrize("grid", FOUR, ids=str)
def test_columns_behind_the_last_hold_what_zero_is_rounded_to(grid):
    w = drawn(3, 19).abs() + 0.5  # with zeros no range would reach 0 by itself
    parts = grid.quantize(w)
    held = grid.groups(19) * grid.width(19)
    behind = grid.dense(parts, held)[:, 19:]
    assert parts.q.shape[1] * 2 == held
    assert (behind.abs() <= parts.scale[:, -1:].double() / 2).all()
    assert grid.zeros or not behind.any()
    assert torch.equal(parts.q[:, 0] & 15, grid.codes(w, *parts[1:])[:, 0])  # even columns are the low ones
    assert torch.equal(parts.q[:, 0] >> 4, grid.codes(w, *parts[1:])[:, 1])


# scales


@every
@grids
def test_shrunk_ranges_are_the_best_of_those_tried(grid, weight):
    factors, columns = (1.0, 0.8, 0.55), weight.shape[1]
    for gram in (None, correlated(columns)):
        found = loss(grid, weight, clipped(grid, weight, gram, factors[1:]), gram)
        w = grid.grouped(weight)
        low, high = grid.reduced(w.amin(-1), torch.amin), grid.reduced(w.amax(-1), torch.amax)
        tried = [loss(grid, weight, grid.fitting(low * f, high * f), gram) for f in factors]
        least = torch.stack(tried).amin(0)
        # sums of so many products, whose terms have both signs: by their sizes, which the first factor bounds
        size = loss(grid, weight, grid.fitting(low * 0.55, high * 0.55), gram, torch.abs)
        assert ((found - least).abs() <= 8 * (columns + 2) * EPS * size).all()


def loss(grid, weight, scales, gram, size=lambda t: t):
    """The squared error of each scale's weights: of groups one by one."""
    gap = size(weight.double() - grid.values(grid.codes(weight, *scales), *scales))
    width, found = grid.width(weight.shape[1]), []
    for e, at in zip(gap.split(width, 1), range(0, weight.shape[1], width), strict=True):
        g = torch.eye(e.shape[1], dtype=D) if gram is None else gram[at : at + width, at : at + width]
        found.append(((e @ size(g)) * e).sum(1))
    return grid.reduced(torch.stack(found, 1))


@grids
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_percentiles_are_those_of_sorted_weights(grid, share):
    for w in (drawn(4, 20), drawn(4, 16), drawn(1, 1)):
        scale, zero = percentile(grid, w, share)
        pieces = [p for row in w for p in row.split(grid.width(w.shape[1]))]
        pieces = [w.flatten()] if grid.group < 0 else pieces

        def reach(piece):
            return sorted(piece.tolist())[math.ceil(share * len(piece)) - 1]

        if grid.zeros:
            ends = [(-reach(p.neg().clamp_min(0)), reach(p.clamp_min(0))) for p in pieces]
        else:
            ends = [(0.0, reach(p.abs())) for p in pieces]
        low, high = torch.tensor(ends, dtype=D).reshape(*scale.shape, 2).unbind(-1)
        expected = grid.fitting(low, high)
        assert torch.equal(scale, expected[0])
        assert zero is None or torch.equal(zero, expected[1])
