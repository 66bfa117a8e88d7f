"""norm_quantize: CPU and Triton kernels, against the operators that it is made of and against float64."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import (
    _rows,
    add_layer_norm,
    add_rms_norm,
    layer_norm,
    quantize_rows,
    rms_norm,
)
from fxaccel.kernels import norm_quantize as kernel
from tests.helpers import thinned

FLOAT8 = torch.float8_e4m3fn
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAUNCHED = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16]
KINDS = [torch.int8, FLOAT8]
SHAPES = [(1, 1), (7,), (3, 123), (2, 5, 64), (0, 8), (4, 0), (33, 256)]
NORMS = {  # centred, offset, round_first
    "layer": (True, 0.0, False),
    "rms": (False, 0.0, False),
    "rms, rounded first": (False, 0.0, True),
    "rms, offset": (False, 1.0, False),
}
EPS = 1e-5


def rows(*shape, dtype=torch.float32, device="cpu"):
    """Rows of several sizes, one with an outlier, one of zeros."""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape)
    if x.numel() > 3 and len(shape) > 1:
        x[0, ..., 1] = 300.0
        x[-1] = 0.0
    return x.to(dtype).to(device)


def given(shape, dtype, norm, device="cpu", added=True, weight=None, bias=True):
    """Arguments of the operator, but for the dtype of the codes; `weight` is the dtype of w and b."""
    x = rows(*shape, dtype=dtype, device=device)
    r = torch.randn(shape).to(x) * 0.5 if added else None
    kind = {"dtype": weight or dtype, "device": device}
    w, b = (torch.randn(shape[-1]).to(**kind) for _ in range(2))
    centred, offset, first = NORMS[norm]
    return x, r, w, b if bias else None, EPS, centred, offset, first


def sequence(how, kind, x, r, w, b, eps, centred, offset, first):
    """The operators one after the other, each by its own `how`."""
    rms = (eps, offset, first, b)
    if r is None:
        norm = layer_norm if centred else rms_norm
        y, h = getattr(norm, how)(x, *((w, b, eps) if centred else (w, *rms))), x.new_empty(0)
    else:
        norm = add_layer_norm if centred else add_rms_norm
        y, h = getattr(norm, how)(x, r, *((w, b, eps) if centred else (w, *rms)))
    return *getattr(quantize_rows, how)(y, kind), h


def same(got, want):
    """Bit for bit, NaN in the same places."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def near(got, kind, x, r, w, b, eps, centred, offset, first):
    """codes * scale are the norm in float64, to half a step of the grid and to what y is rounded by.

    y rounds once, and once before with `first`, and in the interpreter's bfloat16 truncates: 3 eps of
    x.dtype. Before, in float32, sums round log2 C times and the rest 4 times, values still without the mean
    subtracted.
    """
    q, scale, h = got
    if r is not None:
        allowed = 2 * torch.finfo(x.dtype).eps  # the interpreter's bfloat16 truncates
        assert ((h.double() - x.double() - r.double()).abs() <= allowed * (x + r).double().abs()).all()
    if not x.numel():
        return
    wide, single = (x if r is None else h).double(), torch.finfo(torch.float32).eps
    mean = wide.mean(-1, True) * centred
    rstd = ((wide - mean).square().mean(-1, True) + eps).rsqrt()
    factor = torch.ones(1).double() if w is None else w.double() + offset
    shift = torch.zeros(1).double() if b is None else b.double()
    y = (wide - mean) * rstd * factor + shift
    terms = ((wide.abs() + mean.abs()) * rstd * factor).abs() + shift.abs()
    rounded = 3 * torch.finfo(x.dtype).eps * (((wide - mean) * rstd * factor).abs() + shift.abs())
    error = rounded + (4 + math.log2(x.shape[-1])) * single * terms
    top, by = 127.0 if kind == torch.int8 else 448.0, scale.double()
    size, slack = y.abs().amax(-1, True).clamp(min=1e-30), error.amax(-1, True)
    assert ((by * top - size).abs() <= slack + 2 * single * size).all()
    step = 1.0 if kind == torch.int8 else 2 ** q.double().abs().log2().floor().clamp(min=-6) / 8
    assert ((q.double() * by - y).abs() <= error + by * (step / 2 + 4 * single * top)).all()


@thinned(3, shape=SHAPES, dtype=DTYPES, norm=NORMS, kind=KINDS)
def test_on_the_cpu_it_is_the_operators_in_sequence(shape, dtype, norm, kind):
    for added in (False, True):
        for weight in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
            args = given(shape, dtype, norm, added=added, weight=weight)
            want = sequence("op", kind, *args)
            same(kernel.op(*args, kind), want)
            same(kernel.direct(*args, kind), want)
            same(kernel.direct(*args, kind), sequence("direct", kind, *args))
            near(want, kind, *args)
            near(kernel.reference(*args, kind), kind, *args)


@pytest.mark.parametrize("how", ["op", "direct"])
@pytest.mark.parametrize("norm", NORMS)
def test_without_weights_and_bias(norm, how):
    args = given((3, 123), torch.bfloat16, norm, bias=False)
    for bare in (args, (*args[:2], None, *args[3:])):
        same(getattr(kernel, how)(*bare, torch.int8), sequence("op", torch.int8, *bare))


@thinned(2, shape=SHAPES, dtype=LAUNCHED, norm=NORMS, kind=KINDS)
def test_launch(shape, dtype, norm, kind, device):
    for added in (False, True):
        args = given(shape, dtype, norm, device, added, weight=torch.float32 if added else dtype)
        got = kernel.launch(*args, kind)
        near([t.cpu() for t in got], kind, *(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
        if device.type == "cpu":  # numpy contracts nothing: the two kernels in sequence
            same(got, sequence("launch", kind, *args))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_launch_in_pieces(norm, kind, device, monkeypatch):
    monkeypatch.setattr(_rows, "MAX_FORWARD", 64)
    monkeypatch.setattr(_rows, "WIDE", 16)
    for shape in ((3, 65), (5, 200)):
        for added in (False, True):
            args = given(shape, torch.float32, norm, device, added)
            args[0][1, -1] = -1e3  # the largest is in the last piece
            assert _rows.forward_config(shape[1]).wide
            got = kernel.launch(*args, kind)
            near([t.cpu() for t in got], kind, *(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
            if device.type == "cpu":
                same(got, sequence("launch", kind, *args))


@pytest.mark.parametrize("norm", NORMS)
def test_launch_in_pieces_of_rows_far_from_zero(norm, device, monkeypatch):
    """Lanes past the last column hold 0, which is as far from the mean as a row can be."""
    monkeypatch.setattr(_rows, "MAX_FORWARD", 64)
    monkeypatch.setattr(_rows, "WIDE", 16)
    x = torch.randn(3, 65, device=device) + 9
    args = x, None, None, None, EPS, *NORMS[norm]
    near([t.cpu() for t in kernel.launch(*args, torch.int8)], torch.int8, x.cpu(), *args[1:])


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("how", ["op", "direct", "launch"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_bad_row_has_a_scale_that_says_so(bad, kind, how, wide, device, monkeypatch):
    if wide:
        monkeypatch.setattr(_rows, "MAX_FORWARD", 16)
        monkeypatch.setattr(_rows, "WIDE", 16)
    for norm in ("layer", "rms"):
        args = given((3, 40), torch.float32, norm, device)
        want = getattr(kernel, how)(*args, kind)
        args[0][1, 17] = bad
        q, scale, _ = getattr(kernel, how)(*args, kind)
        assert not scale[1].isfinite()
        for row in (0, 2):
            same([q[row], scale[row]], [t[row] for t in want[:2]])


@pytest.mark.parametrize("how", ["op", "direct", "launch"])
def test_strides(how, device):
    base = torch.randn(6, 4, 20, device=device)
    w, b = torch.randn(10, device=device), torch.randn(10, device=device)
    for x in (
        base.mT[:, :10].mT,
        base[..., ::2],
        base[..., :10].transpose(0, 1),
        base[:, :1, :10].expand(6, 4, 10),
    ):
        for r in (None, x.flip(0)):
            for centred in (False, True):
                rest = (w, b, EPS, centred, 0.0, False, torch.int8)
                plain = [t if t is None else t.contiguous() for t in (x, r)]
                got, want = getattr(kernel, how)(x, r, *rest), getattr(kernel, how)(*plain, *rest)
                same(got[:2], want[:2])
                assert torch.equal(got[2], want[2])


def test_inputs_are_not_written():
    for dtype in DTYPES:
        for norm in NORMS:
            args = given((3, 123), dtype, norm)
            copies = [a.clone() for a in args[:4]]
            for f in (kernel.op, kernel.direct):
                f(*args, torch.int8)
                assert all(map(torch.equal, args[:4], copies))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, kind):
    for norm in NORMS if dtype == torch.float16 else ["layer"]:
        args = given((2, 5, 64), dtype, norm)
        torch.library.opcheck(kernel.op, (*args, kind))
        torch.library.opcheck(kernel.op, (args[0].mT, None, None, None, *args[4:], kind))
        torch.library.opcheck(kernel.op, (args[0].mT, args[1].mT, None, None, *args[4:], kind))


def test_a_gradient_is_refused_where_it_is_asked_for():
    args = given((3, 8), torch.float32, "rms")
    args[2].requires_grad_()
    for f in (kernel.op, kernel.direct):
        q, scale, h = f(*args, torch.int8)  # inference with parameters that want gradients goes through
        assert not q.requires_grad
        with pytest.raises(NotImplementedError, match="norm_quantize has no derivative"):
            (scale.sum() + h.sum()).backward()


def test_flops_are_those_of_the_operators_in_sequence():
    for norm in NORMS:
        for added in (False, True):
            args = given((3, 8), torch.float32, norm, added=added)
            counts = []
            for f in (
                lambda a=args: kernel.op(*a, torch.int8),
                lambda a=args: sequence("op", torch.int8, *a),
            ):
                with FlopCounterMode(display=False) as counter:
                    f()
                counts.append(counter.get_total_flops())
            assert counts[0] == counts[1] > 0


def test_exported_with_symbolic_rows():
    class Model(torch.nn.Module):
        def forward(self, x, r, w):
            return kernel.op(x, r, w, None, EPS, False, 0.0, False, torch.int8)

    args = (torch.randn(4, 16), torch.randn(4, 16), torch.randn(16))
    rows = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Model(), args, dynamic_shapes={"x": rows, "r": rows, "w": None})
    assert kernel.op in [n.target for n in program.graph.nodes]
    x, r, w = torch.randn(9, 16), torch.randn(9, 16), args[2]
    same(program.module()(x, r, w), sequence("op", torch.int8, x, r, w, None, EPS, False, 0.0, False))


X, W = torch.empty(3, 4, device="meta"), torch.empty(4, device="meta")
LAYER, RMS = (EPS, True, 0.0, False, torch.int8), (EPS, False, 1.0, True, torch.int8)


def test_unsupported():
    assert list(kernel.unsupported(X, None, W, W, *LAYER)) == []
    assert list(kernel.unsupported(X, X, None, None, *RMS)) == []
    assert "torch.int32 is not one of" in next(kernel.unsupported(X.int(), None, W.int(), None, *RMS))
    assert "no dimension" in next(kernel.unsupported(X[0, 0], None, None, None, *RMS))
    assert "does not broadcast" in next(kernel.unsupported(X, X[0], None, None, *RMS))
    assert "w has 3 elements" in next(kernel.unsupported(X, None, W[:3], None, *RMS))
    assert "takes neither" in next(kernel.unsupported(X, None, W, None, EPS, True, 1.0, False, torch.int8))
    assert "torch.uint8 are not one of" in next(kernel.unsupported(X, None, W, None, *RMS[:-1], torch.uint8))
