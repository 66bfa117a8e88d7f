"""quantize_rows and quantize_tensor: CPU and Triton kernels, their registration and what they refuse."""

import math

import pytest
import torch

from fxaccel.kernels import _quantized_rows, quantize_tensor
from fxaccel.kernels import quantize_rows as kernel

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
KINDS = [torch.int8, FLOAT8]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0), (33, 256)]


def rows(*shape, dtype=torch.float32, device="cpu"):
    """Rows of several sizes, one with an outlier, one of zeros."""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape) * torch.logspace(-6, 4, math.prod(shape[:-1])).view(*shape[:-1], 1)
    if x.numel() > 3 and len(shape) > 1:
        x[0, ..., 1] = 60000.0
        x[-1] = 0.0
    return x.to(dtype).to(device)


def same(got, want):
    """Bit for bit."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert torch.equal(a.cpu().float(), b.cpu().float())


def exact(x, dtype):
    """q and scale in fp64, to be compared with by how far they may be: see `near`."""
    x, top = x.double(), 127.0 if dtype == torch.int8 else 448.0
    a = x.abs().amax(-1, True).clamp(min=1e-30)
    return x / (a / top), a / top


def near(x, dtype, q, scale):
    """q * scale is x, to half a step of the grid and the three roundings of the arithmetic."""
    want, scales = exact(x, dtype)
    eps = torch.finfo(scale.dtype).eps
    assert ((scale.double() - scales).abs() <= eps * scales).all()
    step = torch.ones_like(want) if dtype == torch.int8 else 2 ** want.abs().log2().floor().clamp(min=-6) / 8
    assert ((q.double() - want).abs() <= step / 2 + 2 * eps * want.abs()).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_kernel(shape, dtype, kind):
    x = rows(*shape, dtype=dtype)
    want = kernel.reference(x, kind)
    same(kernel.op(x, kind), want)
    same(kernel.direct(x, kind), want)
    assert want[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert want[1].shape == (*shape[:-1], 1)
    if x.numel():
        near(x, kind, *want)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launch(shape, dtype, kind, device):
    x = rows(*shape, dtype=dtype, device=device)
    same(kernel.launch(x, kind), kernel.reference(x, kind))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_launch_in_pieces(kind, device, monkeypatch):
    monkeypatch.setattr(_quantized_rows, "ROW_MAX", 64)
    monkeypatch.setattr(_quantized_rows, "TILE", 32)
    for shape in ((3, 65), (5, 200)):
        x = rows(*shape, device=device)
        x[1, -1] = -1e6  # the largest is in the last piece
        assert _quantized_rows.config(shape[1]).wide
        same(kernel.launch(x, kind), kernel.reference(x, kind))


def test_ties_go_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5]])
    q, scale = kernel.op(x, torch.int8)
    assert q.tolist() == [[127, 0, 2, -2, 126]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("how", ["op", "launch"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_of_zeros_has_a_scale(kind, how, device):
    q, scale = getattr(kernel, how)(torch.zeros(2, 5, device=device), kind)
    assert (q.float() == 0).all()
    assert (scale > 0).all()


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("how", ["op", "direct", "launch"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_bad_row_has_a_scale_that_says_so(bad, kind, how, device):
    x = torch.randn(3, 40, device=device)
    want = kernel.reference(x, kind)
    x[1, 17] = bad
    q, scale = getattr(kernel, how)(x, kind)
    assert not scale[1].isfinite()
    for row in (0, 2):
        same([q[row], scale[row]], [t[row] for t in want])


@pytest.mark.parametrize("how", ["op", "direct", "launch"])
def test_strides(how, device):
    base = torch.randn(6, 4, 10, device=device)
    for x in (base.mT, base[..., ::2], base.transpose(0, 1), base[:, :1].expand(6, 4, 10)):
        same(getattr(kernel, how)(x, torch.int8), kernel.reference(x.contiguous(), torch.int8))
        scale = torch.tensor(0.01, device=device)
        want = quantize_tensor.reference(x.contiguous(), scale, torch.int8)
        same([getattr(quantize_tensor, how)(x, scale, torch.int8)], [want])


def test_inputs_are_not_written():
    for dtype in DTYPES:
        x = rows(3, 123, dtype=dtype)
        copy, scale = x.clone(), torch.tensor([0.5])
        kernel.op(x, torch.int8)
        quantize_tensor.op(x, scale, torch.int8)
        assert torch.equal(x, copy)
        assert scale.item() == 0.5


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_by_one_scale(shape, dtype, kind):
    x = rows(*shape, dtype=dtype)
    for scale in (torch.tensor(0.01), torch.tensor([3.0]), torch.tensor(0.1, dtype=torch.float64)):
        want = quantize_tensor.reference(x, scale, kind)
        same([quantize_tensor.op(x, scale, kind)], [want])
        same([quantize_tensor.direct(x, scale, kind)], [want])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_launch_by_one_scale(shape, dtype, kind, device):
    x, scale = rows(*shape, dtype=dtype, device=device), torch.tensor([0.03], device=device)
    same([quantize_tensor.launch(x, scale, kind)], [quantize_tensor.reference(x, scale, kind)])


@pytest.mark.parametrize("how", ["reference", "op", "direct", "launch"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_calibration_has_not_seen(kind, how, device):
    inf, top = float("inf"), 127.0 if kind == torch.int8 else 448.0
    x = torch.tensor([inf, -inf, float("nan"), 1e30, -1e30, 0.5, 1.5], device=device)
    q = getattr(quantize_tensor, how)(x, torch.tensor(1.0, device=device), kind)
    rest = [0.0, 2.0] if kind == torch.int8 else [0.5, 1.5]
    assert q.float().tolist() == [top, -top, 0.0, top, -top, *rest]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(kind, dtype):
    x = rows(2, 5, 64, dtype=dtype)
    torch.library.opcheck(kernel.op, (x, kind))
    torch.library.opcheck(kernel.op, (x.mT, kind))
    torch.library.opcheck(quantize_tensor.op, (x.mT, torch.tensor([0.1]), kind))


def test_a_gradient_is_refused_where_it_is_asked_for():
    x = torch.randn(3, 8, requires_grad=True)
    for f in (kernel.op, kernel.direct):
        q, scale = f(x, torch.int8)  # inference with parameters that want gradients goes through
        assert not q.requires_grad
        with pytest.raises(NotImplementedError, match="quantize_rows has no derivative"):
            scale.sum().backward()
    for f in (quantize_tensor.op, quantize_tensor.direct):
        assert not f(x, torch.tensor(1.0), FLOAT8).requires_grad


def test_exported_with_symbolic_rows():
    class Model(torch.nn.Module):
        def forward(self, x):
            return kernel.op(x, torch.int8)

    shapes = {"x": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(Model(), (torch.randn(4, 16),), dynamic_shapes=shapes)
    assert kernel.op in [n.target for n in program.graph.nodes]
    x = torch.randn(9, 16)
    same(program.module()(x), kernel.reference(x, torch.int8))


X, S = torch.empty(3, 4, device="meta"), torch.empty(1, device="meta")


def test_unsupported():
    assert list(kernel.unsupported(X, torch.int8)) == []
    assert "x is torch.int32" in next(kernel.unsupported(X.int(), torch.int8))
    assert "no last dimension" in next(kernel.unsupported(X[0, 0], torch.int8))
    assert "torch.uint8 is not one of" in next(kernel.unsupported(X, torch.uint8))
    assert list(quantize_tensor.unsupported(X, S, FLOAT8)) == []
    assert list(quantize_tensor.unsupported(X, S[0], FLOAT8)) == []
    assert "x is torch.int32" in next(quantize_tensor.unsupported(X.int(), S, torch.int8))
    assert "torch.uint8 is not one of" in next(quantize_tensor.unsupported(X, S, torch.uint8))
    assert "scale is torch.float16" in next(quantize_tensor.unsupported(X, S.half(), FLOAT8))
    assert "takes [] or [1]" in next(quantize_tensor.unsupported(X, S.expand(3), FLOAT8))
    assert "takes [] or [1]" in next(quantize_tensor.unsupported(X, S[None], FLOAT8))
