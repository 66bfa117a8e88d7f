"""The projections of structured matrices: optima, exact recovery, what no restart beats, and edges."""

import math

import pytest
import torch

from fxaccel.errors import OptionError
from fxaccel.passes._target import DAMPING, Target, root
from fxaccel.passes.structured import EAGER, BlockLowRank, Butterfly, LowRank, Monarch, _descent, _peeling
from fxaccel.passes.structured._completion import Completion
from tests.helpers import thinned
from tests.passes.structured_members import (
    EPS,
    MEMBERS,
    SIZES,
    SMALL,
    D,
    draw,
    generator,
    gram,
    named,
    problem,
    weight,
)  # fmt: skip


def half(g):
    """The symmetric root, by another way than the fit takes."""
    values, vectors = torch.linalg.eigh(g)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def tail(matrix, rank):
    """The norm of the singular values after the first ones."""
    return torch.linalg.svdvals(matrix)[..., rank:].square().sum().sqrt()


def rounding(m):
    """A relative error that rounding alone can make: products and decompositions of these sizes."""
    return 16 * max(m.rows, m.columns) * EPS


# optima that are known


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_is_the_truncated_decomposition(size):
    m = LowRank(*size, max(1, min(size) // 2))
    w = weight(m)
    assert m.error(w, m.fit(w)) == pytest.approx(float(tail(w, m.rank) / w.norm()), abs=rounding(m))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_low_rank_with_a_gram_is_that_of_the_weight_times_its_root(size):
    m = LowRank(*size, max(1, min(size) // 2))
    w, g = weight(m), gram(m)
    seen = w @ half(g)
    # the damping moves the optimum; the objective there is off by its square at most
    least = float(tail(seen, m.rank) / seen.norm())
    assert m.error(w, m.fit(w, g), g) == pytest.approx(least, rel=1e-5, abs=math.sqrt(DAMPING))


def test_low_rank_factors_share_the_singular_values():
    m = LowRank(12, 9, 4)
    for g in (None, gram(m)):
        down, up = m.fit(weight(m), g)
        torch.testing.assert_close(torch.linalg.svdvals(down), torch.linalg.svdvals(up), rtol=1e-9, atol=0)


@pytest.mark.parametrize("m", [m for m in MEMBERS if isinstance(m, Monarch)], ids=named)
def test_monarch_truncates_each_slice(m):
    w, k, l = weight(m), m.blocks_in, m.blocks_out  # noqa: E741
    p, s = -(-m.columns // k), -(-m.rows // l)
    full = torch.zeros(s * l, k * p, dtype=D)
    full[: m.rows, : m.columns] = w
    tails = [
        tail(full[i::l, j * p : (j + 1) * p], m.rank) for i in range(l) for j in range(k)
    ]  # fmt: skip
    assert m.error(w, m.fit(w)) == pytest.approx(float(torch.stack(tails).norm() / w.norm()), abs=rounding(m))


@pytest.mark.parametrize("strides", [0, 1, 2])
def test_blocks_without_a_rank_take_their_places_of_the_weight(strides):
    m = BlockLowRank(15, 18, 4, strides, 0)
    w = weight(m)
    held = m.dense(EAGER, torch.ones(m.shapes[0], dtype=D)) != 0
    assert held.sum() == sum(
        len(range(4 * i, min(15, 4 * i + 4))) * len(range(5 * j, min(18, 5 * j + 5)))
        for i in range(4) for j in {i, *(i ^ 2**f for f in range(strides))}
    )  # fmt: skip
    torch.testing.assert_close(m.dense(EAGER, *m.fit(w)), w * held, rtol=0, atol=0)


# what is of the structure is found


@pytest.mark.parametrize("m", MEMBERS, ids=named)
def test_a_member_is_recovered_and_its_projection_stays(m):
    w = m.dense(EAGER, *draw(m))
    found = m.fit(w)
    assert [tuple(f.shape) for f in found] == list(m.shapes)
    assert m.error(w, found) <= rounding(m)


@thinned(6, m=[m for m in MEMBERS if m.columns < 64])
def test_a_member_is_recovered_with_a_gram(m):
    """As far as the gram sees: its directions span 2 powers of ten, the damping's more."""
    w, g = m.dense(EAGER, *draw(m)), gram(m)
    assert m.error(w, m.fit(w, g), g) <= math.sqrt(DAMPING)


@pytest.mark.parametrize("m", SMALL, ids=named)
def test_projecting_twice_is_projecting_once(m):
    once = m.dense(EAGER, *problem(m, False)[2])
    twice = m.dense(EAGER, *m.fit(once))
    assert float((twice - once).norm() / once.norm()) <= rounding(m)


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64])
def test_fourier_and_hadamard_matrices_are_butterflies(n):
    fourier = torch.fft.fft(torch.eye(n, dtype=torch.complex128))
    m = Butterfly(n, n, reversed=True)
    (twiddle,) = m.fit(fourier)
    assert twiddle.is_complex()
    assert m.error(fourier, (twiddle,)) <= rounding(m)
    hadamard = torch.ones(1, 1, dtype=D)
    while len(hadamard) < n:
        hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=D), hadamard)
    plain = Butterfly(n, n)
    assert plain.error(hadamard, plain.fit(hadamard)) <= rounding(m)


def test_the_nearer_order_of_features_is_found():
    fourier = torch.fft.fft(torch.eye(8, dtype=torch.complex128))
    assert Butterfly(8, 8).nearer(fourier).reversed
    assert Butterfly(8, 8, True).nearer(fourier).reversed
    plain = Butterfly(8, 8)
    assert not Butterfly(8, 8, True).nearer(plain.dense(EAGER, *draw(plain))).reversed


@pytest.mark.parametrize("order", ["first", "middle", "last"])
@pytest.mark.parametrize("zeros", [False, True], ids=["full", "zeros"])
def test_every_order_of_peeling_is_exact_on_products(order, zeros):
    m = Butterfly(32, 32)
    twiddle = torch.randn(m.shapes[0], generator=generator(), dtype=D)
    if zeros:
        twiddle = twiddle * (torch.rand(m.shapes[0], generator=generator(1)) < 0.6)
    w = m.dense(EAGER, twiddle)
    found = _peeling.multiplied(_peeling.peel(w[None], order))[0]
    assert float((found - w).norm()) <= rounding(m) * float(w.norm())


def test_a_complex_weight_is_fitted_with_a_complex_gram():
    m = Butterfly(8, 8)
    w = torch.randn(8, 8, generator=generator(), dtype=torch.complex128)
    x = torch.randn(8, 20, generator=generator(1), dtype=torch.complex128) * torch.arange(1, 9)[:, None]
    g = x @ x.mH
    plain, fitted = m.fit(w), m.fit(w, g)
    assert m.error(w, fitted, g) < 0.99 * m.error(w, plain, g)
    gap = ((w - m.dense(EAGER, *fitted)) @ x).norm() / (w @ x).norm()  # the gram is not the conjugate one
    assert m.error(w, fitted, g) == pytest.approx(float(gap), rel=1e-9)


# nothing near is better, and no restart


def rival(m, w, g, starts=50, steps=700):
    """The least error of many runs of Adam from random factors, the best of them refined by L-BFGS."""
    drawn = [m.random(float(w.square().mean()), generator(1000 + i), D) for i in range(starts)]
    factors = [torch.stack(parts).requires_grad_() for parts in zip(*drawn, strict=True)]
    seen = torch.eye(m.columns, dtype=D) if g is None else half(g)
    dense = torch.func.vmap(lambda *f: m.dense(EAGER, *f))
    optimiser = torch.optim.Adam(factors, lr=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = ((w - dense(*factors)) @ seen).square().sum((-2, -1))
        (loss.sum() / (w @ seen).square().sum()).backward()
        optimiser.step()
        rate.step()
    best = [tuple(f[i].detach() for f in factors) for i in loss.argsort()[:3]]
    target = Target.of(w, g)
    return min(m.error(w, m._descended(target, f, 200), g) for f in best)


QUICK = [(m, i % 4 == 2) for i, m in enumerate(SMALL) if i % 2 == 0]


@pytest.mark.parametrize(
    ("m", "weighted"),
    [
        pytest.param(
            m, g, id=f"{named(m)}-{'gram' if g else 'plain'}",
            marks=[] if (m, g) in QUICK else pytest.mark.slow,
        )
        for m in SMALL
        for g in (False, True)
    ],
)  # fmt: skip
def test_no_random_restart_ends_lower(m, weighted):
    w, g, found = problem(m, weighted)
    # both stop where ten steps gain 1e-8 of the squared error; the damping adds its own part
    assert m.error(w, found, g) <= rival(m, w, g) * (1 + 1e-6) + DAMPING


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "gram"])
@pytest.mark.parametrize("m", SMALL, ids=named)
def test_a_fit_is_stationary(m, weighted):
    """The gradient beside that of a random point: L-BFGS and the sweeps stop at their relative gain, 1e-8."""
    w, g, found = problem(m, weighted)
    target = Target.of(w, g)

    def slope(factors):
        factors = [f.clone().requires_grad_() for f in factors]
        loss = target.square(target.weight - m.dense(EAGER, *factors))
        return float(torch.cat([x.flatten() for x in torch.autograd.grad(loss, factors)]).norm())

    assert slope(found) <= 1e-4 * slope(m.random(1.0, generator(), D))


@pytest.mark.parametrize("norm", ["plain", "gram", "complex plain", "complex gram"])
@pytest.mark.parametrize("n", [2, 8, 32])
def test_a_butterfly_factor_is_set_to_its_least_squares(n, norm):
    m, dtype = Butterfly(n, n), torch.complex128 if "complex" in norm else D
    x = torch.randn(n, 2 * n, generator=generator(3), dtype=dtype)
    w, g = weight(m, dtype=dtype)[None], x @ x.mH if "gram" in norm else None
    (twiddle,) = torch.randn(1, *m.shapes[0], generator=generator(4), dtype=dtype)
    factors = [f.reshape(1, n >> (i + 1), 2**i, 2, 2) for i, f in enumerate(twiddle.unbind(1))]
    after, before = _peeling.suffixes(factors), _peeling.prefixes(factors)
    for i, factor in enumerate(factors):
        best = _peeling.solved(factor, after[i], before[i], w, g).requires_grad_()
        e = w - _peeling.multiplied([*factors[:i], best, *factors[i + 1 :]])
        (slope,) = torch.autograd.grad(((e if g is None else e @ g) * e.conj()).real.sum(), best)
        e = w - _peeling.multiplied(factors)
        scale = (e if g is None else e @ g).norm() * (before[i].norm() * after[i].norm())
        assert slope.norm() <= 1e-10 * scale  # the ridge is 1e-13 of the mean weight


@pytest.mark.parametrize("m", [m for m in SMALL if not isinstance(m, LowRank)], ids=named)
def test_sweeps_alone_come_near(m, monkeypatch):
    """Larger matrices have no more than sweeps."""
    w, g, found = problem(m, True)  # kept for all tests: not to be made after the change
    monkeypatch.setattr(_descent, "POLISH", 0)
    monkeypatch.setattr(_descent, "SWEEPS", 100)
    assert m.error(w, m.fit(w, g), g) <= 1.05 * m.error(w, found, g)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "gram"])
def test_a_low_rank_beside_blocks_is_set_to_its_least_squares_and_no_step_rises(weighted):
    m = BlockLowRank(12, 8, 4, 1, 2)
    w, g = weight(m), gram(m) if weighted else None
    problem = Completion(w, g, m._places(w.device), m.grid)
    up, down = (torch.randn(s, generator=generator(), dtype=D) for s in ((12, 2), (2, 8)))
    first = problem.square([up, down])
    up, down = problem.risen(up, down)
    with torch.enable_grad():
        value = problem.square([up.requires_grad_(), down])
        (slope,) = torch.autograd.grad(value, up)
    assert slope.norm() <= 1e-10 * first
    assert value <= first
    assert problem.square([up, problem.lowered(up, down)]) < value * 0.999


def test_a_butterfly_of_uncorrelated_inputs_starts_from_their_sizes():
    m = Butterfly(128, 128)  # over the size that has random starts
    w, size = weight(m), torch.logspace(0, -3, 128, dtype=D)[torch.randperm(128, generator=generator())]

    def least(w, starts):
        return float((w - _peeling.multiplied(starts)).square().sum((-2, -1)).amin())

    first, *rest = m._begun(w[None], torch.diag(size**2), 0)
    seen = [first * size.reshape(-1, 1, 1, 2), *rest]
    scaled = m._begun((w * size)[None], None, 0)
    assert least(w * size, seen) <= least(w * size, scaled) * (1 + rounding(m))


@pytest.mark.parametrize("last", [4.0, math.inf, math.nan])
def test_a_sweep_that_rises_is_not_taken(last):
    """By rounding, where it has converged, or to what is not finite."""
    moves = iter([torch.tensor([[2.0]]), torch.tensor([[last]])])
    begun = [torch.tensor([[5.0], [3.0]])]  # of a large matrix the best start alone is swept
    (found,) = _descent.alternate(
        lambda state: [next(moves)], lambda state: state[0] ** 2, begun, _descent.SMALL + 1, torch.ones(1)
    )
    assert found == 2


# more steps, and edges


@thinned(4, m=SMALL, weighted=[False, True])
def test_steps_never_make_it_worse_and_are_reported(m, weighted):
    w, g, found = problem(m, weighted)
    seen = []
    better = m.fit(w, g, steps=15, progress=lambda done, of: seen.append((done, of)))
    assert m.error(w, better, g) <= m.error(w, found, g) * (1 + 4 * EPS) + DAMPING
    assert seen[0] == (1, 16)
    assert seen[-1] == (16, 16)
    assert seen == sorted(seen)


def test_steps_help_where_the_projection_stopped_early():
    m = Butterfly(72, 72)  # over the size that is swept to the end
    w = weight(m)
    assert m.error(w, m.fit(w, steps=20)) < m.error(w, m.fit(w)) * (1 - 1e-5)


@thinned(4, m=SMALL)
def test_a_gram_helps_and_one_of_low_rank_is_taken(m):
    w, g, found = problem(m, True)
    plain, few = problem(m, False)[2], gram(m, rank=3)
    assert m.error(w, found, g) < m.error(w, plain, g)
    assert m.error(w, m.fit(w, few), few) < m.error(w, plain, few)


@pytest.mark.parametrize("columns", [4, 6])
def test_a_gram_of_low_rank_is_fitted_exactly_where_the_rank_suffices(columns):
    m = LowRank(8, columns, 3)
    g = gram(m, rank=3)
    for given in (g, g.float(), 1e-12 * g, 1e12 * g):
        # float32 has rounded the gram: its own directions then have sizes of its eps
        most = math.sqrt(DAMPING) if given.dtype == D else math.sqrt(columns * torch.finfo(torch.float32).eps)
        assert m.error(weight(m), m.fit(weight(m), given), g) <= most


@pytest.mark.parametrize("m", SMALL, ids=named)
def test_a_gram_of_nothing_is_no_gram(m):
    w, _, found = problem(m, False)
    none = torch.zeros(m.columns, m.columns)
    assert all(torch.equal(a, b) for a, b in zip(m.fit(w, none), found, strict=True))
    assert m.error(w, found, none) == 0


def test_a_gram_is_damped_by_a_part_of_its_mean_diagonal():
    w, g = torch.ones(2, 3), torch.diag(torch.tensor([6.0, 3.0, 0.0]))
    expected = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=D)) + DAMPING * torch.eye(3, dtype=D)
    torch.testing.assert_close(Target.of(w, g).gram, expected, rtol=4 * EPS, atol=0)


def test_a_gram_that_rounding_made_indefinite_has_a_root():
    x = torch.randn(30, 4, generator=generator(), dtype=torch.float32)
    g = (x @ x.T).to(D)
    g = (g + g.T) / 2 - 1e-6 * torch.eye(30, dtype=D)
    r = root(g)
    assert torch.equal(r, r.tril())
    assert (r.diagonal() > 0).all()
    assert float((r @ r.T - g).norm()) <= 2e-6 * math.sqrt(30)


@pytest.mark.parametrize("m", MEMBERS, ids=named)
def test_zero_is_fitted_by_zero(m):
    w = torch.zeros(m.rows, m.columns)
    found = m.fit(w)
    assert not m.dense(EAGER, *found).any()
    assert m.error(w, found) == 0


@thinned(4, m=SMALL, weighted=[False, True])
def test_it_is_deterministic_and_leaves_its_inputs_alone(m, weighted):
    w, g, one = problem(m, weighted)
    kept = w.clone(), None if g is None else g.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.inference_mode():
        two = m.fit(w, g)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(w, kept[0])
    assert g is None or torch.equal(g, kept[1])
    assert not any(f.requires_grad or f.is_inference() for f in (*one, *two))


@thinned(6, m=SMALL, dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_dtype_of_the_weight_and_its_rounding(m, dtype):
    w = weight(m, dtype=D).to(dtype).requires_grad_()
    found, wide = m.fit(w, steps=2), m.fit(w.double(), steps=2)
    assert all(f.dtype == dtype for f in found)
    # each entry is a sum of products of at most L factors, each of which is off by half an eps
    many = m._levels if isinstance(m, Butterfly) else 2
    most = many * torch.finfo(dtype).eps / 2 * 1.1
    gap = m.dense(EAGER, *(f.double() for f in found)) - m.dense(EAGER, *wide)
    bound = m.dense(EAGER, *(f.abs() for f in wide)) * most
    least = torch.finfo(dtype).smallest_normal * 8  # below it a float has an absolute rounding
    assert (gap.abs() <= bound + least).all()


def test_wrong_weights_and_grams_are_refused():
    m = LowRank(4, 6, 2)
    w = weight(m)
    with pytest.raises(OptionError, match=r"the weight is \[6, 4\], expected \[4, 6\]"):
        m.fit(w.T)
    with pytest.raises(OptionError, match=r"the gram is \[4, 4\], expected \[6, 6\]"):
        m.fit(w, torch.eye(4))
    with pytest.raises(OptionError, match=r"the gram is \[4, 4\], expected \[6, 6\]"):
        m.error(w, m.fit(w), torch.eye(4))
    with pytest.raises(OptionError, match="the weight holds values that are not finite"):
        m.fit(w / 0)
    with pytest.raises(OptionError, match="the gram holds values that are not finite"):
        m.fit(w, torch.eye(6) / 0)
    with pytest.raises(OptionError, match=r"complex.*, expected a real one"):
        m.fit(w, torch.eye(6, dtype=torch.complex64))
