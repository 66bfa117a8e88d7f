"""dequantize: the formats, from their bytes, its registration and what it refuses."""

import pytest
import torch
from structured import DTYPES, within
from test_weight_only_linear import ALL, FORMATS, SIZES, meta, stored

from fxaccel.kernels import _quantized
from fxaccel.kernels import dequantize as kernel


def exact(w, scale, zero, format, group, columns):
    """The weight, one element after the other, from bytes."""
    made = torch.zeros(len(w), columns, dtype=torch.float64)
    each = scale.shape[1]
    for i in range(len(w)):
        for j in range(columns):
            if format in _quantized.GROUPED:
                byte = int(w[i, j // 2])
                code = byte // 16 if j % 2 else byte % 16
                value = code - 8 if format == "int4" else _quantized.NF4[code]
            else:
                value = float(w[i, j])
            g = min(j // group, each - 1)
            at = min(i, len(scale) - 1)
            made[i, j] = value * float(scale[at, g]) + (0.0 if zero is None else float(zero[at, g]))
    return made


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_values(size, format):
    w, scale, zero = stored(size, format)
    k, _, group = SIZES[size]
    want = exact(w, scale, zero, format, group, k)
    for f in (kernel.reference, kernel.op):
        assert torch.equal(f(w, scale, zero, format, group, k, torch.float64), want)
        for dtype in DTYPES:  # a product of 8 or 11 bits with 24 is rounded once, and the sum with zero
            got = f(w, scale, zero, format, group, k, dtype)
            largest = want.abs() if zero is None else want.abs() + zero.double().abs().amax()
            own = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
            within(got, want, largest + torch.finfo(dtype).tiny, 2.0**-23 * 2 + own, 1)
            assert torch.equal(got, kernel.reference(w, scale, zero, format, group, k, dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_one_scale_for_all_and_groups_of_bytes(format):
    w, _, zero = stored("odd", format)
    zero = None if zero is None else zero[:1, :1]
    one = torch.tensor([[0.25]])
    assert torch.equal(
        kernel.op(w, one, zero, format, 10, 77, torch.float64), exact(w, one, zero, format, 10, 77)
    )
    many = torch.rand(33, 8)
    assert torch.equal(
        kernel.op(w, many, None, format, 10, 77, torch.float64), exact(w, many, None, format, 10, 77)
    )


def test_nibbles():
    codes = torch.randint(0, 16, (5, 7), dtype=torch.int32)
    packed = _quantized.pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 4)
    assert torch.equal(_quantized.unpack_nibbles(packed)[:, :7], codes.to(torch.uint8))
    assert _quantized.unpack_nibbles(packed)[:, 7].eq(0).all()
    assert _quantized.pack_nibbles(torch.tensor([[1, 2]])).item() == 0x21
    assert torch.equal(_quantized.pack_nibbles(_quantized.unpack_nibbles(packed)), packed)


def test_nf4_is_the_table_of_the_paper():
    """Quantiles of the normal distribution, 7 below zero, 8 above, cut at 1 - (1/32 + 1/30) / 2, in fp32."""
    edge = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(edge, 0.5, 9)[:-1].double())
    below = -normal.icdf(torch.linspace(edge, 0.5, 8)[:-1].double())
    table = torch.cat([above, torch.zeros(1), below]).sort().values
    torch.testing.assert_close(
        torch.tensor(_quantized.NF4, dtype=torch.float64), table / table.max(), rtol=0, atol=2.0**-23
    )


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format, dtype):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += ["test_schema"] * (
        format != "float8"
    )  # which multiplies what it compares: torch does not float8
    args = *stored("odd", format), format, 10, 77, dtype
    torch.library.opcheck(kernel.op, args, test_utils=checks)


def test_a_gradient_is_refused_where_it_is_asked_for():
    w, scale, zero = stored("odd", "int4")
    y = kernel.op(w, scale.requires_grad_(), zero, "int4", 10, 77, torch.float32)
    with pytest.raises(NotImplementedError, match="dequantize has no derivative"):
        y.sum().backward()


W4, S4 = meta(5, 6, dtype=torch.uint8), meta(5, 3)


def test_unsupported():
    assert list(kernel.unsupported(W4, S4, S4, "int4", 4, 10, torch.half)) == []
    assert any("dtype torch.int8 is" in s for s in kernel.unsupported(W4, S4, S4, "int4", 4, 10, torch.int8))
    assert any("stored as 7" in s for s in kernel.unsupported(W4, S4, S4, "int4", 2, 13, torch.half))
