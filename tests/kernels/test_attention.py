"""attention: the Triton kernels and the CPU kernel against fp64, forward and backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _flash
from fxaccel.kernels import attention as kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3


def tensors(b, h, g, s, t, d, e, dtype=torch.float32, device="cpu"):
    torch.manual_seed(s * 7 + t)
    made = [torch.randn(n) for n in ((b, h, s, d), (b, g, t, d), (b, g, t, e), (b, h, s, e))]
    return [x.to(dtype).to(device) for x in made]


def launched(q, k, v, bias, dout, causal, bias_grad):
    """out, dq, dk, dv (and dbias) from the Triton kernels."""
    out, lse = _flash.launch_forward(q, k, v, bias, causal, SCALE, save=True)
    *grads, dbias = _flash.launch_backward(dout, q, k, v, bias, out, lse, causal, SCALE, bias_grad=bias_grad)
    return [out, *grads, *([dbias.to(bias.dtype)] if bias_grad else [])]


def differentiated(f, q, k, v, bias, dout, causal, bias_grad):
    """The same list from `f` and autograd."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    if bias_grad:
        bias = bias.detach().clone().requires_grad_()
    out = f(q, k, v, bias, causal, SCALE)
    given = (q, k, v, bias) if bias_grad else (q, k, v)
    return [out, *torch.autograd.grad(out, given, dout)]


def sums_of_terms(q, k, v, bias, dout, causal, bias_grad):
    """The same list once more, every sum taken over absolute values: what its rounding errors go with."""
    n = q.shape[1] // k.shape[1]
    group = lambda x: x.unflatten(1, (-1, n)).sum(2)  # noqa: E731
    eye = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:3], -1)
    p = kernel.reference(q, k, eye, bias, causal, SCALE)
    q, k, v, dout = q.abs(), *(x.abs().repeat_interleave(n, 1) for x in (k, v)), dout.abs()
    out = p @ v
    ds = p * (dout @ v.mT + (dout * out).sum(-1, keepdim=True))
    sums = [out, abs(SCALE) * ds @ k, group(abs(SCALE) * ds.mT @ q), group(p.mT @ dout)]
    return [*sums, *([ds.sum_to_size(bias.shape)] if bias_grad else [])]


def compare(near, q, k, v, bias, dout, causal=False, bias_grad=False, how=launched):
    double = [x if x is None or x.dtype == torch.bool else x.double() for x in (q, k, v, bias, dout)]
    results = zip(
        how(q, k, v, bias, dout, causal, bias_grad),
        differentiated(kernel.reference, q, k, v, bias, dout, causal, bias_grad),
        differentiated(kernel.reference, *double, causal, bias_grad),
        sums_of_terms(*double, causal, bias_grad),
        strict=True,
    )
    for got, eager, exact, terms in results:
        near(got, eager, exact, terms, q.dtype)


def on_cpu(q, k, v, bias, dout, causal, bias_grad):
    return differentiated(kernel.op, q, k, v, bias, dout, causal, bias_grad)


SIZES = [(1, 1), (7, 7), (123, 123), (64, 128), (130, 70), (1, 40), (40, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_launch(sizes, causal, dtype, device, near):
    q, k, v, dout = tensors(2, 1, 1, *sizes, 16, 16, dtype, device)
    compare(near, q, k, v, None, dout, causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "e"), [(1, 1), (24, 24), (48, 20), (20, 48), (80, 80), (256, 256)])
def test_head_sizes(d, e, dtype, device, near):
    q, k, v, dout = tensors(1, 2, 2, 40, 50, d, e, dtype, device)
    compare(near, q, k, v, None, dout, causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("h", "g"), [(4, 2), (6, 2), (3, 1)])
def test_grouped_heads(h, g, causal, device, near):
    q, k, v, dout = tensors(2, h, g, 40, 40, 16, 16, torch.float32, device)
    compare(near, q, k, v, None, dout, causal)


BIASES = [
    (2, 2, 40, 35), (1, 2, 40, 35), (2, 1, 40, 35), (40, 35), (2, 1, 1, 35), (2, 1, 35), (2, 40, 1),
    (2, 1, 40, 1), (1,), (1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_and_its_gradient(shape, causal, device, near):
    q, k, v, dout = tensors(2, 2, 1, 40, 35, 16, 16, torch.float32, device)
    bias = torch.randn(shape, device=device)
    compare(near, q, k, v, bias, dout, causal, bias_grad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_dtype", ["float32", "same"])
def test_bias_dtypes(bias_dtype, dtype, device, near):
    q, k, v, dout = tensors(1, 2, 2, 33, 33, 16, 16, dtype, device)
    bias = torch.randn(33, 33).to(torch.float32 if bias_dtype == "float32" else dtype).to(device)
    compare(near, q, k, v, bias, dout, bias_grad=True)


@pytest.mark.parametrize("how", [launched, on_cpu], ids=["launch", "cpu"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_row_that_sees_no_key_is_zero(kind, how, device, near):
    if how is on_cpu and device.type == "cuda":
        pytest.skip("the CPU kernel needs no GPU")
    q, k, v, dout = tensors(1, 2, 2, 40, 40, 16, 16, torch.float32, device)
    mask = torch.rand(40, 40, device=device) > 0.3
    mask[[0, 7, 39]] = False
    zero = torch.zeros(40, 40, device=device)
    bias = mask if kind == "bool" else zero.masked_fill(~mask, -torch.inf)
    compare(near, q, k, v, bias, dout, how=how)
    out, dq, *_ = how(q, k, v, bias, dout, False, False)
    assert not out[:, :, [0, 7, 39]].any()
    assert not dq[:, :, [0, 7, 39]].any()
    if kind == "float":
        dbias = how(q, k, v, bias, dout, False, True)[-1]
        assert torch.isfinite(dbias).all()
        assert not dbias[~mask].any()


@pytest.mark.parametrize("how", [launched, on_cpu], ids=["launch", "cpu"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_the_least_number_is_the_mean(dtype, causal, how, device, near):
    if how is on_cpu and device.type == "cuda":
        pytest.skip("the CPU kernel needs no GPU")
    q, k, v, _ = tensors(1, 1, 1, 40, 40, 16, 16, dtype, device)
    bias = torch.zeros(40, 40, device=device)
    bias[5] = torch.finfo(torch.float32).min
    out = how(q, k, v, bias, torch.ones_like(q), causal, False)[0]
    exact = v.double()[0, 0, : 6 if causal else 40].mean(0)
    near(out[0, 0, 5], exact.to(dtype), exact)


def relaid(x, layout):
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "part of a wider tensor":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x[:1].expand_as(x)


LAYOUTS = ["heads last", "columns first", "part of a wider tensor", "one batch for all"]


@pytest.mark.parametrize("how", [launched, on_cpu], ids=["launch", "cpu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, how, device, near):
    if how is on_cpu and device.type == "cuda":
        pytest.skip("the CPU kernel needs no GPU")
    q, k, v, dout = (relaid(x, layout) for x in tensors(2, 2, 2, 20, 20, 16, 16, device=device))
    bias = relaid(torch.randn(2, 2, 20, 20, device=device), layout)
    compare(near, q, k, v, bias, dout, causal=True, bias_grad=True, how=how)


@pytest.mark.parametrize("how", [launched, on_cpu], ids=["launch", "cpu"])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
def test_any_scale(scale, how, device, near, monkeypatch):
    if how is on_cpu and device.type == "cuda":
        pytest.skip("the CPU kernel needs no GPU")
    monkeypatch.setitem(globals(), "SCALE", scale)
    q, k, v, dout = tensors(1, 2, 1, 40, 40, 16, 16, device=device)
    compare(near, q, k, v, None, dout, causal=True, how=how)


@pytest.mark.parametrize("how", [launched, on_cpu], ids=["launch", "cpu"])
@pytest.mark.parametrize(("s", "t"), [(0, 5), (5, 0), (0, 0)])
def test_empty(s, t, how, device):
    q, k, v, dout = tensors(1, 2, 2, s, t, 16, 16, device=device)
    if how is on_cpu and device.type == "cuda":
        pytest.skip("the CPU kernel needs no GPU")
    out, *grads = how(q, k, v, None, dout, True, False)
    assert out.shape == q.shape
    assert not any(x.any() for x in (out, *grads))


CPU_GRID = list(
    itertools.product(
        [(4, 4), (4, 2), (4, 1)],
        [(8, 8), (8, 4), (4, 8)],
        [False, True],
        [None, "bool", (5, 7), (2, 1, 1, 7), (4, 5, 7), (1, 4, 5, 1)],
    )
)


@pytest.mark.parametrize(("heads", "width", "causal", "shape"), CPU_GRID)
def test_cpu_kernel_in_fp64(heads, width, causal, shape):
    q, k, v, dout = tensors(2, *heads, 5, 7, *width, dtype=torch.float64)
    bias = (
        None if shape is None else torch.rand(5, 7) > 0.3 if shape == "bool" else torch.randn(shape).double()
    )
    grad = isinstance(shape, tuple)
    got = on_cpu(q, k, v, bias, dout, causal, grad)
    exact = differentiated(kernel.reference, q, k, v, bias, dout, causal, grad)
    torch.testing.assert_close(got, exact)
    assert got[0].stride() == exact[0].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_grad", [False, True])
def test_cpu_kernel(bias_grad, dtype, near):
    q, k, v, dout = tensors(2, 4, 2, 70, 50, 16, 24, dtype)
    compare(near, q, k, v, torch.randn(4, 1, 50).to(dtype), dout, True, bias_grad, how=on_cpu)


def test_gradcheck():
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 2, 1, 3, 4, 4, 3, dtype=torch.float64))
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernel.op, (q, k, v, bias, True, SCALE))


def test_second_derivative_raises():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    grad = torch.autograd.grad(kernel.op(q, q, q, None, True, 0.5).sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [None, (5, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("width", [(8, 8), (8, 4)])
def test_opcheck(width, shape):
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 4, 2, 5, 7, *width))
    bias = None if shape is None else torch.randn(shape, requires_grad=True)
    torch.library.opcheck(kernel.op, (q, k, v, bias, False, SCALE))
    detached = [x if x is None else x.detach() for x in (q, k, v, bias)]
    torch.library.opcheck(kernel.op, (*detached, True, SCALE))


def test_same_as_sdpa():
    q, k, v, _ = tensors(2, 4, 2, 16, 16, 8, 8)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert torch.equal(kernel.op(q, k, v, None, True, SCALE), theirs)


def test_autocast_lowers_as_sdpa_does():
    q, k, v, _ = tensors(1, 2, 2, 8, 8, 8, 8)
    bias = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel.op(q, k, v, bias, False, SCALE).dtype == torch.bfloat16
        assert kernel.op(q, k, v, bias > 0, False, SCALE).dtype == torch.bfloat16
        assert kernel.op(*(x.double() for x in (q, k, v)), None, False, 1.0).dtype == torch.float64
        q = q.requires_grad_()
        kernel.op(q, k, v, bias, False, SCALE).float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_flops():
    q, k, v, dout = tensors(2, 4, 2, 16, 32, 8, 24)
    q.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = kernel.op(q, k, v, None, False, SCALE)
    assert forward.get_total_flops() == 2 * 2 * 4 * 16 * 32 * (8 + 24)
    with FlopCounterMode(display=False) as backward:
        out.backward(dout)
    assert backward.get_total_flops() == 2 * 2 * 4 * 16 * 32 * (3 * 8 + 2 * 24)


def test_compiled():
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 4, 2, 16, 16, 8, 8))
    bias = torch.randn(4, 16, 16, requires_grad=True)

    def f(q, k, v, bias):
        return kernel.op(q * 2, k, v, bias, True, SCALE).transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    given = (q, k, v, bias)
    torch.testing.assert_close(compiled(*given), f(*given))
    for a, b in zip(*(torch.autograd.grad(g(*given).sum(), given) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_exported_whole_with_symbolic_sizes():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return kernel.op(q, k, v, None, True, 0.5)

    q, k, v, _ = tensors(2, 4, 2, 16, 16, 8, 8)
    auto = torch.export.Dim.AUTO
    dims = {name: {0: auto, 2: auto} for name in "qkv"}
    program = torch.export.export(Model(), (q, k, v), dynamic_shapes=dims)
    assert kernel.op in [n.target for n in program.graph.nodes]
    q, k, v, _ = tensors(3, 4, 2, 9, 9, 8, 8)
    torch.testing.assert_close(program.module()(q, k, v), kernel.reference(q, k, v, None, True, 0.5))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


Q, K = meta(2, 4, 5, 8), meta(2, 2, 7, 8)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((meta(2, 4, 5, 8, dtype=torch.int32),) * 3, "dtype torch.int32 is not one of"),
        ((Q, K.half(), K), "dtypes differ: q is torch.float32, k torch.float16, v torch.float32"),
        ((Q[0], K, K), "q, k, v have 3, 4, 4 dimensions"),
        ((Q, meta(2, 2, 7, 4), K), ": D differs"),
        ((Q, K, meta(3, 2, 7, 8)), "B, heads or T differ"),
        ((Q, meta(3, 2, 7, 8), meta(3, 2, 7, 8)), ": B differs"),
        ((Q, K, meta(2, 2, 6, 8)), "B, heads or T differ"),
        ((meta(2, 3, 5, 8), K, K), "3 query heads are not a multiple of 2 key heads"),
        ((meta(2, 4, 5, 264), meta(2, 2, 7, 264), K), "D = 264 is not within 1 .. 256"),
        ((Q, K, meta(2, 2, 7, 0)), "E = 0 is not within 1 .. 256"),
        ((Q, K, K, meta(5, 7, dtype=torch.int64)), "the bias is torch.int64"),
        ((Q, K, K, meta(5, 6)), "does not broadcast to"),
        ((Q, K, K, meta(1, 2, 4, 5, 7)), "does not broadcast to"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(Q, K, K, meta(4, 1, 7))) == []
    assert list(kernel.unsupported(Q, K, meta(2, 2, 7, 256), meta(5, 7, dtype=torch.bool))) == []
