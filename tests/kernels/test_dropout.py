"""dropout: bit for bit torch's own on the CPU, and a byte an element kept for the gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import dropout as kernel
from fxaccel.memory import Meter

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INPUTS = {
    "a number": lambda: torch.randn(()),
    "nothing": lambda: torch.randn(0, 3),
    "odd": lambda: torch.randn(3, 5, 7),
    "turned": lambda: torch.randn(4, 6, 5).mT,
    "every second": lambda: torch.randn(6, 8)[:, ::2],
    "expanded": lambda: torch.randn(5, 1).expand(5, 4),
    "infinite": lambda: torch.tensor([[float("inf"), float("nan"), -0.0, 1.0] * 5]),
}


def drawn(f, x, p, dy):
    """y, the gradient of x, and the state of the generator behind it, from one seed."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    y = f(x, p)
    (grad,) = torch.autograd.grad(y, x, dy)
    return y.detach(), grad, torch.random.get_rng_state()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3])
def test_the_very_numbers_of_torch(name, p, dtype):
    torch.manual_seed(0)
    x = INPUTS[name]().to(dtype)
    dy = torch.randn(x.shape).to(dtype)
    want = drawn(lambda x, p: F.dropout(x, p), x, p, dy)
    for f in (kernel.op, kernel.direct, kernel.reference):
        got = drawn(f, x, p, dy)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(kernel.direct(x, p), want[0], rtol=0, atol=0, equal_nan=True)


def test_a_gradient_has_a_gradient():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def f(x):
        torch.manual_seed(7)
        return kernel.op(x.sin(), 0.3)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_a_byte_an_element_is_kept():
    x = torch.randn(1000, 100, requires_grad=True)
    kept = []
    for f in (F.dropout, kernel.op, kernel.direct):
        with Meter() as meter:
            y = f(x, 0.1)
        kept.append(meter.live - y.untyped_storage().nbytes())
    assert kept == [400_000, 100_000, 100_000]


def test_registration():
    x = torch.randn(3, 4, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")  # the fourth compares two draws
    torch.library.opcheck(kernel.op, (x, 0.2), test_utils=tests)
    torch.library.opcheck(kernel.save_op, (x.detach(), 0.2), test_utils=tests)
    for op in (kernel.op, kernel.save_op):
        assert torch.Tag.nondeterministic_seeded in op.tags
    with FlopCounterMode(display=False) as counter:
        kernel.op(x.detach(), 0.2)
    assert counter.get_total_flops() == 24


def test_it_says_what_it_does_not_take():
    assert list(kernel.unsupported(torch.randn(2), 0.5)) == []
    assert list(kernel.unsupported(torch.ones(2, dtype=torch.complex64), 0.5))
    for p in (0.0, 1.0):
        assert list(kernel.unsupported(torch.randn(2), p)) == [
            f"the probability is {p}; numbers are drawn between 0 and 1"
        ]
