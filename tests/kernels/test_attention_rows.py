"""Attention's rows that keep no key, where the mean of the values meets softcap, dropout and bias gradients.

The model is written with finfo.min in fp64, added to the scores or in their place; the kernels of the CPU and
Triton's run beneath the operator.
"""

import itertools

import pytest
import torch
from flash_reference import evaluated

from fxaccel.kernels import _attention_cpu, _attention_rows, _flash, _flash_blocks, _score
from fxaccel.kernels import attention as kernel
from fxaccel.kernels._flash_blocks import Config

B, H, G, S, T, D, E = 2, 4, 2, 40, 35, 8, 6
SCALE = 0.7
MASK = "(k <= q) & t1[b, k]"
LOWEST = torch.finfo(torch.float64).min
TENSOR, RELATIVE = "t0[b, h, q, k]", "t0[h, k - q + S - 1]"
SEVERAL = "t0[h, k - q + S - 1] + 0.01 * float(k) + t2[0, h, q, k] + t3[h, k]"
SHAPES = {TENSOR: (B, H, S, T), RELATIVE: (H, S + T - 1), SEVERAL: (H, S + T - 1), "": (1,)}
FEATURES = {  # softcap, dropout, bias
    "softcap": (1.5, 0.0, ""),
    "dropout": (0.0, 0.3, ""),
    "tensor bias": (0.0, 0.0, TENSOR),
    "relative bias": (0.0, 0.0, RELATIVE),
    "softcap, dropout": (1.5, 0.3, ""),
    "softcap, relative bias": (1.5, 0.0, RELATIVE),
    "dropout, tensor bias": (0.0, 0.3, TENSOR),
    "everything": (1.5, 0.3, SEVERAL),
}


def inputs(bias, dtype, device="cpu"):
    """q, k, v, dout, tables: rows 0 .. 4 of the first batch keep no key, and none of the second does."""
    torch.manual_seed(11)
    shapes = ((B, H, S, D), (B, G, T, D), (B, G, T, E), (B, H, S, E))
    keep = torch.rand(B, T) > 0.3
    keep[0, :5], keep[0, 5], keep[1] = False, True, False
    tables = [torch.randn(SHAPES[bias]), keep, torch.randn(1, H, S, T), torch.randn(H, T)]
    cast = lambda x: x.to(device, dtype if x.is_floating_point() else x.dtype)  # noqa: E731
    return [cast(torch.randn(n)) for n in shapes], [cast(t) for t in tables]


def model(q, k, v, tables, bias, softcap, empty, weights):
    """softmax(scores) @ v, as models write it with the least number for -inf."""
    k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
    s = q @ k.mT * SCALE
    if softcap:
        s = (s / softcap).tanh() * softcap
    if bias:
        s = s + evaluated(bias, tables, B, H, S, T, q.device)
    hidden = ~evaluated(MASK, tables, B, H, S, T, q.device)
    s = s + hidden.double() * LOWEST if empty == "mean" else s.masked_fill(hidden, LOWEST)
    return (s.softmax(-1) if weights is None else s.softmax(-1) * weights) @ v


def gradients(f, tensors, tables, bias):
    """out, dq, dk, dv and the gradients of the tables that the bias reads."""
    *tensors, dout = (x.detach().clone() for x in tensors)
    read = [i for i in range(len(tables)) if bias and f"t{i}" in bias]
    tables = [t.clone().requires_grad_(i in read) for i, t in enumerate(tables)]
    given = [x.requires_grad_() for x in tensors]
    out = f(*given, tables)
    return [out, *torch.autograd.grad(out, [*given, *(tables[i] for i in read)], dout)]


def check(near, name, empty, dtype, device="cpu", op=kernel.op, ulps=4):
    softcap, dropout, bias = FEATURES[name]
    tensors, tables = inputs(bias, dtype, device)
    wide = [x.double() for x in tensors]
    exact_tables = [t.double() if t.is_floating_point() else t for t in tables]
    options = {"softcap": softcap, "dropout": dropout, "empty": empty}
    weights = None
    if dropout:
        torch.manual_seed(5)
        eye = torch.eye(T, dtype=dtype, device=device).expand(B, G, T, T)
        kept = op(*tensors[:2], eye, tables, MASK, bias, SCALE, **options) > 0
        assert abs(kept[1].double().mean() - 1 + dropout) < 0.03
        weights = kept.double() / (1 - dropout)
        torch.manual_seed(5)
    run = lambda q, k, v, tables: op(q, k, v, tables, MASK, bias, SCALE, **options)  # noqa: E731
    got = gradients(run, tensors, tables, bias)
    plain = lambda q, k, v, tables: model(q, k, v, tables, bias, softcap, empty, weights)  # noqa: E731
    want = gradients(plain, wide, exact_tables, bias)
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        near(x, y.to(dtype), y, None, dtype, ulps)
        if i < 4 or bias == TENSOR:  # and where all rows are without keys
            near(x[1], y[1].to(dtype), y[1], None, dtype, ulps)
        if i < 2:
            near(x[0, :, :5], y[0, :, :5].to(dtype), y[0, :, :5], None, dtype, ulps)
    if empty == "fill":
        assert not got[1][1].any()
        assert not got[2][1].any()


@pytest.mark.parametrize("elements", [1 << 20, 2000], ids=["few tiles", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("empty", ["mean", "fill"])
@pytest.mark.parametrize("name", FEATURES)
def test_on_the_cpu(name, empty, dtype, elements, near, monkeypatch):
    monkeypatch.setattr(_attention_cpu, "ELEMENTS", elements)
    check(near, name, empty, dtype, ulps=16)


@pytest.mark.parametrize("empty", ["mean", "fill"])
@pytest.mark.parametrize("name", [n for n, (_, dropout, _) in FEATURES.items() if not dropout])
def test_the_reference(name, empty, near):
    check(near, name, empty, torch.float64, op=kernel.reference, ulps=64)


HALF = torch.bfloat16
QUICK = [
    ("softcap", "mean", HALF), ("dropout", "fill", torch.float32), ("relative bias", "mean", torch.float32),
    ("dropout, tensor bias", "mean", torch.float32),
]  # fmt: skip
EVERY = [*itertools.product(FEATURES, ("mean", "fill"), (torch.float32, HALF))]


@pytest.mark.parametrize(
    ("name", "empty", "dtype"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in EVERY],
    ids=str,
)
def test_in_triton(name, empty, dtype, device, near, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    blocks = {"forward": Config(32, 16, 4, 1), "keys": Config(16, 32, 4, 1)}
    monkeypatch.setattr(_flash_blocks, "default", lambda name, *_: blocks.get(name, Config(16, 16, 4, 1)))
    monkeypatch.setattr(kernel, "_kernels", lambda q: _flash)
    check(near, name, empty, dtype, device, ulps=16)


@pytest.mark.parametrize("empty", ["mean", "fill"])
def test_the_closed_form_serves_what_is_plain(empty, monkeypatch):
    runs = []
    old = _attention_rows._flat_gradients
    monkeypatch.setattr(_attention_rows, "_flat_gradients", lambda *a: (runs.append(a), old(*a))[1])
    tensors, tables = inputs("", torch.float32)
    for softcap, rows in ((0.0, True), (2.0, True), (2.0, False)):
        tables[1] = tables[1] if rows else torch.ones_like(tables[1])
        f = lambda q, k, v, t: kernel.op(q, k, v, t, MASK, "", SCALE, softcap, empty=empty)  # noqa: E731, B023
        gradients(f, tensors, tables, "")
    assert len(runs) == (empty == "mean")


def test_a_table_may_be_larger_than_what_is_read():
    table = torch.zeros(T + 2, S + 1, requires_grad=True)
    (q, k, v, dout), tables = inputs("", torch.float32)
    out = kernel.op(q, k, v, [table, *tables[1:]], MASK, "t0[k, q]", SCALE, empty="nan")
    out.backward(dout)
    lost = table.grad.isnan()
    assert lost[:T, :S].all()
    assert not lost[T:].any()
    assert not lost[:, S:].any()


def test_the_rows_are_a_table_of_their_own():
    assert _score.OWN in _attention_rows.ROWS
    assert _score.TABLES.index(_score.OWN) == kernel.MAX_TABLES
