"""Methods that quantize weights, against slow or direct ones; ranges of activations."""

import math

import pytest
import torch

from fxaccel.passes.quantized import (
    Grid,
    Observer,
    Parts,
    awq,
    clipped,
    distance,
    error,
    gptq,
    half_quadratic,
    hqq,
    smooth,
    smoothest,
)  # fmt: skip
from tests.passes.quantized_weights import EPS, GRIDS, D, correlated, drawn, every, grids, same, squares

# gptq


def published(grid, weight, gram, damp, order):
    """GPTQ by the root of the inverse, column by column: codes and scales."""
    w, columns = weight.double().clone(), weight.shape[1]
    places = gram.diagonal().argsort(descending=True) if order == "descending" else torch.arange(columns)
    h = gram[places][:, places]
    h = h + damp * h.diagonal().mean() * torch.eye(columns, dtype=D)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    width, (scale, zero) = grid.width(columns), grid.scales(weight)
    w, codes = w[:, places], torch.zeros(weight.shape, dtype=torch.uint8).view(grid.empty(1, 1).q.dtype)
    for k, place in enumerate(places.tolist()):
        at = place // width
        if order == "columns" and k % width == 0:
            now = grid.scales(w[:, k : k + width])
            if grid.group >= 0:
                scale[:, at] = now[0][:, 0]
            if zero is not None:
                zero[:, at] = now[1][:, 0]
        part = scale[:, at : at + 1], None if zero is None else zero[:, at : at + 1]
        code = Grid(grid.format, max(grid.group, 0), grid.zeros).codes(w[:, k : k + 1], *part)
        codes.view(torch.uint8)[:, place] = code.view(torch.uint8)[:, 0]
        e = (w[:, k] - grid.values(code, *part)[:, 0]) / upper[k, k]
        w[:, k + 1 :] -= e[:, None] * upper[k, k + 1 :]
    return codes, scale, zero


LONG = [*GRIDS, Grid("int4", 48), Grid("int4", 150), Grid("nf4", 64)]


@pytest.mark.parametrize("order", ["columns", "descending"])
@pytest.mark.parametrize("grid", LONG, ids=str)
def test_gptq_is_the_published_method(grid, order):
    w, gram = drawn(5, 330), correlated(330)
    parts = gptq(grid, w, gram, order=order)
    codes, scale, zero = published(grid, w, gram, 0.01, order)
    first, second = (
        squares(w - grid.values(c, *s), gram)
        for c, s in ((codes, (scale, zero)), (grid.codes(w, *grid.scales(w)), grid.scales(w)))
    )
    lower = first < second  # in the other rows rounding to nearest is kept
    assert lower.sum() >= 4
    assert torch.equal(grid.unpack(parts, 330)[lower].double(), codes[lower].double())
    if grid.group >= 0:
        assert torch.equal(parts.scale[lower], scale[lower])


GRAMS = {
    "correlated": correlated(40), "few inputs": correlated(40, 7), "one input": correlated(40, 1),
    "dead columns": correlated(40) * (torch.arange(40) % 5 > 0).outer(torch.arange(40) % 5 > 0),
    "none": torch.zeros(40, 40, dtype=D), "float32": correlated(40).float(),
}  # fmt: skip


@pytest.mark.parametrize("gram", GRAMS.values(), ids=list(GRAMS))
@pytest.mark.parametrize("order", ["columns", "descending"])
@grids
def test_gptq_is_never_worse_than_rounding_to_nearest_in_any_row(grid, order, gram):
    w = drawn(6, 40, seed=1)
    for damp in (0.01, 0):
        parts = gptq(grid, w, gram, damp=damp, order=order)
        found, plain = (squares(w - grid.dense(p, 40), gram.double()) for p in (parts, grid.quantize(w)))
        # a sum of 40 * 40 products: eps of the sizes of its terms
        size = squares((w - grid.dense(grid.quantize(w), 40)).abs(), gram.double().abs())
        assert (found <= plain + 1600 * EPS * size).all()
        assert torch.isfinite(parts.scale.float()).all()
        dead = gram.diagonal() == 0
        if order == "descending":  # scales are those of rounding to nearest, and so are codes of dead columns
            codes = grid.codes(w, parts.scale, parts.zero)
            assert torch.equal(grid.unpack(parts, 40)[:, dead].double(), codes[:, dead].double())
        assert same(parts, gptq(grid, w, gram, damp=damp, order=order))


@grids
def test_gptq_is_better_on_correlated_inputs(grid):
    w = drawn(16, 96, seed=3)
    for order in ("columns", "descending"):
        ratio = []
        for seed in range(3):
            gram = correlated(96, seed=seed)
            found, plain = gptq(grid, w, gram, order=order), grid.quantize(w)
            ratio.append(error(w, found, grid, gram) / error(w, plain, grid, gram))
        assert sum(ratio) / 3 < 0.9


@pytest.mark.parametrize(
    "scaler", [Grid.scales, *(pytest.param(s, marks=pytest.mark.slow) for s in (clipped, half_quadratic))]
)
@every
@grids
def test_gptq_of_independent_inputs_rounds_to_nearest(grid, weight, scaler):
    columns = weight.shape[1]
    gram = torch.diag(torch.linspace(0.5, 9, columns, dtype=D))
    for order in ("columns", "descending"):
        parts = gptq(grid, weight, gram, order=order, scaler=scaler)
        assert same(parts, grid.quantize(weight, scaler(grid, weight)))


def test_gptq_of_one_free_column_is_the_optimum():
    """With all codes but the last given, the last is the best there is: against all 15."""
    grid, w = Grid("int4", 0), drawn(8, 2, seed=2)
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=D)
    parts = gptq(grid, w, gram, damp=0)
    codes = grid.unpack(parts, 2)
    found = squares(w - grid.values(codes, parts.scale), gram)
    for code in range(1, 16):
        other = codes.clone()
        other[:, 1] = code
        # the rows where rounding to nearest was kept have an error that is not above GPTQ's
        assert (found <= squares(w - grid.values(other, parts.scale), gram) * (1 + 64 * EPS)).all()


@grids
def test_rows_do_not_depend_on_those_they_are_worked_on_with(grid):
    w, gram = drawn(1100, 130), correlated(130)  # more rows than any method takes at once
    for method in (
        Grid.quantize, hqq, lambda g, w: gptq(g, w, gram), lambda g, w: gptq(g, w, gram, order="descending"),
        lambda g, w: g.quantize(w, clipped(g, w)), lambda g, w: g.quantize(w, clipped(g, w, gram)),
    ):  # fmt: skip
        whole = method(grid, w)
        assert tuple(whole.q.shape) == tuple(grid.empty(*w.shape).q.shape)
        for at in (slice(0, 2), slice(1020, 1030)) if grid.group >= 0 else ():
            # sums of products are rounded in another order; what they decide is nowhere so close here
            assert same(method(grid, w[at]), [None if p is None else p[at] for p in whole])


# awq


@grids
def test_awq_of_no_exponents_rounds_to_nearest(grid):
    w = drawn(6, 40)
    parts, s = awq(grid, w, correlated(40), exponents=1)
    assert (s == 1).all()
    assert same(parts, grid.quantize(w))


@pytest.mark.parametrize("rows", [6, 1100])  # of so many the exponent is chosen by some
@grids
def test_awq_is_never_worse_and_better_where_inputs_differ(grid, rows):
    x = drawn(200, 24, seed=5, dtype=D) * torch.logspace(-1, 2, 24, dtype=D)
    x[:, 7] = 0
    both = {"gram": x.mT @ x, "sizes": x.abs().mean(0)}
    for w in (drawn(rows, 24), torch.zeros(rows, 24)):
        for told in ({"gram": both["gram"]}, {"sizes": both["sizes"]}, both):
            parts, s = awq(grid, w, **told)
            dense = grid.dense(parts, 24) / s
            gram = told.get("gram", torch.diag(x.abs().mean(0) ** 2))
            found, plain = (squares(w - v, gram).sum() for v in (dense, grid.dense(grid.quantize(w), 24)))
            assert found <= plain * (1 + 24 * 24 * EPS * 100)
            if w.any() and grid.format in ("int4", "nf4"):
                assert found < plain
            assert torch.isfinite(s).all()
            assert (s > 0).all()


# hqq


@every
@grids
def test_hqq_is_never_worse_in_its_norm(grid, weight):
    for p in (0.7, 0.4):
        found, plain = (distance(grid, weight, m, p) for m in (hqq(grid, weight, p), grid.quantize(weight)))
        # |w - w^| is exact to eps of w, and its power rounded: of an error near 0 all of eps**p may be that
        size = grid.reduced(grid.grouped(weight.double().abs()).sum(-1))
        assert (found <= plain + 8 * EPS * plain + grid.width(weight.shape[1]) * (8 * EPS * size) ** p).all()


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.format != "float8"], ids=str)
def test_hqq_is_better_of_weights_with_outliers(grid):
    w = drawn(8, 48) ** 3
    found, plain = (distance(grid, w, m).sum() for m in (hqq(grid, w), grid.quantize(w)))
    assert found < (0.97 if grid.zeros else 1) * plain


def test_hqq_sets_large_errors_aside_and_takes_the_mean_of_the_rest():
    grid, w = Grid("int4", 64, True), drawn(90, 64) ** 3
    scale, zero = half_quadratic(grid, w)
    first = grid.scales(w)
    assert torch.equal(scale, first[0])
    for i in range(90):
        s, z, beta, least, best = float(scale[i]), float(first[1][i]), 10.0, math.inf, None
        for _ in range(21):
            level = [max(-8, min(7, round((v - z) / s))) for v in w[i].tolist()]
            x = [(v - k * s - z) / s for v, k in zip(w[i].tolist(), level, strict=True)]
            if not (loss := sum(abs(e) ** 0.7 for e in x)) < least:
                break
            least, best = loss, z
            aside = [math.copysign(max(0.0, abs(e) - abs(e) ** -0.3 / beta), e) if e else 0.0 for e in x]
            rest = [v - e * s - k * s for v, e, k in zip(w[i].tolist(), aside, level, strict=True)]
            z, beta = float(torch.tensor(sum(rest) / 64, dtype=D).bfloat16()), beta * 1.01
        assert zero[i].item() == best


@grids
def test_hqq_knows_no_unit_and_no_other_rows(grid):
    w = drawn(8, 48)
    parts = hqq(grid, w)
    scaled = hqq(grid, w * 2.0**-9)
    assert same(scaled, Parts(parts.q, *(None if p is None else p * 2.0**-9 for p in parts[1:])))
    if grid.group >= 0:
        assert same(hqq(grid, w[3:5]), [None if p is None else p[3:5] for p in parts])


# smooth


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_leaves_products_as_they_were(strength):
    x, ws = drawn(30, 12, dtype=D), [drawn(5, 12, dtype=D), drawn(7, 12, seed=1, dtype=D)]
    x[:, 2], x[:, 5] = 0, x[:, 5] * 100
    for w in ws:
        w[:, 4] = 0
    s = smooth(x.abs().amax(0), ws, strength)
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    for w in ws:
        size = x.abs() @ w.mT.abs()
        assert ((x @ w.mT - (x / s) @ (w * s).mT).abs() <= (2 * 12 + 4) * EPS * size).all()
    most = torch.stack([w.abs().amax(0) for w in ws]).amax(0)
    live = (x.abs().amax(0) > 0) & (most > 0)
    expected = x.abs().amax(0) ** strength / most ** (1 - strength)
    torch.testing.assert_close(s[live], expected[live], rtol=8 * EPS, atol=0)


def test_smoothing_of_nothing_is_none():
    assert (smooth(torch.zeros(3), [drawn(2, 3)]) == 1).all()
    assert (smooth(torch.ones(3), [torch.zeros(2, 3)]) == 1).all()


def test_the_strength_is_the_best_that_is_tried():
    def loss(x, ws, s):
        gaps = (x @ w.double().mT - rounded(x / s) @ rounded(w * s).mT for w in ws)
        return sum(float(gap.square().sum()) for gap in gaps)

    def rounded(matrix):
        return Grid("int8").dense(Grid("int8").quantize(matrix), 24)

    ws = [drawn(8, 24), drawn(4, 24, seed=1)]
    x = drawn(50, 24, seed=2, dtype=D)
    x[:, ::6] *= 60
    s, strength = smoothest(x.abs().amax(0), ws, x)
    ones = torch.ones(24, dtype=D)
    assert loss(x, ws, s) < 0.2 * loss(x, ws, ones)
    tried = [loss(x, ws, smooth(x.abs().amax(0), ws, i / 20)) for i in range(21)]
    assert loss(x, ws, s) == min(tried)
    assert strength == tried.index(min(tried)) / 20
    s, strength = smoothest(x.abs().amax(0), ws, x, [])
    assert strength is None
    assert (s == 1).all()


# error


@grids
def test_errors_are_those_of_the_outputs(grid):
    w, x = drawn(6, 40), drawn(90, 40, dtype=D) * torch.linspace(0.1, 4, 40, dtype=D)
    parts = grid.quantize(w)
    gap = w.double() - grid.dense(parts, 40)
    assert error(w, parts, grid) == pytest.approx(float(gap.norm() / w.double().norm()), rel=240 * EPS)
    expected = float((gap @ x.mT).norm() / (w.double() @ x.mT).norm())
    # squares of 90 * 40 products; those of the gram add up without cancelling, of independent inputs
    assert error(w, parts, grid, x.mT @ x) == pytest.approx(expected, rel=3600 * EPS)
    assert error(torch.zeros(2, 4), grid.quantize(torch.zeros(2, 4)), grid) == 0
    assert error(torch.zeros(6, 40), parts, grid) == math.inf


def test_errors_of_many_columns_are_summed_by_blocks():
    grid = Grid("int4", 64)
    wide, wider = drawn(3, 2500), drawn(2500, 300, dtype=D)  # of several blocks
    gap, gram = wide.double() - grid.dense(grid.quantize(wide), 2500), wider @ wider.mT
    expected = math.sqrt(float((gap @ wider).square().sum() / (wide.double() @ wider).square().sum()))
    assert error(wide, grid.quantize(wide), grid, gram) == pytest.approx(expected, rel=2600 * 10 * EPS)


# observers


def seen(values, **settings):
    observer = Observer(**settings)
    for part in values:
        observer.add(part)
    return observer


def long_tailed(seed=0):
    return drawn(20_000, seed=seed) ** 3


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_observers_do_not_depend_on_parts_or_their_order(method):
    x = torch.cat([long_tailed(), torch.zeros(77), 1e-6 * drawn(50), torch.tensor([-3e5, 2.0**-140])])
    whole = seen([x], method=method)
    for parts in (x.split(997), x.flip(0).split(5000), x.sort().values.chunk(3), [x[:0], x]):
        other = seen(parts, method=method)
        assert (other.scale(), other.count, other.zeros) == (whole.scale(), whole.count, whole.zeros)
        assert torch.equal(other.counts, whole.counts)
        assert len(other.counts) == 2048
    assert method == "absmax" or int(whole.counts.sum()) + whole.zeros == whole.count == x.numel()


def test_absmax_is_the_largest():
    x = long_tailed()
    assert seen(x.split(100), method="absmax").scale() == float(x.abs().max()) / 127
    assert seen([x.bfloat16()], method="absmax").scale() == float(x.bfloat16().abs().max()) / 127


@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999, 1.0])
def test_percentiles_of_values_are_found_to_a_bin(share):
    x = torch.cat([long_tailed(), torch.zeros(5000)])
    exact = sorted(x.abs().double().tolist())[math.ceil(share * len(x)) - 1]
    observer = seen(x.split(3000), method="percentile", share=share)
    width = 2.0 ** math.frexp(float(x.abs().max()))[1] / 2048
    assert exact <= observer.scale() * 127 * (1 + EPS)
    assert observer.scale() * 127 <= exact + width * (1 + EPS)


def test_the_square_of_a_range_is_that_of_the_values_to_a_bin():
    for x, bins in ((long_tailed(), 2**14), (drawn(5000), 2048), (drawn(9).abs() * 1e-20, 64)):
        observer, x = seen([x], bins=bins), x.double()
        width = 2.0 ** math.frexp(float(x.abs().max()))[1] / bins
        reaches = [float(x.abs().max()) * 2 ** (-i / 32) for i in range(320)]

        def rms(reach, x=x):
            scale = reach / 127
            return float((x - (x / scale).round().clamp(-127, 127) * scale).square().mean().sqrt())

        # distances to a grid differ by no more than values do, a bin at most; so do their root mean squares
        for reach in reaches[::40]:
            assert abs(math.sqrt(observer.square(reach)) - rms(reach)) <= width * (1 + 1e-9)
        assert rms(observer.scale() * 127) <= min(map(rms, reaches)) + 2 * width * (1 + 1e-9)


def test_the_range_of_least_square_clips_what_is_far_off():
    x = drawn(100_000)
    x[0] = 40.0
    assert seen([x]).scale() * 127 < 30
    uniform = torch.linspace(-1, 1, 10_001)
    assert seen([uniform]).scale() * 127 == 1


def test_zeros_alone_have_a_scale_of_one_and_what_is_next_to_them_one_that_float32_holds():
    for method in ("absmax", "percentile", "mse"):
        assert seen([torch.zeros(3)], method=method).scale() == 1
        least = seen([torch.tensor([0.0, 1e-320], dtype=D)], method=method).scale()
        assert least == torch.finfo(torch.float32).smallest_normal
