"""The row kernels under all four norms: shapes, dtypes and layouts, forward and backward."""

import pytest
import torch

from fxaccel.kernels import _rows, add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.helpers import thinned

NORMS = {  # the module; whether there is a residual; whether there is a bias
    "rms_norm": (rms_norm, False, False),
    "rms_norm with bias": (rms_norm, False, True),
    "layer_norm": (layer_norm, False, True),
    "add_rms_norm": (add_rms_norm, True, False),
    "add_rms_norm with bias": (add_rms_norm, True, True),
    "add_layer_norm": (add_layer_norm, True, True),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (2, 5, 123), (70, 64), (5, 1024), (0, 8), (4, 0), (7,)]
EPS = 1e-5


def tensors(name, shape, dtype, device="cpu"):
    """x, (r,) w, (b): not centred on 0, so that a forgotten mean shows."""
    _, add, bias = NORMS[name]
    torch.manual_seed(sum(shape))
    made = [torch.randn(shape) * 2 + 0.5 for _ in range(1 + add)]
    made += [torch.randn(shape[-1:]) + 1 for _ in range(1 + bias)]
    return [t.to(dtype).to(device) for t in made]


def split(name, args):
    """x, r, w, b with None for what this norm lacks."""
    _, add, bias = NORMS[name]
    x, *rest = args
    return x, rest.pop(0) if add else None, rest.pop(0), rest.pop(0) if bias else None


def launched(name, args, dy, dh):
    """y, (h,) dx, (dx again for r,) dw, (db) from the Triton kernels."""
    x, r, w, b = split(name, args)
    centred = "layer" in name
    y, h, mean, rstd = _rows.launch_forward(x, r, w, b, EPS, centred=centred, save=True)
    dx, dw, db = _rows.launch_backward(
        dy, dh, x if h is None else h, w, mean, rstd, weight_grad=True, bias_grad=b is not None
    )
    outs = [y] if r is None else [y, h]
    grads = [dx] if r is None else [dx, dx]
    return [*outs, *grads, *(g.to(w.dtype) for g in (dw, db) if g is not None)]


def referred(name, args, dy, dh, how="reference"):
    """The same list from `reference`, or another of the module's functions, and autograd."""
    args = [a.detach().clone().requires_grad_() for a in args]
    x, r, w, b = split(name, args)
    given = [t for t in (x, r, w) if t is not None]
    given += [b, EPS] if "layer" in name else [EPS, 0.0, False, b]
    out = getattr(NORMS[name][0], how)(*given)
    outs, seeds = (out, (dy, dh)) if isinstance(out, tuple) else ((out,), (dy,))
    grads = torch.autograd.grad(outs, args, [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)])
    return [*outs, *grads]


def exactly(name, args, dy, dh):
    """The same list in fp64, from the h that the norm reads: x + r is rounded by definition."""
    x, r, w, b = split(name, args)
    if r is not None:
        x, r = (x + r).double(), torch.zeros_like(r, dtype=torch.float64)
    args = [a.double() for a in (x, r, w, b) if a is not None]
    return referred(name, args, dy.double(), dh.double())


def compare(name, args, near, how="launch"):
    """Forward and backward of the launched kernels, or of the operator or `direct`, against fp64."""
    x = args[0]
    dy, dh = torch.randn_like(x).contiguous(), torch.randn_like(x).contiguous()
    made = (
        launched(name, args, dy, dh if NORMS[name][1] else None)
        if how == "launch"
        else referred(name, args, dy, dh, how)
    )
    results = (
        made,
        referred(name, args, dy, dh),
        exactly(name, args, dy, dh),
    )
    for got, eager, exact in zip(*results, strict=True):
        near(got, eager, exact)


@thinned(2, shape=SHAPES, dtype=DTYPES, name=NORMS)
def test_launch(name, dtype, shape, device, near):
    compare(name, tensors(name, shape, dtype, device), near)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 40), (9, 150)], ids=str)
def test_rows_over_one_block(name, dtype, shape, device, near, monkeypatch):
    monkeypatch.setattr(_rows, "MAX_FORWARD", 32)
    monkeypatch.setattr(_rows, "MAX_BACKWARD", 32)
    monkeypatch.setattr(_rows, "WIDE", 32)
    compare(name, tensors(name, shape, dtype, device), near)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [4_096, 12_288, 20_480, pytest.param(65_536, marks=pytest.mark.slow)])
def test_widths_of_models(name, columns, dtype, device, near):
    compare(name, tensors(name, (2, columns), dtype, device), near)


EXTREMES = {
    "zeros": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.full_like(x, 3.0),  # a mean without rounding, a variance of 0
    "a row of zeros": lambda x: torch.cat([x[:1], torch.zeros_like(x[1:])]),
    "huge": lambda x: (x * 1e4).clamp(-3e4, 3e4),  # in fp16 the square is infinite, the sum just not
    "tiny": lambda x: x * 1e-4,  # in fp16 the square is 0
}


@thinned(2, extreme=EXTREMES, dtype=DTYPES, name=NORMS, how=["launch", "op", "direct"])
def test_extremes(name, dtype, extreme, how, device, near):
    x, *rest = tensors(name, (3, 123), dtype, device)
    args = [EXTREMES[extreme](t) if t.ndim == 2 else t for t in (x, *rest)]
    compare(name, args, near, how)


def with_weights_in_fp32(args):
    """Rows on a grid, so that the sum of two is exact: the interpreter truncates it in bfloat16."""
    return [t.float() * 1.001 if t.ndim == 1 else (t * 8).round().clamp(-31, 31) / 8 for t in args]


@pytest.mark.parametrize("how", ["launch", "op", "direct"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_fp32(name, dtype, how, device, near):
    compare(name, with_weights_in_fp32(tensors(name, (5, 123), dtype, device)), near, how)


@pytest.mark.parametrize("how", ["launch", "op", "direct"])
@pytest.mark.parametrize("name", NORMS)
def test_gradients_of_weights_are_summed_in_fp32(name, how, device):
    """In bfloat16 a sum stands still at 256 of its addends, as PyTorch's LayerNorm on the CPU does."""
    args = with_weights_in_fp32(tensors(name, (2048, 8), torch.bfloat16, device))
    dy, dh = torch.ones_like(args[0]), torch.zeros_like(args[0])
    given = (args, dy, dh if NORMS[name][1] else None)
    made = launched(name, *given) if how == "launch" else referred(name, args, dy, dh, how)
    exact = exactly(name, args, dy, dh)
    terms = 2048 * torch.finfo(torch.float32).eps * 8  # what fp32 may lose of 2048 addends of at most 8
    for got, want in zip(made[-NORMS[name][2] - 1 :], exact[-NORMS[name][2] - 1 :], strict=True):
        assert (got.double() - want).abs().max() <= terms


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("columns", [4_099, 16_384, 16_385, 70_000])
def test_long_rows(name, columns, device, near):
    compare(name, tensors(name, (3, columns), torch.float32, device), near)


@pytest.mark.parametrize("how", ["launch", "op", "direct"])
@pytest.mark.parametrize("name", NORMS)
def test_heads(name, how, device, near):
    """[B, H, S, D] of [B, S, H, D]."""
    args = tensors(name, (2, 5, 3, 32), torch.float32, device)
    compare(name, [t.transpose(1, 2) if t.ndim == 4 else t for t in args], near, how)


def relayouts(x):
    """The values of x in other strides: transposed, a slice of wider rows, one row repeated."""
    yield x.mT.contiguous().mT
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield x[:1].expand_as(x)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("layout", range(3), ids=["transposed", "sliced", "expanded"])
def test_strides(name, layout, device, near):
    args = tensors(name, (6, 20), torch.float32, device)
    args = [list(relayouts(a))[layout] if a.ndim == 2 else torch.stack([a, a], 1)[:, 0] for a in args]
    compare(name, args, near)


@pytest.mark.parametrize("name", NORMS)
def test_a_row_offset_from_fp32_sums(name, device, near):
    """Values around 1000 with a spread of 1: the variance must come from centred values."""
    args = tensors(name, (4, 300), torch.float32, device)
    args[0] = args[0] + 1000
    compare(name, args, near)


@pytest.mark.parametrize("name", [name for name in NORMS if "rms" in name])
@pytest.mark.parametrize(("offset", "round_first"), [(1.0, False), (0.0, True)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spellings(name, offset, round_first, dtype, device, near):
    module, add, _ = NORMS[name]
    x, r, w, b = split(name, tensors(name, (5, 123), dtype, device))
    args = (x, r, w) if add else (x, w)
    got = module.launch(*args, EPS, offset, round_first, b)
    eager = module.reference(*args, EPS, offset, round_first, b)
    wide = [t.double() for t in ((x + r, torch.zeros_like(r), w) if add else (x, w))]
    exact = module.reference(*wide, EPS, offset, False, None if b is None else b.double())
    for g, e, x in zip(*((o if add else (o,)) for o in (got, eager, exact)), strict=True):
        near(g, e, x)
    if round_first:  # not only as near as eager: rounded in the same place
        once = module.launch(*args, EPS, offset, False, b)
        assert dtype == torch.float32 or not torch.equal(*((o[0] if add else o) for o in (got, once)))


def test_without_weights(device, near):
    x = tensors("rms_norm", (5, 40), torch.float32, device)[0]
    for module, rest in ((rms_norm, (None,)), (layer_norm, (None, None))):
        near(
            module.launch(x, *rest, EPS),
            module.reference(x, *rest, EPS),
            module.reference(x.double(), *rest, EPS),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_h_is_the_sum_as_torch_rounds_it(dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bfloat16")
    x, r, w = tensors("add_rms_norm", (5, 123), dtype, device)
    assert torch.equal(add_rms_norm.launch(x, r, w, EPS)[1], x + r)


def test_gradients_of_weights_do_not_depend_on_the_run(device):
    x, w, b = tensors("layer_norm", (500, 64), torch.float32, device)
    _, _, mean, rstd = _rows.launch_forward(x, None, w, b, EPS, centred=True, save=True)
    runs = [
        _rows.launch_backward(x, None, x, w, mean, rstd, weight_grad=True, bias_grad=True) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
