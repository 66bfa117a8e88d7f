"""Structured matrices: sizes, texts and refusals; the linear against the dense one; what random() draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxaccel.errors import OptionError
from fxaccel.passes.structured import EAGER, KINDS, BlockLowRank, Butterfly, LowRank, Monarch
from fxaccel.pattern import Ops
from tests.helpers import thinned
from tests.passes.structured_members import MEMBERS, SIZES, SMALL, D, draw, generator, named


def test_kinds_are_named_as_users_name_them():
    assert {
        "low-rank": LowRank, "monarch": Monarch, "butterfly": Butterfly,
        "block-diagonal-low-rank": BlockLowRank,
    } == KINDS  # fmt: skip


def test_sizes_parameters_and_costs_follow_from_the_shapes():
    known = {
        LowRank(6, 10, 3): (((3, 10), (6, 3)), "low-rank(3)"),
        Monarch(8, 12, 4, 2, 3): (((4, 6, 3), (2, 4, 12)), "monarch(4 x 2 blocks, rank 3)"),
        Monarch(64, 64, 4, 4, 4): (((4, 16, 16), (4, 16, 16)), "monarch(4 blocks)"),
        Monarch(64, 64, 4, 4, 1): (((4, 4, 16), (4, 16, 4)), "monarch(4 blocks, rank 1)"),
        Butterfly(20, 11): (((2, 4, 8, 2, 2),), "butterfly(16)"),
        Butterfly(1, 1, reversed=True): (((1, 1, 1, 2, 2),), "butterfly(2, reversed)"),
        BlockLowRank(9, 10, 4, 1, 2): (
            ((4, 2, 3, 3), (2, 10), (9, 2)), "block-diagonal-low-rank(2 of 4 blocks, rank 2)",
        ),
        BlockLowRank(8, 8, 4, 0, 0): (((4, 1, 2, 2),), "block-diagonal-low-rank(1 of 4 blocks, rank 0)"),
    }  # fmt: skip
    for m, (shapes, text) in known.items():
        assert m.shapes == shapes
        assert str(m) == text
        assert len(m.parts) == len(shapes)
        assert m.parameters == sum(map(math.prod, shapes))
        assert m.flops == 2 * m.parameters  # each parameter is multiplied and added once a row
        assert m.nbytes(torch.bfloat16) == 2 * m.parameters


@pytest.mark.parametrize("m", MEMBERS, ids=named)
def test_random_factors_have_the_shapes(m):
    for dtype in (D, torch.float32, torch.bfloat16):
        factors = draw(m, dtype=dtype)
        assert [tuple(f.shape) for f in factors] == list(m.shapes)
        assert all(f.dtype == dtype for f in factors)
        assert tuple(m.dense(EAGER, *factors).shape) == (m.rows, m.columns)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: LowRank(0, 4, 1), "rows of a LowRank is 0, expected an integer from 1"),
        (lambda: LowRank(4, 6, 5), "rank of a LowRank is 5, expected an integer from 1 to 4"),
        (lambda: LowRank(4, 6, 0), "rank of a LowRank is 0"),
        (lambda: LowRank(4, 6, 2.0), r"rank of a LowRank is 2\.0"),
        (lambda: Monarch(4, 6, 7, 2), "blocks_in of a Monarch is 7, expected an integer from 1 to 6"),
        (lambda: Monarch(4, 6, 2, 0), "blocks_out of a Monarch is 0, expected an integer from 1 to 4"),
        (lambda: Monarch(4, 6, 2, 2, 3), "rank of a Monarch is 3, expected an integer from 1 to 2"),
        (lambda: Butterfly(4, 6, 1), "reversed of a Butterfly is 1, expected True or False"),
        (lambda: BlockLowRank(8, 8, 6, 0, 1), r"grid of a BlockLowRank is 6.*\n.*take 4 or 8"),
        (lambda: BlockLowRank(8, 8, 4, 3, 1), "strides of a BlockLowRank is 3, expected .* from 0 to 2"),
        (lambda: BlockLowRank(8, 8, 4, 1, 9), "rank of a BlockLowRank is 9, expected an integer from 0 to 8"),
        (lambda: LowRank.sized(8, 8, 1.0), r"the share is 1\.0, expected a number between 0 and 1"),
    ],
)
def test_impossible_sizes_are_refused(make, why):
    with pytest.raises(OptionError, match=why):
        make()


# sized


@thinned(
    2,
    kind=KINDS.values(),
    size=[*SIZES, (512, 512), (768, 3072), (1000, 1280), (50257, 768)],
    share=[0.5, 0.25, 0.125, 0.03],
)
def test_a_sized_member_keeps_to_its_share(kind, size, share):
    m = kind.sized(*size, share)
    if m is None:
        assert kind is Butterfly or share * math.prod(size) < 2 * sum(size)
        return
    assert (m.rows, m.columns) == size
    assert m.parameters <= share * m.rows * m.columns
    if kind is not Butterfly and min(size) >= 512:
        assert m.parameters >= 0.7 * share * m.rows * m.columns


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("size", [(512, 512), (768, 3072), (4096, 4096), (3072, 768)])
def test_sizes_of_large_matrices_fill_tiles_of_16(size, share):
    assert LowRank.sized(*size, share).rank % 16 == 0
    m = Monarch.sized(*size, share)
    assert not any(d % 16 for shape in m.shapes for d in shape[1:])
    m = BlockLowRank.sized(*size, share)
    assert not any(d % 16 for d in (*m.shapes[0][2:], m.rank))


def test_sized_members_are_the_published_ones():
    assert str(Monarch.sized(512, 512, 0.5)) == "monarch(4 blocks)"
    assert str(Monarch.sized(4096, 4096, 0.125)) == "monarch(16 blocks)"
    assert Monarch.sized(64, 64, 0.25) == Monarch(64, 64, 8, 8, 1)  # t = 1 and sqrt(n) blocks
    assert LowRank.sized(64, 64, 0.5) == LowRank(64, 64, 16)
    assert Butterfly.sized(64, 64, 0.1) is None
    assert BlockLowRank.sized(512, 512, 0.25) == BlockLowRank(512, 512, 16, 2, 16)


# the linear


def bound(m, x, factors, bias, dtype):
    """What rounding may make of y: of sums of so many terms, and of what lies between the factors."""
    absolute = m.dense(EAGER, *(f.double().abs() for f in factors))
    size = F.linear(x.double().abs(), absolute, None if bias is None else bias.double().abs())
    terms = sum(shape[-1] for shape in m.shapes) if not isinstance(m, Butterfly) else 2 * m.columns + 2
    summed = (terms + 8) * torch.finfo(torch.float32 if dtype.itemsize < 4 else dtype).eps
    # at most: two halves of the factors multiplied out, what is between, each of two terms, their sum
    stored = 5 * torch.finfo(dtype).eps / 2
    return (summed + stored) * 1.01 * size + 4 * torch.finfo(dtype).smallest_normal


@thinned(3, m=MEMBERS, dtype=[D, torch.float32, torch.bfloat16, torch.float16], lead=[(3,), (), (2, 5), (0,)])
def test_linear_is_the_linear_of_dense(m, dtype, lead):
    g = generator(5)
    factors = m.random(1 / m.columns, g, dtype)
    x = torch.randn(*lead, m.columns, generator=g).to(dtype)
    for bias in (None, torch.randn(m.rows, generator=g).to(dtype)):
        y = m.linear(EAGER, x, factors, bias)
        dense = m.dense(EAGER, *(f.double() for f in factors))
        expected = F.linear(x.double(), dense, None if bias is None else bias.double())
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert ((y.double() - expected).abs() <= bound(m, x, factors, bias, dtype)).all()


@pytest.mark.parametrize("m", SMALL, ids=named)
def test_a_graph_has_it_for_every_leading_size(m):
    """The linear of an exported program, rewritten by `linear` on nodes."""
    layer = nn.Linear(m.columns, m.rows)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    made = torch.export.export(layer, (torch.randn(3, 4, m.columns),), dynamic_shapes=(sizes,))
    graph = made.graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    factors = draw(m, dtype=torch.float32)
    root = made.graph_module
    with graph.inserting_before(node):
        held = []
        for name, factor in zip(m.parts, factors, strict=True):
            setattr(root, name, nn.Buffer(factor))
            held.append(graph.get_attr(name))
        op = Ops(lambda target, args, kwargs: graph.call_function(target, args, kwargs))
        node.replace_all_uses_with(m.linear(op, node.args[0], held, node.args[2]))
    graph.erase_node(node)
    root.recompile()
    dense = m.dense(EAGER, *factors)
    for lead in ((3, 4), (1, 7), (5, 2)):
        x = torch.randn(*lead, m.columns)
        (y,) = root(layer.weight, layer.bias, x)
        expected = F.linear(x.double(), dense.double(), layer.bias.double())
        assert ((y - expected).abs() <= bound(m, x, factors, layer.bias.detach(), torch.float32)).all()


@pytest.mark.parametrize("m", SMALL, ids=named)
def test_gradients_of_linear_are_those_of_dense(m):
    factors = [f.requires_grad_() for f in draw(m)]
    x = torch.randn(3, m.columns, dtype=D, requires_grad=True)
    y, z = m.linear(EAGER, x, factors, None), F.linear(x, m.dense(EAGER, *factors))
    way = torch.randn_like(y)
    for one, two in zip(*(torch.autograd.grad(v, [x, *factors], way) for v in (y, z)), strict=True):
        # sums of at most rows * columns products of entries of unit size
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


# training from scratch

DRAWS = 3000


def sample(m, variance, seed=0):
    """Dense matrices [DRAWS, rows, columns] of random factors."""
    g = generator(seed)
    return torch.stack([m.dense(EAGER, *m.random(variance, g, D)) for _ in range(DRAWS)])


def within(values, expected):
    """Whether means over the draws are as expected, by their own sampling error, which is to be small."""
    mean, error = values.mean(0), values.std(0) / math.sqrt(len(values))
    assert error.max() < 0.15 * expected
    # of normal means one in five hundred million is outside; these have heavier tails
    return bool(((mean - expected).abs() <= 6 * error).all())


RANDOM = [
    LowRank(6, 5, 2), Monarch(6, 8, 2, 3), Monarch(7, 9, 3, 2, 2), Butterfly(6, 8), Butterfly(10, 5, True),
]  # fmt: skip


@pytest.mark.parametrize("variance", [0.125, 3.0])
@pytest.mark.parametrize("m", RANDOM, ids=named)
def test_random_entries_have_mean_0_and_the_variance(m, variance):
    w = sample(m, variance)
    assert within(w.square(), variance)
    error = w.std(0) / math.sqrt(DRAWS)
    assert (w.mean(0).abs() <= 6 * error).all()


@pytest.mark.parametrize(
    "m", [BlockLowRank(8, 8, 4, 1, 2), BlockLowRank(11, 10, 4, 0, 1), BlockLowRank(8, 6, 2, 0, 0)], ids=named
)
def test_random_blocks_and_low_rank_have_it_on_the_mean_of_each_row(m):
    w = sample(m, 0.5)
    assert within(w.square().mean(-1), 0.5)
    held = (
        m.dense(EAGER, torch.ones(m.shapes[0], dtype=D), *(torch.zeros(s, dtype=D) for s in m.shapes[1:]))
        != 0
    )
    outside = w[:, ~held].square()
    assert within(outside, 0.25) if m.rank else not outside.any()
    inside = 0.5 * m.columns / held.sum(1, keepdim=True) / (2 if m.rank else 1) + (0.25 if m.rank else 0)
    assert within(w.square()[:, held] / inside.expand_as(held)[held], 1.0)


@pytest.mark.parametrize("m", [*RANDOM, BlockLowRank(8, 8, 4, 1, 2)], ids=named)
def test_activations_have_the_variance_that_a_dense_layer_gives(m):
    w = sample(m, 0.5, seed=1)
    x = torch.randn(DRAWS, m.columns, 4, generator=generator(2), dtype=D)
    assert within((w @ x).square().mean(-1), 0.5 * m.columns)


def test_a_random_butterfly_is_orthogonal_but_for_its_size():
    (twiddle,) = (m := Butterfly(16, 16)).random(1 / 16, generator(), D)
    w = m.dense(EAGER, twiddle)
    torch.testing.assert_close(w @ w.T, torch.eye(16, dtype=D), rtol=0, atol=1e-14)
    turns = torch.linalg.det(m.random(1 / 16, generator(), D)[0]).sign()
    assert {-1.0, 1.0} == set(turns.flatten().tolist())  # rotations and reflections


def test_random_follows_its_generator():
    for m in SMALL:
        one, two, other = (m.random(1.0, generator(s)) for s in (1, 1, 2))
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
