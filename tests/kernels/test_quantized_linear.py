"""quantized_linear: exact sums, its CPU and Triton kernels, the laid out weight, and what it refuses."""

import pytest
import torch
from structured import within
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _gemm, _quantized, _quantized_gemm
from fxaccel.kernels import quantized_linear as kernel
from tests.helpers import thinned

FLOAT8 = torch.float8_e4m3fn
KINDS = [torch.int8, FLOAT8]
OUT = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1), (7, 5), (64, 64), (123, 77), (300, 33), (2050, 16)]  # K, N
ROWS = [0, 1, 2, 33]
ONES = torch.ones(())


def numbers(*shape, kind=torch.int8):
    """All values that there are, -128 of int8 too."""
    if kind == torch.int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8)
    return (torch.randn(shape) * torch.logspace(-3, 2, shape[-1])).clamp(-448, 448).to(FLOAT8)


def tensors(k, n, rows, kind=torch.int8, per_row=True, biased=True):
    """q, scale, w, w_scale, b."""
    torch.manual_seed(k + n + rows)
    scale = torch.rand(rows, 1) + 0.01 if per_row else torch.rand(1) + 0.01
    b = torch.randn(n) * 1e3 if biased else None
    return numbers(rows, k, kind=kind), scale, numbers(n, k, kind=kind), torch.rand(n, 1) * 1e-2, b


def on(device, args):
    return [t if t is None else t.to(device) for t in args]


def compare(y, args, dtype):
    """Against fp64: int8 has three roundings and the result's, float8 a rounding a summand as well.

    The interpreter truncates bfloat16: a whole eps of the result, of which rounding loses half.
    """
    q, scale, w, w_scale, b = on("cpu", args)
    wide = [q, scale.double(), w, w_scale.double(), None if b is None else b.double()]
    want = kernel.reference(*wide, torch.float64)
    terms = kernel.reference(q.double().abs(), wide[1], w.double().abs(), wide[3], None, torch.float64)
    if q.dtype == torch.int8:
        terms = kernel.reference(*wide[:4], None, torch.float64).abs()
    terms = (terms if b is None else terms + wide[4].abs()) + torch.finfo(dtype).tiny  # where steps end
    roundings = 4 if q.dtype == torch.int8 else 4 + q.shape[-1]
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    own = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    assert y.dtype == dtype
    assert y.is_contiguous()
    within(y, want, terms, roundings * eps + own, 1)


def ways():
    """The kernels of the CPU."""

    def laid(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "LARGE", 0)
            return kernel.direct(*args, shared=kernel.pack(args[2], args[3]))

    return {"reference": kernel.reference, "op": kernel.op, "direct": kernel.direct, "laid": laid}


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(_quantized, "exact", lambda: False)


@pytest.mark.parametrize("how", ways())
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_sums_are_exact(k, n, rows, how):
    q, _, w, *_ = tensors(k, n, rows)
    y = ways()[how](q, ONES, w, torch.ones(1, 1), None, torch.float32)
    assert torch.equal(y, (q.long() @ w.long().t()).float())


@pytest.mark.usefixtures("without_vnni")
@pytest.mark.parametrize("how", ways())
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_sums_are_exact_without_instructions_for_bytes(k, n, how):
    for rows in ROWS:
        test_sums_are_exact(k, n, rows, how)


@pytest.mark.parametrize("instructions", [True, False])
def test_the_largest_sums(instructions, monkeypatch):
    """What saturates where bytes are multiplied in 16 bits, and what fp32 does not hold at once."""
    if not instructions:
        monkeypatch.setattr(_quantized, "exact", lambda: False)
    for a, b in ((-128, -128), (127, 127), (-128, 127)):
        q, w = torch.full((3, 4097), a, dtype=torch.int8), torch.full((16, 4097), b, dtype=torch.int8)
        assert (_quantized.integers(q, w) == 4097 * a * b).all()
        y = ways()["laid"](q, ONES, w, torch.ones(1, 1), None, torch.float32)
        assert (y == torch.tensor(4097 * a * b).float()).all()
    odd = torch.ones(2, 4097, dtype=torch.int8) * 127
    odd[:, 0] = 0
    assert (_quantized.integers(odd, odd) == 4096 * 127 * 127).all()  # of 4095 of them fp32 holds no sum


@thinned(2, how=ways(), kind=KINDS, dtype=OUT, per_row=[True, False], biased=[True, False])
def test_cpu_kernels(how, kind, dtype, per_row, biased):
    for k, n in SIZES:
        for rows in ROWS:
            args = tensors(k, n, rows, kind, per_row, biased)
            compare(ways()[how](*args, dtype), args, dtype)


@thinned(2, size=SIZES[:5], kind=KINDS, dtype=OUT[:3], biased=[True, False])
def test_launch(size, kind, dtype, biased, device):
    k, n = size
    for rows in ROWS:
        for per_row in (True, False):
            args = on(device, tensors(k, n, rows, kind, per_row, biased))
            compare(kernel.launch(*args, dtype), args, dtype)


def test_launch_has_exact_sums_and_walks_all_tiles(device):
    q, _, w, *_ = on(device, tensors(70, 600, 300))
    one = torch.ones(1, 1, device=device)
    y = kernel.launch(q, one[0], w, one, None, torch.float32)
    assert torch.equal(y.cpu(), (q.cpu().long() @ w.cpu().long().t()).float())


def test_every_float8_is_unpacked(device):
    """Also as tensor cores take it, where there are some: q has every number, w is 1."""
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    q = every[(every & 127) != 127].view(FLOAT8)[:, None].to(device)
    one = torch.ones(1, 1, device=device)
    y = kernel.launch(q, one[0], one.to(FLOAT8), one, None, torch.float32)
    assert torch.equal(y, q.float())
    bad = torch.tensor([[127], [255]], dtype=torch.uint8, device=device).view(FLOAT8)
    assert kernel.launch(bad, one[0], one.to(FLOAT8), one, None, torch.float32).isnan().all()


def test_the_configurations_that_the_interpreter_does_not_see():
    assert _quantized_gemm.config(8192, 8192, 8192)[:2] == (128, 128)
    assert _quantized_gemm.config(1, 8192, 8192)[:2] == (16, 64)
    assert _quantized_gemm.config(1, 8, 8).depth == 32  # the least of a product of bytes


@pytest.mark.parametrize("how", ["op", "direct", "laid", "launch"])
def test_outliers_and_bad_rows(how, device):
    q, scale, w, w_scale, b = tensors(64, 32, 5)
    scale[1], scale[2] = float("nan"), float("inf")
    q[2] = 127
    w[:] = 1
    w[3] = 0  # a channel of zeros
    w_scale[4] = 1e6
    given = on(device if how == "launch" else "cpu", (q, scale, w, w_scale, b))
    y = {**ways(), "launch": kernel.launch}[how](*given, torch.float32).cpu()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    rest = [0, 3, 4]
    compare(y[rest].contiguous(), (q[rest], scale[rest], w, w_scale, b), torch.float32)
    assert torch.equal(y[rest, 3], b[3].expand(3))


@pytest.mark.parametrize("how", ["op", "direct", "laid", "launch"])
@pytest.mark.parametrize("shape", [(), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions_and_strides(shape, how, device):
    device = device if how == "launch" else "cpu"
    f = {**ways(), "launch": kernel.launch}[how]
    _, _, w, w_scale, b = on(device, tensors(40, 24, 1))
    q = numbers(*shape, 40).to(device)
    for scale in (torch.rand(*shape, 1, device=device), torch.rand((), device=device)):
        y = f(q, scale, w, w_scale, b, torch.float32)
        assert y.shape == (*shape, 24)
        torch.testing.assert_close(y, kernel.reference(q, scale, w, w_scale, b, torch.float32))
    scale = torch.rand(7, 2, device=device)[:, :1]
    q = numbers(40, 7).to(device).t()
    apart = w.t().contiguous().t(), torch.stack([w_scale, w_scale], 1)[:, 0], torch.stack([b, b], 1)[:, 0]
    y = f(q, scale, *apart, torch.float32)
    torch.testing.assert_close(y, kernel.reference(q, scale, w, w_scale, b, torch.float32))


def test_which_kernel_runs(monkeypatch):
    ran = []
    monkeypatch.setattr(kernel, "compose", lambda *a: ran.append("as it lies"))
    monkeypatch.setattr(kernel, "_laid", lambda q, *a: ran.append("laid") or torch.empty(len(q), 5))
    monkeypatch.setattr(kernel, "LARGE", 30)  # elements of w: 35
    for rows in (1, 2):
        q, scale, w, w_scale, _ = tensors(7, 5, rows)
        for dtype in (torch.float32, torch.float64):
            kernel.direct(q, scale, w, w_scale, None, dtype, kernel.pack(w, w_scale))
    kernel.direct(q, scale, w, w_scale, None, dtype)
    vnni = "as it lies" if _quantized.exact() else "laid"
    assert ran == [vnni, "as it lies", "laid", "as it lies", "as it lies"]
    ran.clear()
    monkeypatch.setattr(kernel, "LARGE", 35)
    for rows in (7, 8):  # elements of y: 35, 40
        q, scale, w, w_scale, _ = tensors(7, 5, rows)
        kernel.direct(q, scale, w, w_scale, None, torch.float32, kernel.pack(w, w_scale))
    assert ran == [vnni, "laid"]


def test_what_a_laid_out_weight_is_worth(monkeypatch):
    def given(rows, k, n, kind=torch.int8):
        return {"q": torch.empty(rows, k, dtype=kind), "w": torch.empty(n, k, dtype=kind)}

    monkeypatch.setattr(_quantized, "exact", lambda: True)
    assert not kernel.worth(given(1, 1024, 1024))
    assert kernel.worth(given(2, 1024, 1024))
    assert not kernel.worth(given(2, 512, 512))
    assert kernel.worth(given(513, 512, 512))
    assert kernel.worth(given(1, 8, 8, FLOAT8))
    monkeypatch.setattr(_quantized, "exact", lambda: False)
    assert kernel.worth(given(1, 8, 8))
    assert kernel.shared.ahead
    assert kernel.shared.made is kernel.pack


def test_inputs_are_not_written():
    for kind in KINDS:
        args = tensors(40, 24, 5, kind)
        copies = [t.float() for t in args]
        for f in ways().values():
            f(*args, torch.float32)
        assert all(torch.equal(a.float(), b) for a, b in zip(args, copies, strict=True))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", OUT, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_opcheck(kind, dtype, biased):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] * (
        kind == torch.int8
    )  # which multiplies what it compares: torch does not float8
    args = tensors(40, 24, 5, kind, biased=biased)
    torch.library.opcheck(kernel.op, (*args, dtype), test_utils=checks)


def test_flops():
    with FlopCounterMode(display=False) as counted:
        kernel.op(*tensors(40, 24, 5), torch.float32)
    assert counted.get_total_flops() == 2 * 5 * 24 * 40


@pytest.mark.parametrize("f", [kernel.op, kernel.direct], ids=["op", "direct"])
def test_a_gradient_is_refused_where_it_is_asked_for(f):
    q, scale, w, w_scale, b = tensors(7, 5, 3)
    for leaf in (scale, w_scale, b):
        leaf.requires_grad_()
        y = f(q, scale, w, w_scale, b, torch.float32)
        with pytest.raises(NotImplementedError, match="quantized_linear has no derivative"):
            y.sum().backward()
        leaf.requires_grad_(False)


def test_exported_with_symbolic_rows():
    _, _, *rest = tensors(16, 24, 1)

    class Model(torch.nn.Module):
        def forward(self, q, scale):
            return kernel.op(q, scale, *rest, torch.float32)

    shapes = {"q": {0: torch.export.Dim.AUTO}, "scale": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(Model(), (numbers(4, 16), torch.rand(4, 1)), dynamic_shapes=shapes)
    val = next(n.meta["val"] for n in program.graph.nodes if n.name == "q")
    guards = len(val.shape[0].node.shape_env.guards)
    scale = next(n.meta["val"] for n in program.graph.nodes if n.name == "scale")
    assert list(kernel.unsupported(val, scale, *rest, torch.float32)) == []
    assert kernel.worth({"q": val, "w": rest[0]})  # as many rows as one likes
    assert len(val.shape[0].node.shape_env.guards) == guards
    q, scale = numbers(9, 16), torch.rand(9, 1)
    want = kernel.reference(q, scale, *rest, torch.float32)
    torch.testing.assert_close(program.module()(q, scale), want)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


Q, W, S, WS, B = meta(3, 8, dtype=torch.int8), meta(5, 8, dtype=torch.int8), meta(3, 1), meta(5, 1), meta(5)
LONG = 133_001


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((Q.float(), S, W, WS, B), "q is torch.float32, not one of torch.int8"),
        ((Q[0, 0], S, W, WS, B), "q has no last dimension"),
        ((Q, S, W[0], WS, B), "w has 1 dimensions; the kernel takes 2"),
        ((Q, S, W, WS[:, 0], B), "w_scale has 1 dimensions; the kernel takes 2"),
        ((Q, S, W, WS, WS), "b has 2 dimensions; the kernel takes 1"),
        ((Q, S, W, WS.int(), B), "w_scale is torch.int32"),
        ((Q, S, W, WS, B.int()), "b is torch.int32"),
        ((Q, S, W.to(FLOAT8), WS, B), "dtypes differ: q is torch.int8, w torch.float8_e4m3fn"),
        ((Q, S, W[:, :7], WS, B), "q has 8 columns, and w 7"),
        (
            (meta(3, LONG, dtype=torch.int8), S, meta(5, LONG, dtype=torch.int8), WS, B),
            "133001 columns; int32 holds the sums of 133,000 products",
        ),
        ((Q, S[:2], W, WS, B), "scale is [2, 1]; the kernel takes [] or [1]"),
        ((Q, S.half(), W, WS, B), "scale is torch.float16, not float32 or float64"),
        ((Q, S, W, WS[:4], B), "w_scale is [4, 1]; the kernel takes [5, 1] or [1, 1]"),
        ((Q, S, W, WS.expand(5, 2), B), "w_scale is [5, 2]"),
        ((Q, S, W, WS, B[:4]), "b has 4 elements, and w 5 rows"),
    ],
)
def test_unsupported(args, why):
    assert any(why in sentence for sentence in kernel.unsupported(*args, torch.float32))


def test_supported():
    assert list(kernel.unsupported(Q, S, W, WS, B, torch.bfloat16)) == []
    assert list(kernel.unsupported(Q, S[0], W, WS[:1], None, torch.float32)) == []
    assert list(kernel.unsupported(Q, S[0, 0], W, WS, B, torch.float64)) == []
    assert list(kernel.unsupported(Q[0], S[0], W, WS, B, torch.float32)) == []
    assert any("dtype torch.int8 is not" in s for s in kernel.unsupported(Q, S, W, WS, B, torch.int8))


def test_on_a_gpu_float8_is_unpacked_where_it_is_not_multiplied(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (8, 0))
    assert not _quantized_gemm.multiplies_float8(Q)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: (9, 0))
    assert _quantized_gemm.multiplies_float8(Q)
    monkeypatch.setattr(torch.version, "hip", "6")
    assert not _quantized_gemm.multiplies_float8(Q)
    assert not _gemm.on_gpu(Q)


@pytest.mark.parametrize(("rows", "n"), [(1, 40), (3, 1), (1, 1)])
def test_one_row_of_any_stride_is_read_as_one_row(rows, n):
    """A dimension of one element may have any stride, and PyTorch calls the tensor contiguous."""
    q, scale, w, w_scale, b = tensors(64, n, rows)
    want = kernel.compose(q, scale, w, w_scale, b, torch.float32)
    odd = [t.as_strided(t.shape, (1, 1)) if len(t) == 1 else t for t in (q, w)]
    assert all(t.is_contiguous() for t in odd)
    assert torch.equal(kernel.compose(odd[0], scale, odd[1], w_scale, b, torch.float32), want)
    assert torch.equal(kernel.direct(odd[0], scale, odd[1], w_scale, b, torch.float32), want)
