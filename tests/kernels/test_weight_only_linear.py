"""weight_only_linear: its CPU and Triton kernels, kept forms, its gradient and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from structured import DTYPES, within
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _quantized, _quantized_cpu, _quantized_weights, dequantize
from fxaccel.kernels import weight_only_linear as kernel
from tests.helpers import thinned

FORMATS = list(_quantized.FORMATS)
FLOAT8 = torch.float8_e4m3fn
ALL = [*DTYPES, torch.float64]
SIZES = {  # K, N, group
    "one": (1, 1, 2),
    "one group": (12, 5, 12),
    "odd": (77, 33, 10),
    "cut": (100, 40, 64),
    "64": (256, 48, 64),
    "32": (160, 64, 32),
}
ROWS = [0, 1, 7, 40]


def stored(size, format, scales=None):
    """w, scale, zero of every code there is; one channel is an outlier, and one is zero."""
    k, n, group = SIZES[size]
    torch.manual_seed(k + n)
    each = -(-k // group)
    if format in _quantized.GROUPED:
        w = torch.randint(0, 256, (n, each * group // 2), dtype=torch.uint8)
        kind, wide = scales or torch.bfloat16, each
    else:
        w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
        w = (w.float() / 8).to(FLOAT8) if format == "float8" else w
        kind, wide = scales or torch.float32, 1
    scale = torch.rand(n, wide) * 0.1
    scale[-1] = 0
    scale[0] *= 100
    zero = torch.randn(n, wide).to(kind) if format == "int4" else None
    return w, scale.to(kind), zero


def tensors(size, format, rows, dtype, biased=True, device="cpu"):
    """x, w, scale, zero, b, format, group."""
    k, n, group = SIZES[size]
    w, scale, zero = stored(size, format)
    x, b = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype) if biased else None
    given = [t if t is None else t.to(device) for t in (x, w, scale, zero, b)]
    return [*given, format, group]


def bounds(args, dy=None):
    """y and its absolute terms in fp64 from the weight of x's dtype; of dx where there is a dy."""
    x, w, scale, zero, b, format, group = (t.cpu() if isinstance(t, torch.Tensor) else t for t in args)
    dense = dequantize.reference(w, scale, zero, format, group, x.shape[-1], x.dtype).double()
    if dy is not None:
        dy = dy.cpu().double()
        return dy @ dense, dy.abs() @ dense.abs()
    y, terms = x.double() @ dense.t(), x.double().abs() @ dense.abs().t()
    return (y, terms) if b is None else (y + b.double(), terms + b.double().abs())


def compare(got, exact_and_terms, summands, dtype, weights=0, results=1):
    """fp32 loses an eps a summand; a weight that may round otherwise, and a result, one of theirs each."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    own = torch.finfo(dtype).eps * (weights + results) if dtype.itemsize == 2 else 0
    assert got.dtype == dtype
    assert got.is_contiguous()
    want, terms = exact_and_terms
    within(got, want, terms + torch.finfo(dtype).tiny, (summands + 2) * eps + own, 1)


@thinned(2, size=SIZES, format=FORMATS, dtype=ALL, biased=[True, False])
def test_cpu_kernel(size, format, dtype, biased):
    for rows in ROWS:
        args = tensors(size, format, rows, dtype, biased)
        want = bounds(args)
        for f in (kernel.reference, kernel.op, kernel.direct):
            compare(f(*args), want, SIZES[size][0], dtype)


@thinned(2, size=SIZES, format=FORMATS, dtype=ALL, native=[True, False])
def test_kept(size, format, dtype, native, monkeypatch):
    """Scales may be rounded to bf16 where codes are read, and y before b is added."""
    if not native:
        monkeypatch.setattr(_quantized_cpu, "multiplies_bfloat16", lambda: False)
    kept = kernel.shared.made(*tensors(size, format, 1, dtype)[1:4], format, SIZES[size][2])
    for rows in ROWS:
        for biased in (True, False):
            args = tensors(size, format, rows, dtype, biased)
            compare(kernel.direct(*args, shared=kept), bounds(args), SIZES[size][0], dtype, 1, 2)


def test_which_form_is_read(monkeypatch):
    monkeypatch.setattr(_quantized_cpu, "multiplies_bfloat16", lambda: True)

    def few(k, n, format="int4", group=64, scale=(2**30, 2)):
        w = torch.empty(n, k, device="meta", dtype=_quantized.FORMATS[format])
        scale = torch.empty(min(n, scale[0]), scale[1] if format == "int4" else 1, device="meta")
        kept = _quantized_cpu.Kept(w, scale, None, format, group)
        return [rows for rows in (0, 1, 2, 3, 4, 5, 16, 17) if kept.few(rows, k)]

    assert few(512, 512) == [1, 2, 3, 4]
    assert few(512, 512, "int8") == [1, 2, 3, 4]
    assert few(1024, 1024) == []
    assert few(4096, 4096) == [1, 2, 3, 4]
    assert few(4096, 4096, "int8") == [1, 2]
    assert few(512, 512, "nf4") == few(512, 512, "float8") == []
    assert few(512, 500) == few(512, 500, "int8") == few(500, 512) == few(500, 512, "int8") == []
    assert few(512, 512, group=16) == few(512, 512, scale=(1, 1)) == []
    monkeypatch.setattr(_quantized_cpu, "multiplies_bfloat16", lambda: False)
    assert few(1024, 1024) == [1, 2, 3, 4, 5, 16]
    assert _quantized_cpu.computed(torch.bfloat16) == torch.float32


def test_forms_are_made_once():
    args = tensors("64", "int4", 40, torch.float32)
    kept = kernel.shared.made(*args[1:4], "int4", 64)
    kernel.direct(*args, shared=kept)
    form = kept.forms[torch.float32, 256]
    kernel.direct(*args, shared=kept)
    assert kept.forms[torch.float32, 256] is form
    assert kernel.shared.ahead
    assert kernel.worth({"w": args[1]})


@thinned(2, size=SIZES, format=FORMATS, dtype=DTYPES, biased=[True, False])
def test_launch(size, format, dtype, biased, device):
    """A weight may round otherwise, as what a GPU fuses rounds once; bf16 is truncated by the interpreter."""
    k, n, group = SIZES[size]
    for rows in ROWS:
        args = tensors(size, format, rows, dtype, biased, device)
        compare(kernel.launch(*args), bounds(args), k, dtype, 1)
        dy = torch.randn(rows, n).to(dtype).to(device)
        dx = _quantized_weights.launch_backward(dy, *args[1:4], format, group, k)
        compare(dx, bounds(args, dy), n, dtype, 1)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_split_columns(format, device, monkeypatch):
    """Parts of tiles of columns, the last of them shorter; in one dtype as in the other."""
    monkeypatch.setattr(_quantized_weights, "split", lambda m, n, k, cut: 3)
    for size, rows in (("64", 3), ("cut", 1), ("odd", 7)):
        for biased in (True, False):
            for dtype in (torch.float32, torch.float16):
                args = tensors(size, format, rows, dtype, biased, device)
                compare(kernel.launch(*args), bounds(args), SIZES[size][0], dtype, 1)


def test_how_many_parts():
    def parts(m, n, k):
        return _quantized_weights.split(m, n, k, _quantized_weights.config(m, n, k, 2))

    assert parts(1, 4096, 4096) == 4
    assert parts(16, 1024, 4096) == 16
    assert parts(33, 1024, 4096) == 1
    assert parts(1, 64, 128) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_launch_by_one_scale(format, device):
    args = tensors("odd", format, 7, torch.float32, True, device)
    args[2] = torch.tensor([[0.25]], device=device)
    args[3] = None if args[3] is None else args[3][:1, :1]
    compare(kernel.launch(*args), bounds(args), 77, torch.float32)
    if format in ("int8", "float8"):
        args[2] = torch.rand(33, 8, device=device)
        compare(kernel.launch(*args), bounds(args), 77, torch.float32)


@pytest.mark.parametrize("how", ["op", "kept", "launch"])
@pytest.mark.parametrize("format", FORMATS)
def test_leading_dimensions_and_strides(format, how, device):
    device = device if how == "launch" else "cpu"
    args = tensors("64", format, 1, torch.float32, True, device)
    kept = None if how == "launch" else kernel.shared.made(*args[1:4], format, 64)
    f = {"op": kernel.op, "kept": lambda *a: kernel.direct(*a, shared=kept), "launch": kernel.launch}[how]
    spread = torch.randn(256, 6, device=device).t()
    for x in (*(torch.randn(*shape, 256, device=device) for shape in ((), (2, 3), (2, 0, 3))), spread):
        y = f(x, *args[1:])
        assert y.shape == (*x.shape[:-1], 48)
        compare(y, bounds([x, *args[1:]]), 256, x.dtype)
    apart = [t if t is None else t.t().contiguous().t() for t in args[1:4]]
    x = torch.randn(3, 256, device=device)
    compare(f(x, *apart, *args[4:]), bounds([x, *args[1:]]), 256, x.dtype)


@thinned(2, size=["odd", "64"], format=FORMATS, dtype=ALL)
def test_gradients(size, format, dtype):
    n = SIZES[size][1]
    args = tensors(size, format, 7, dtype)
    x, b = args[0].requires_grad_(), args[4].requires_grad_()
    dy = torch.randn(7, n).to(dtype)
    for f in (kernel.op, kernel.direct):
        dx, db = torch.autograd.grad(f(*args), (x, b), dy)
        compare(dx, bounds(args, dy), n, dtype)
        torch.testing.assert_close(db, dy.sum(0))
        (db,) = torch.autograd.grad(f(x.detach(), *args[1:]), (b,), dy)
        torch.testing.assert_close(db, dy.sum(0))
    no_b = kernel.op(*args[:4], None, *args[5:])
    torch.testing.assert_close(torch.autograd.grad(no_b, x, dy)[0], dx)


@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck(format):
    x, *stored, b, kind, group = tensors("odd", format, 3, torch.float64)

    def f(x, b):
        return kernel.op(x, *stored, b, kind, group)

    leaves = x.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_a_frozen_scale_has_no_gradient():
    args = tensors("odd", "int4", 3, torch.float32)
    for place in (2, 3):
        args[place] = args[place].float().requires_grad_()
        y = kernel.op(*args)
        with pytest.raises(NotImplementedError, match="no derivative for a scale or a zero"):
            y.sum().backward()
        args[place] = args[place].detach()


def test_inputs_are_not_written():
    for format in FORMATS:
        args = tensors("64", format, 2, torch.bfloat16)
        copies = [t if t is None else t.float() for t in args[:5]]
        kernel.direct(*args, shared=kernel.shared.made(*args[1:4], format, 64))
        kernel.op(*args)
        assert all(a is None or torch.equal(a.float(), b) for a, b in zip(args, copies, strict=False))


# of formats and dtypes the operator reads one at a time
CHECKED = [(f, torch.float16, b) for f in FORMATS for b in (True, False)] + [("int4", d, True) for d in ALL]


@pytest.mark.parametrize(("format", "dtype", "biased"), dict.fromkeys(CHECKED), ids=str)
def test_opcheck(format, dtype, biased):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] * (
        format != "float8"
    )  # which multiplies what it compares: torch does not float8
    args = tensors("odd", format, 4, dtype, biased)
    torch.library.opcheck(kernel.op, tuple(args), test_utils=checks)
    backward = (torch.randn(4, 33).to(dtype), *args[1:4], format, 10, 77)
    torch.library.opcheck(kernel.backward_op, backward, test_utils=checks)
    args = [t.requires_grad_() if i in (0, 4) and t is not None else t for i, t in enumerate(args)]
    torch.library.opcheck(kernel.op, tuple(args), test_utils=checks)


def test_flops():
    args = tensors("64", "int4", 7, torch.float32)
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = kernel.op(*args)
    assert forward.get_total_flops() == 2 * 7 * 48 * 256
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * 7 * 48 * 256


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_is_that_of_linear(format):
    """x and b are cast; float8 and scales are not."""
    args = tensors("64", format, 7, torch.float32)
    low = [args[0].bfloat16(), *args[1:4], args[4].bfloat16(), *args[5:]]
    with torch.autocast("cpu", torch.bfloat16):
        y = kernel.op(*args)
        assert y.dtype == F.linear(args[0], torch.ones(3, 256)).dtype == torch.bfloat16
        assert torch.equal(y, kernel.direct(*args))
        double = kernel.op(args[0].double(), *args[1:4], args[4].double(), *args[5:])
    assert double.dtype == torch.float64
    assert torch.equal(y, kernel.op(*low))


def test_compiled():
    args = tensors("odd", "int4", 7, torch.float32)
    leaves = args[0].requires_grad_(), args[4].requires_grad_()

    def f(x, b):
        return kernel.op(x * 2, *args[1:4], b, *args[5:]).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), f(*leaves))
    for a, b in zip(*(torch.autograd.grad(g(*leaves).sum(), leaves) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


X, W8, W4, B = meta(3, 10), meta(5, 10, dtype=torch.int8), meta(5, 6, dtype=torch.uint8), meta(5)
S8, S4 = meta(5, 1), meta(5, 3)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((X.int(), W8, S8, None, B, "int8", 10), "x is torch.int32, not one of"),
        ((X[0, 0], W8, S8, None, B, "int8", 10), "x has no last dimension"),
        ((X, W8, S8, None, B, "int5", 10), "format 'int5' is not one of int8, float8, int4, nf4"),
        ((X, W8, S8, None, B, "float8", 10), "w is torch.int8; float8 is stored as torch.float8_e4m3fn"),
        ((X, W4, S4, None, B, "int4", 3), "a group has 3 columns; the kernel takes at least 1, and an even"),
        ((X, W8, S8, None, B, "int8", 0), "a group has 0 columns"),
        ((X, W4, S4, S4, B, "nf4", 4), "nf4 has no zero"),
        ((X, W8[0], S8, None, B, "int8", 10), "w has 1 dimensions; the kernel takes 2"),
        ((X, W8, S8[0], None, B, "int8", 10), "scale has 1 dimensions; the kernel takes 2"),
        ((X, W8, S8.int(), None, B, "int8", 10), "scale is torch.int32, not one of"),
        ((X, W4, S4, S4.int(), B, "int4", 4), "zero is torch.int32, not one of"),
        ((X, W4[:, :5], S4, S4, B, "int4", 4), "w has 5 columns; 10 of int4 in groups of 4 are stored as 6"),
        (
            (X, W8[:, :9], S8, None, B, "int8", 10),
            "w has 9 columns; 10 of int8 in groups of 10 are stored as",
        ),
        ((X, W4, S4[:, :2], None, B, "int4", 4), "scale is [5, 2]; w has 5 rows of 3 groups"),
        ((X, W4, S4, S4[:4], B, "int4", 4), "zero is [4, 3]; w has 5 rows of 3 groups"),
        ((X, W8, S8, None, B.half(), "int8", 10), "dtypes differ: x is torch.float32, b torch.float16"),
        ((X, W8, S8, None, S8, "int8", 10), "b has 2 dimensions; the kernel takes 1"),
        ((X, W8, S8, None, B[:4], "int8", 10), "b has 4 elements, and w 5 rows"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args))


def test_supported():
    assert list(kernel.unsupported(X, W8, S8, None, B, "int8", 10)) == []
    assert list(kernel.unsupported(X, W8, S8[:1], None, None, "int8", 10)) == []
    assert list(kernel.unsupported(X, W4, S4, S4, B, "int4", 4)) == []
    assert list(kernel.unsupported(X.double(), W4, S4.half(), None, B.double(), "nf4", 4)) == []


def test_symbolic_rows_are_not_guarded_on():
    args = tensors("odd", "int4", 4, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, x):
            return kernel.op(x, *args[1:])

    program = torch.export.export(Model(), (args[0],), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    val = next(n.meta["val"] for n in program.graph.nodes if n.name == "x")
    guards = len(val.shape[0].node.shape_env.guards)
    assert list(kernel.unsupported(val, *args[1:])) == []
    assert len(val.shape[0].node.shape_env.guards) == guards
    x = torch.randn(9, 77)
    torch.testing.assert_close(program.module()(x), kernel.reference(x, *args[1:]))
