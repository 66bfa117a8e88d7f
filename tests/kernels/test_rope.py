"""rope: CPU and Triton kernels against the formula in float64, gradients, layouts and refusals."""

import pytest
import torch

from fxaccel.kernels import rope as kernel

WAYS = [(pairs, shared) for pairs in (False, True) for shared in (False, True)]


def angles(*shape, dtype=torch.float32, device="cpu"):
    """cos and sin of angles that differ in every place: those of two columns of a pair too."""
    at = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape) * 0.37
    return tuple(t.to(dtype).to(device) for t in (at.cos(), at.sin()))


def matrices(x, cos, sin, pairs, shared, inverse=False):
    """The formula, number by number: a matrix [D, D] for each row of x."""
    half = cos.shape[-1] if shared else cos.shape[-1] // 2
    made = torch.eye(x.shape[-1], dtype=torch.float64).repeat(*x.shape[:-1], 1, 1)
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if pairs else (i, half + i)
        at, to = (i, i) if shared else (a, b)
        made[..., a, a], made[..., a, b] = cos[..., at].double(), -sin[..., at].double()
        made[..., b, b], made[..., b, a] = cos[..., to].double(), sin[..., to].double()
    return made.mT if inverse else made


def check(got, x, *how):
    """Two products and a sum round, and the interpreter's bfloat16 truncates: 4 eps of the absolute terms."""
    got, x, *how = (t.detach().cpu() if isinstance(t, torch.Tensor) else t for t in (got, x, *how))
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    made, column = matrices(x, *how), x.double().unsqueeze(-1)
    want, terms = made @ column, made.abs() @ column.abs()
    assert ((got.double().unsqueeze(-1) - want).abs() <= 4 * torch.finfo(x.dtype).eps * terms).all()


@pytest.mark.parametrize(("pairs", "shared"), WAYS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("f", [kernel.compose, kernel.reference], ids=["compose", "reference"])
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
def test_on_the_cpu_it_is_the_formula(dtype, f, small, inverse, pairs, shared, monkeypatch):
    monkeypatch.setattr(kernel, "SMALL", 10**9 if small else 0)
    for columns, turned in ((8, 8), (9, 6), (2, 2)):
        x = torch.randn(2, 3, 5, columns).to(dtype)
        cos, sin = angles(5, turned // 2 if shared else turned, dtype=dtype)
        for y, z in zip(f([x, x[:, :1]], cos, sin, pairs, shared, inverse), (x, x[:, :1]), strict=True):
            check(y, z, cos, sin, pairs, shared, inverse)


@pytest.mark.parametrize(("pairs", "shared"), WAYS)
@pytest.mark.parametrize(
    ("dtype", "table"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
def test_launch(dtype, table, pairs, shared, device):
    torch.manual_seed(0)
    for columns, turned, inverse in ((16, 16, False), (22, 12, True)):
        packed = torch.randn(2, 7, 4, columns).to(dtype).to(device)  # q and k as parts of one projection
        q, k = packed[:, :, :3].transpose(1, 2), packed[:, :, 3:].transpose(1, 2)
        cos, sin = angles(2, 1, 7, turned // 2 if shared else turned, dtype=table, device=device)
        for y, x in zip(kernel.launch([q, k], cos, sin, pairs, shared, inverse), (q, k), strict=True):
            check(y, x, cos, sin, pairs, shared, inverse)
            assert y.stride() == torch.empty_like(x).stride()


def test_launch_of_other_shapes(device, monkeypatch):
    monkeypatch.setattr(kernel, "TILE", 8)  # several programs
    for shape, at in (((5, 4), (5, 4)), ((3, 5, 4), (5, 4)), ((3, 5, 4), (3, 1, 4)), ((0, 5, 4), (4,))):
        x = torch.randn(shape, device=device)
        cos, sin = angles(*at, device=device)
        (y,) = kernel.launch([x], cos, sin)
        check(y, x, cos, sin, False, False)
    x = torch.randn(2, 3, 4, device=device)
    cos, sin = angles(3, 4, device=device)
    for y, z in zip(kernel.launch([x, 2 * x, 3 * x], cos, sin), (x, 2 * x, 3 * x), strict=True):
        check(y, z, cos, sin, False, False)
    cos, sin = angles(4, 3, device=device)  # columns that lie apart, of tables and of x
    (y,) = kernel.launch([x.mT.contiguous().mT], cos.mT, sin.mT)
    check(y, x, cos.mT, sin.mT, False, False)


@pytest.mark.parametrize(("pairs", "shared"), WAYS)
def test_gradients(pairs, shared):
    q, k = (torch.randn(2, n, 3, 8, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    cos, sin = angles(3, 3 if shared else 6, dtype=torch.float64)
    for f in (kernel.op, kernel.direct):
        assert torch.autograd.gradcheck(lambda *xs, f=f: tuple(f(xs, cos, sin, pairs, shared)), (q, k))
        assert torch.autograd.gradgradcheck(lambda *xs, f=f: tuple(f(xs, cos, sin, pairs, shared)), (q, k))
    wanted = tuple(t.requires_grad_() for t in (cos, sin))
    assert torch.autograd.gradcheck(lambda c, s: tuple(kernel.op([q.detach()], c, s, pairs, shared)), wanted)


def test_autograd_keeps_the_angles_alone():
    x, kept = torch.randn(2, 3, 8, requires_grad=True), []
    cos, sin = angles(3, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.op([x], cos, sin)
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_nothing_is_written():
    for dtype in kernel.DTYPES:
        x = torch.randn(2, 3, 8).to(dtype)
        tables = angles(3, 8, dtype=dtype)
        before = [t.clone() for t in (x, *tables)]
        kernel.op([x, x], *tables)
        assert all(map(torch.equal, (x, *tables), before))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    q, k = (torch.randn(2, 3, n, 8).transpose(1, 2).requires_grad_(grad) for n in (2, 1))
    torch.library.opcheck(kernel.op, ([q, k], *angles(3, 6), True, False))


@pytest.mark.parametrize(("x", "at", "shared", "why"), [
    ((2, 3, 8), (3, 8), False, ""),
    ((2, 3, 8), (3, 4), True, ""),
    ((2, 3, 8), (1, 6), False, ""),
    ((8,), (8,), False, "x has 1 dimensions; the kernel takes 2 to 4"),
    ((2, 3, 8), (3, 10), False, "cos has 10 columns and x 8; they do not turn in pairs"),
    ((2, 3, 8), (3, 5), True, "cos has 5 columns and x 8; they do not turn in pairs"),
    ((2, 3, 8), (3, 5), False, "cos has 5 columns and x 8; they do not turn in pairs"),
    ((2, 3, 8), (4, 8), False, "cos is [4, 8] and x [2, 3, 8]; cos has to broadcast against x"),
    ((1, 3, 8), (2, 3, 8), False, "cos is [2, 3, 8] and x [1, 3, 8]; cos has to broadcast against x"),
    ((3, 8), (1, 3, 8), False, "cos is [1, 3, 8] and x [3, 8]; cos has to broadcast against x"),
])  # fmt: skip
def test_unsupported(x, at, shared, why):
    cos, sin = angles(*at)
    assert "; ".join(kernel.unsupported(torch.randn(x), cos, sin, shared)) == why


def test_unsupported_dtypes_and_tables():
    x, (cos, sin) = torch.randn(2, 8), angles(2, 8)
    assert list(kernel.unsupported(x.long(), cos, sin)) == [
        "dtype torch.int64 of x is not one of torch.float32, torch.bfloat16, torch.float16, torch.float64"
    ]
    assert next(kernel.unsupported(x, cos.cfloat(), sin.cfloat())).startswith("dtype torch.complex64 of cos")
    assert list(kernel.unsupported(x, cos, sin.double())) == [
        "dtypes differ: cos is torch.float32, sin torch.float64"
    ]
