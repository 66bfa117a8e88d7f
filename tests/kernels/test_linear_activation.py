"""linear_activation: values on either way, which way is taken when, registration, what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from structured import within
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import linear_activation as kernel

pytestmark = pytest.mark.skipif(kernel.product is None, reason="torch without oneDNN")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """oneDNN's product takes every size; which sizes it was called with."""
    made, product = [], kernel.product
    monkeypatch.setattr(kernel, "LEAST", 0)
    monkeypatch.setattr(kernel, "product", lambda *a: made.append(a[0].shape) or product(*a))
    return made


def tensors(rows, k, n, biased=True, dtype=torch.float32):
    torch.manual_seed(k + n)
    made = torch.randn(rows, k), torch.randn(n, k), torch.randn(n) if biased else None
    return [None if t is None else t.to(dtype) for t in made]


def eager(x, w, b):
    return F.gelu(F.linear(x, w, b), approximate="tanh")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (16, 123, 77), (33, 256, 128)], ids=str)
def test_values(shape, biased, calls):
    x, w, b = tensors(*shape, biased)
    with torch.no_grad():
        got = kernel.direct(x, w, b, "gelu_tanh")
    assert calls == [x.shape]
    assert torch.equal(kernel.op(x, w, b, "gelu_tanh"), eager(x, w, b))
    # a sum errs by eps of its terms a summand, of which the activation passes on 1.13 at most; then its own
    # factor in (0, 1) errs by a few eps of 1
    wide = [None if t is None else t.double() for t in (x, w, b)]
    terms = F.linear(*(None if t is None else t.abs() for t in wide))
    within(got, eager(*wide), terms, (1.13 * (x.shape[-1] + 1) + 8) * EPS, 1)
    assert got.is_contiguous()


def test_layouts(calls):
    for x in (torch.randn(64), torch.randn(2, 6, 64), torch.randn(64, 12).t(), torch.randn(12, 128)[:, 1::2],
              torch.randn(1, 64).expand(12, 64), torch.randn(0, 64)):  # fmt: skip
        _, w, b = tensors(1, 64, 5)
        with torch.no_grad():
            got = kernel.direct(x, w, b, "gelu_tanh")
        assert got.shape == (*x.shape[:-1], 5)
        torch.testing.assert_close(got, eager(x, w, b))
    assert len(calls) == 6


def test_who_gets_torchs_operators(calls, monkeypatch):
    x, w, b = tensors(4, 8, 6)
    leaf = x.clone().requires_grad_()
    y = kernel.direct(leaf, w, b, "gelu_tanh")
    assert torch.autograd.gradcheck(
        lambda t: kernel.op(t, w.double(), b.double(), "gelu_tanh"), leaf.double().detach().requires_grad_()
    )
    (got,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(eager(leaf, w, b).sum(), leaf)[0])
    with torch.no_grad():
        kernel.direct(x, w.t().contiguous().t(), b, "gelu_tanh")
        kernel.direct(*tensors(4, 8, 6, dtype=torch.bfloat16), "gelu_tanh")
        with torch.autocast("cpu", torch.bfloat16):
            assert kernel.direct(x, w, b, "gelu_tanh").dtype == torch.bfloat16
        monkeypatch.setattr(kernel, "LEAST", 4 * 8 * 6 + 1)
        kernel.direct(x, w, b, "gelu_tanh")
    assert calls == []


def test_registration():
    x, w, b = tensors(4, 8, 6)
    torch.library.opcheck(kernel.op, (x, w, b, "gelu_tanh"))
    torch.library.opcheck(kernel.op, (x.requires_grad_(), w, None, "gelu_tanh"))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        kernel.op(x, w, b, "gelu_tanh")
    assert counted.get_total_flops() == 4 * 6 * (2 * 8 + 9)


def test_unsupported(monkeypatch):
    x, w, b = (torch.empty(s, device="cpu") for s in ((4, 8), (6, 8), (6,)))
    assert list(kernel.unsupported(x, w, b, "gelu_tanh")) == []
    half = "dtype torch.float16; the product is of torch.float32"
    assert list(kernel.unsupported(x.half(), w.half(), b.half(), "gelu_tanh")) == [half]
    assert list(kernel.unsupported(x.to("meta"), w, b, "gelu_tanh")) == [
        "x is on meta; the product is the CPU's"
    ]
    (why,) = kernel.unsupported(x, w[0], b[0], "gelu_tanh")
    assert why == "w has 1 dimensions and b 0; the kernel takes 2 and 1"
    assert list(kernel.unsupported(x, w, b, "gelu")) == ["activation 'gelu' is not one of gelu_tanh"]
    monkeypatch.setattr(kernel, "LEAST", 2**25)
    (why,) = kernel.unsupported(x, w, b, "gelu_tanh")
    assert why == "the product has 192 multiply-adds; below 33,554,432 nothing is gained"
    monkeypatch.setattr(kernel, "product", None)
    assert "this torch was built without oneDNN" in next(kernel.unsupported(x, w, b, "gelu_tanh"))
