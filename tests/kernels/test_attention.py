"""attention: the operator on the CPU against fp64 written out here, its gradients, and its registration."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxaccel.kernels import _attention_cpu, _attention_rows, _flash, _score, _score_blocks
from fxaccel.kernels import attention as kernel
from tests.helpers import thinned

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCALE = 0.3


def tensors(b, h, g, s, t, d, e, dtype=torch.float32):
    """q, k, v and the gradient of out."""
    torch.manual_seed(s * 7 + t)
    made = [torch.randn(n) for n in ((b, h, s, d), (b, g, t, d), (b, g, t, e), (b, h, s, e))]
    return [x.to(dtype) for x in made]


# the meaning, written out: masks and biases are functions of index tensors, never the text under test


def indices(b, h, s, t):
    """b, h, q, k as index tensors that broadcast to [b, h, s, t]."""
    sizes = (b, h, s, t)
    return [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(sizes)]


MASKS = {
    "": lambda b, h, q, k, s, t, r: None,
    "k <= q": lambda b, h, q, k, s, t, r: k <= q,
    "k <= q + T - S": lambda b, h, q, k, s, t, r: k - t <= q - s,
    "(k <= q) & (q - k < 20)": lambda b, h, q, k, s, t, r: (k <= q) & (k > q - 20),
    "abs(q - k) <= 5": lambda b, h, q, k, s, t, r: (q - k).abs() < 6,
    "q // 64 == k // 64": lambda b, h, q, k, s, t, r: (q / 64).floor() == (k / 64).floor(),
    "(k <= q) | (k < 7)": lambda b, h, q, k, s, t, r: torch.where(k < 7, True, k <= q),
    "t1[b, k]": lambda b, h, q, k, s, t, r: r[1][b, k],
    "(k <= q) & t1[b, k]": lambda b, h, q, k, s, t, r: (k <= q) & r[1][b, k],
    "t2[b, q % T] == t2[b, k]": lambda b, h, q, k, s, t, r: r[2][b, q.remainder(t)] == r[2][b, k],
    "t1[b, k] & (q + h > 3)": lambda b, h, q, k, s, t, r: r[1][b, k] & (q > 3 - h),
}
BIASES = {
    "": ((1,), lambda b, h, q, k, s, t, x: None),
    "t0[0, h, q, k]": ((1, "h", "q", "k"), lambda b, h, q, k, s, t, x: x[0, h, q, k]),
    "t0[b, 0, 0, k]": (("b", 1, 1, "k"), lambda b, h, q, k, s, t, x: x[b, 0, 0, k]),
    "t0[k, q]": (("k", "q"), lambda b, h, q, k, s, t, x: x[k, q]),
    "t0[h, k - q + S - 1]": (("h", "r"), lambda b, h, q, k, s, t, x: x[h, k + (s - 1 - q)]),
    "t0[k - q + S - 1, b]": (("r", "b"), lambda b, h, q, k, s, t, x: x[k + (s - 1 - q), b]),
    "t0[h, q] + t0[h, 0]": (("h", "q"), lambda b, h, q, k, s, t, x: x[h, q] + x[h, 0]),
    "t0[q, k, b, h]": (("q", "k", "b", "h"), lambda b, h, q, k, s, t, x: x[q, k, b, h]),
    "t0[h] * (k - q)": (("h",), lambda b, h, q, k, s, t, x: x[h] * (k - q)),
}
NO_GRADIENT = ("t0[h] * (k - q)", "t0[h, q] + t0[h, 0]")


def tables_for(mask, bias, b, h, s, t, dtype=torch.float32):
    """t0 for the bias, t1 key padding, t2 documents."""
    torch.manual_seed(1)
    sizes = {"b": b, "h": h, "q": s, "k": t, "r": s + t - 1}
    t0 = torch.randn([sizes.get(n, n) for n in BIASES[bias][0]]).to(dtype)
    keep = torch.rand(b, t) > 0.3
    keep[:, -2:] = False
    return [t0, keep, torch.arange(t).mul(3).div(t, rounding_mode="floor").expand(b, -1).contiguous()]


def exact(q, k, v, tables, mask, bias, scale, softcap=0.0, sinks=None, empty="zero", weights=None):
    """Attention as its contract says, with every tensor; `weights` are what dropout multiplies by."""
    (b, h, s, _), t = q.shape, k.shape[2]
    at = indices(b, h, s, t)
    k, v = (x[:, torch.arange(h) // (h // x.shape[1])] for x in (k, v))
    raw = x = scale * torch.einsum("bhqd,bhkd->bhqk", q, k)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    keep = MASKS[mask](*at, s, t, tables)
    if bias:
        x = x + BIASES[bias][1](*at, s, t, tables[0])
    if keep is not None:
        x = torch.where(keep, x, -math.inf)
    none = (x == -math.inf).all(-1, keepdim=True).expand_as(x)
    if sinks is not None:
        x = torch.cat([x, sinks.view(1, -1, 1, 1).expand(b, h, s, 1)], -1)
        p = x.softmax(-1)[..., :-1]
    else:
        stand = {"zero": raw * 0, "nan": x, "mean": raw - raw.detach(), "fill": raw * 0}[empty]
        p = torch.where(none, stand, x).softmax(-1)
        p = torch.where(none, torch.zeros_like(p), p) if empty == "zero" else p
    return (p if weights is None else p * weights) @ v


def results(f, q, k, v, dout, tables, mask, bias, sinks=None, table=False, **options):
    """out, dq, dk, dv, then the gradients of t0 and of the sinks where they are wanted."""
    given = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    tables = list(tables)
    if table:
        tables[0] = tables[0].detach().clone().requires_grad_()
        given.append(tables[0])
    if sinks is not None:
        sinks = sinks.detach().clone().requires_grad_()
        given.append(sinks)
    out = f(*given[:3], tables, mask, bias, SCALE, sinks=sinks, **options)
    return [out, *torch.autograd.grad(out, given, dout)]


def sums_of_terms(q, k, v, dout, tables, mask, bias, sinks=None, table=False, **options):
    """Bounds on the sums of absolute terms, one for each result: what rounding errors go with."""
    h = q.shape[1]
    n, t = h // k.shape[1], k.shape[2]
    eye = torch.eye(t, dtype=q.dtype).expand(*k.shape[:2], t, t)
    p = exact(q, k, eye, tables, mask, bias, SCALE, sinks=sinks, **options)
    q, dout = q.abs(), dout.abs()
    k, v = (x.abs().repeat_interleave(n, 1) for x in (k, v))
    group = lambda x: x.unflatten(1, (-1, n)).sum(2)  # noqa: E731
    out = p @ v
    ds = p * (dout @ v.mT + (dout * out).sum(-1, keepdim=True))
    sums = [out, SCALE * ds @ k, group(SCALE * ds.mT @ q), group(p.mT @ dout)]
    total = ds.sum((0, 2, 3)).max()
    return [
        *sums,
        *([total.expand(tables[0].shape)] if table else []),
        *([total.expand(h)] if sinks is not None else []),
    ]


def compare(near, q, k, v, dout, tables, mask, bias, sinks=None, table=False, **options):
    double = lambda x: x.double() if x is not None and x.is_floating_point() else x  # noqa: E731
    given = (q, k, v, dout, tables, mask, bias, sinks, table)
    wide = (*map(double, given[:4]), [double(x) for x in tables], mask, bias, double(sinks), table)
    got = results(kernel.op, *given, **options)
    eager = results(kernel.reference, *given, **options)
    best = results(exact, *wide, **options)
    terms = sums_of_terms(*wide, **options)
    for one in zip(got, eager, best, terms, strict=True):
        if q.dtype == torch.float64:  # nothing is more exact
            torch.testing.assert_close(one[0], one[2])
        else:
            near(*one, q.dtype)
    assert got[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_every_bias(mask, bias, near):
    q, k, v, dout = tensors(2, 4, 2, 70, 70, 8, 8)
    compare(near, q, k, v, dout, tables_for(mask, bias, 2, 4, 70, 70), mask, bias)


SIZES = (1, 7, 63, 64, 65, 129)


def sample(seed, masks=tuple(MASKS), biases=tuple(BIASES)):
    """One point of the cross product of features."""
    r = random.Random(seed)
    h, g = r.choice([(4, 4), (4, 2), (6, 2), (3, 1)])
    d, e = r.choice([(8, 8), (16, 4), (4, 16), (1, 1), (24, 20)])
    bias = r.choice(biases)
    return {
        "sizes": (r.choice([1, 2]), h, g, r.choice(SIZES), r.choice(SIZES), d, e),
        "dtype": r.choice([*DTYPES, torch.float64]),
        "mask": r.choice(masks),
        "bias": bias,
        "softcap": r.choice([0.0, 0.0, 2.0]),
        "sinks": r.choice([False, False, True]),
        "table": bias != "" and "*" not in bias and r.choice([False, True]),
    }


def check_sample(near, sizes, dtype, mask, bias, softcap, sinks, table):
    b, h, _, s, t, *_ = sizes
    q, k, v, dout = tensors(*sizes, dtype=dtype)
    tables = tables_for(mask, bias, b, h, s, t, dtype)
    compare(
        near,
        q,
        k,
        v,
        dout,
        tables,
        mask,
        bias,
        torch.randn(h).to(dtype) if sinks else None,
        table,
        softcap=softcap,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_sample_of_all_features(seed, near):
    check_sample(near, **sample(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 1000))
def test_a_larger_sample_of_all_features(seed, near):
    check_sample(near, **sample(seed))


@thinned(
    2, bias=[b for b in BIASES if b and "*" not in b], softcap=[0.0, 1.5], dtype=[*DTYPES, torch.float64]
)
def test_gradients_of_tables(bias, softcap, dtype, near):
    q, k, v, dout = tensors(2, 4, 2, 40, 150, 8, 8, dtype)
    tables = tables_for("k <= q + 100", bias, 2, 4, 40, 150, dtype)
    compare(near, q, k, v, dout, tables, "k <= q + T - S", bias, table=True, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["t0[0, h, q, k]", "t0[h, k - q + S - 1]"])
def test_a_table_of_another_dtype(bias, dtype, near):
    q, k, v, dout = tensors(1, 2, 2, 300, 300, 8, 8, dtype)
    tables = tables_for("k <= q", bias, 1, 2, 300, 300)
    compare(near, q, k, v, dout, tables, "k <= q", bias, table=True)
    compare(near, q, k, v, dout, tables, "k <= q", bias)


@pytest.mark.parametrize(
    ("bias", "mask", "why"),
    [
        ("t0[h] * (k - q)", "", "added as it is, not in 't0\\[h\\] \\* \\(k - q\\)'"),
        ("t0[1]", "", "its index '1' is none of"),
        ("", "t0[h] < 0.5", "t0 is no part of the bias '', and has no gradient"),
    ],
)
def test_tables_without_a_gradient_say_so(bias, mask, why):
    q, k, v, _ = tensors(1, 2, 2, 5, 5, 4, 4)
    table = torch.randn(2, requires_grad=True)
    out = kernel.op(q, k, v, [table], mask, bias, SCALE)
    with pytest.raises(NotImplementedError, match=why):
        out.sum().backward()
    assert torch.equal(out, kernel.op(q, k, v, [table.detach()], mask, bias, SCALE))


@pytest.mark.parametrize("blocks", [False, True], ids=["small", "several tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sinks(softcap, dtype, blocks, near, monkeypatch):
    if blocks:
        monkeypatch.setattr(_attention_cpu, "ELEMENTS", 1000)
        monkeypatch.setattr(_attention_cpu, "WIDEN", 0)
    q, k, v, dout = tensors(2, 4, 2, 70, 50, 8, 8, dtype)
    sinks = torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=dtype)
    for mask in ("", "k <= q", "(k <= q) & t1[b, k]", "t1[b, k] & (q + h > 3)"):
        tables = tables_for(mask, "", 2, 4, 70, 50)
        compare(near, q, k, v, dout, tables, mask, "", sinks, softcap=softcap)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("bias", ["", "t0[b, 0, 0, k]", "t0[h, k - q + S - 1]"])
def test_small_tiles(bias, softcap, near, monkeypatch):
    """Tiles that split batches, key heads, queries: as large inputs make them."""
    monkeypatch.setattr(_attention_cpu, "ELEMENTS", 2000)
    q, k, v, dout = tensors(3, 6, 3, 50, 50, 8, 8)
    for mask in ("", "(k <= q) & (q - k < 20)", "(k <= q) & t1[b, k]", "t1[b, k] & (q + h > 3)"):
        tables = tables_for(mask, bias, 3, 6, 50, 50)
        compare(near, q, k, v, dout, tables, mask, bias, table=bool(bias), softcap=softcap)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
@pytest.mark.parametrize("mask", ["k <= q", "(k <= q) & (q - k < 20)", "(k <= q) & t1[b, k]"])
def test_any_scale(mask, scale, near, monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", scale)
    q, k, v, dout = tensors(1, 2, 1, 40, 40, 16, 16)
    compare(near, q, k, v, dout, tables_for(mask, "", 1, 2, 40, 40), mask, "")


def relaid(x, layout):
    """The same values, laid out as models lay them out."""
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "part of a wider tensor":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x[:1].expand_as(x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("s", "t"), [(300, 300), (300, 140), (140, 300), (257, 1)])
def test_causal_squares(s, t, dtype, near):
    q, k, v, dout = tensors(1, 4, 2, s, t, 16, 8, dtype)
    compare(near, q, k, v, dout, [], "k <= q", "", torch.randn(4).to(dtype))
    compare(near, q, k, v, dout, [], "k <= q", "")


LAYOUTS = ["heads last", "columns first", "part of a wider tensor", "one batch for all"]


@thinned(2, bias=["", "t0[q, k, b, h]", "t0[k, q]"], softcap=[0.0, 2.0], layout=LAYOUTS)
def test_strides(bias, softcap, layout, near):
    q, k, v, dout = (relaid(x, layout) for x in tensors(2, 2, 2, 20, 20, 16, 16))
    tables = tables_for("k <= q", bias, 2, 2, 20, 20)
    tables[0] = (
        relaid(tables[0], layout)
        if tables[0].ndim == 4
        else tables[0].mT.contiguous().mT
        if bias
        else tables[0]
    )
    compare(near, q, k, v, dout, tables, "(k <= q) & t1[b, k]", bias, softcap=softcap)
    compare(near, q, k, v, dout, tables, "", bias, softcap=softcap)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("empty", kernel.EMPTY)
@pytest.mark.parametrize(("b", "s", "t"), [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)])
def test_sizes_of_zero(b, s, t, empty, softcap):
    q, k, v, dout = tensors(b, 4, 2, s, t, 16, 8)
    tables = [torch.randn(4, 1, t), torch.ones(b, t, dtype=torch.bool)]
    out, *grads = results(
        kernel.op,
        q,
        k,
        v,
        dout,
        tables,
        "(k <= q) & t1[b, k]",
        "t0[h, 0, k]",
        None,
        True,
        softcap=softcap,
        empty=empty,
    )
    assert out.shape == (b, 4, s, 8)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
    assert not any(x.any() for x in (out, *grads))


@pytest.mark.parametrize("bias", ["", "t0[h, k - q + S - 1]"])
@pytest.mark.parametrize("mask", ["(k <= q) & (q - k < 20)", "(k <= q) & t1[b, k]"])
def test_the_default_device_does_not_matter(mask, bias):
    given = (
        *tensors(2, 4, 2, 40, 40, 8, 8),
        tables_for(mask, bias, 2, 4, 40, 40),
        mask,
        bias,
        torch.randn(4),
    )
    want = results(kernel.op, *given, bool(bias), softcap=3.0)
    _score_blocks._reach_of_text.cache_clear()
    _attention_cpu._repeated.cache_clear()
    with torch.device("meta"):
        got = results(kernel.op, *given, bool(bias), softcap=3.0)
        torch.manual_seed(0)
        results(kernel.op, *given, bool(bias), dropout=0.5)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_a_mask_kept_from_inference_serves_training(near):
    q, k, v, dout = tensors(1, 2, 2, 30, 30, 8, 8)
    _attention_cpu._repeated.cache_clear()
    with torch.inference_mode():
        kernel.op(q, k, v, [], "abs(q - k) <= 5", "", SCALE)
    compare(near, q, k, v, dout, [], "abs(q - k) <= 5", "")


# rows that keep no key


def plain_nan(q, k, v, hidden):
    return (
        q @ k.mT * SCALE + torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, -math.inf)
    ).softmax(-1) @ v


def plain_nan_fill(q, k, v, hidden):
    return (q @ k.mT * SCALE).masked_fill(hidden, -math.inf).softmax(-1) @ v


def plain_mean(q, k, v, hidden):
    return (q @ k.mT * SCALE + hidden.to(q.dtype) * torch.finfo(q.dtype).min).softmax(-1) @ v


def plain_fill(q, k, v, hidden):
    return (q @ k.mT * SCALE).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v


def plain_zero(q, k, v, hidden):
    return F.scaled_dot_product_attention(q, k, v, ~hidden, scale=SCALE)


PLAIN = {
    "zero": plain_zero, "nan": plain_nan, "nan_fill": plain_nan_fill, "mean": plain_mean, "fill": plain_fill,
}  # fmt: skip
SPARSE = {  # the text, and which scores it hides; s = 70, t = 50
    "t0[b, k]": lambda r, q, k: ~r[:, None, None, :],
    "(k <= q) & t0[b, k]": lambda r, q, k: ~(r[:, None, None, :] & (k <= q)),
    "k < q - 60": lambda r, q, k: (k >= q - 60) | torch.zeros(2, 4, 1, 1, dtype=torch.bool),
    "k <= q - 3": lambda r, q, k: (k + 3 > q) | torch.zeros(2, 4, 1, 1, dtype=torch.bool),
    "(q - k < 9) & (k <= q)": lambda r, q, k: (
        ((q - k >= 9) | (k > q)) | torch.zeros(2, 4, 1, 1, dtype=torch.bool)
    ),
    "k <= q": lambda r, q, k: (k > q) | torch.zeros(2, 4, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", SPARSE)
@pytest.mark.parametrize("empty", kernel.EMPTY)
def test_rows_that_keep_no_key(empty, mask, dtype):
    q, k, v, dout = tensors(2, 4, 2, 70, 50, 8, 6, dtype)
    keep = torch.rand(2, 50) > 0.5
    keep[0, :4], keep[1] = False, False
    hidden = SPARSE[mask](keep, torch.arange(70).view(1, 1, 70, 1), torch.arange(50))
    got = results(kernel.op, q, k, v, dout, [keep], mask, "", empty=empty)

    def plain(q, k, v, *args, **options):
        return PLAIN[empty](q, *(x.repeat_interleave(2, 1) for x in (k, v)), hidden)

    want = results(plain, *(x.double() for x in (q, k, v, dout)), [], "", "")
    eps = torch.finfo(dtype).eps
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, equal_nan=True, rtol=64 * eps, atol=64 * eps * 8)
    if mask == "t0[b, k]":
        assert bool(got[0].isnan().any()) == (empty in ("nan", "nan_fill"))
        assert bool(got[0][1].any()) == (empty != "zero")


def test_bands_that_leave_every_row_a_key_are_known():
    for s, t, low, high in itertools.product(range(1, 6), range(1, 6), range(-6, 7), range(-6, 7)):
        for mask in (f"(k >= q + {low}) & (k <= q + {high})", f"k >= q + {low}", f"k <= q + {high}"):
            every = _score.evaluate(mask, [], 1, 1, s, t).any(-1).all().item()
            assert _attention_rows.settled("nan", None, mask, "", s, t) == every, (mask, s, t)


@pytest.mark.parametrize("form", ["t0[0, h, q, k]", "t0[h, k - q + S - 1]", "t0[b, 0, 0, k]", "t0[q, b]"])
@pytest.mark.parametrize("empty", ["zero", "nan", "fill"])
def test_bias_gradients_beside_rows_that_keep_no_key(empty, form):
    q, k, v, dout = tensors(2, 4, 2, 40, 30, 8, 8)
    sizes = {"0": 1, "b": 2, "h": 4, "q": 40, "k": 30, "relative": 69}
    table = torch.randn([sizes[n] for n in _score.gradient_forms(form, 0)[0]])
    hidden = torch.zeros(2, 1, 40, 30, dtype=torch.bool)
    hidden[1, :, [0, 17, 39]] = True
    got = results(kernel.op, q, k, v, dout, [table, ~hidden], "t1[b, 0, q, k]", form, table=True, empty=empty)

    def plain(q, k, v, tables, *args, **options):
        b, h, q_, k_ = indices(2, 4, 40, 30)
        read = {"t0[0, h, q, k]": (0, h, q_, k_), "t0[h, k - q + S - 1]": (h, k_ - q_ + 39),
                "t0[b, 0, 0, k]": (b, 0, 0, k_), "t0[q, b]": (q_, b)}[form]  # fmt: skip
        s = q @ k.repeat_interleave(2, 1).mT * SCALE + tables[0][read]
        none = hidden.all(-1, keepdim=True)
        if empty == "nan":
            s = s + torch.zeros(hidden.shape, dtype=s.dtype).masked_fill(hidden, -math.inf)
        else:
            s = s.masked_fill(hidden, torch.finfo(s.dtype).min)
        p = s.softmax(-1)
        p = p.masked_fill(none, 0.0) if empty == "zero" else p
        return p @ v.repeat_interleave(2, 1)

    want = results(plain, *(x.double() for x in (q, k, v, dout)), [table.double()], "", "", table=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_with_sinks_a_row_that_keeps_no_key_is_zero():
    q, k, v, dout = tensors(1, 2, 2, 10, 10, 8, 8)
    for empty in kernel.EMPTY:
        got = results(kernel.op, q, k, v, dout, [], "k < q - 4", "", torch.randn(2), empty=empty)
        assert all(torch.isfinite(x).all() for x in got)
        assert not got[0][:, :, :5].any()
        assert not got[1][:, :, :5].any()


def test_a_bias_of_minus_infinity_empties_a_row_and_one_of_the_least_number_does_not(near):
    q, k, v, dout = tensors(2, 2, 2, 40, 40, 8, 8)
    for value in (-math.inf, torch.finfo(torch.float32).min):
        bias = torch.zeros(1, 2, 40, 40)
        bias[:, :, [0, 7, 39]] = value
        out, dq, *_ = results(kernel.op, q, k, v, dout, [bias], "", "t0[0, h, q, k]")
        mean = v.mean(2, keepdim=True).expand(-1, -1, 3, -1)
        want = torch.zeros_like(mean) if value == -math.inf else mean
        torch.testing.assert_close(out[:, :, [0, 7, 39]], want)
        assert bool(dq[:, :, [0, 7, 39]].any()) == (value != -math.inf)


# dropout


def dropped(call, seed, v, **options):
    torch.manual_seed(seed)
    return call(v)


def weights_of(q, k, dropout, mask="", **options):
    """The weights after dropout: out for the identity as v."""
    b, g, t, _ = k.shape
    eye = torch.eye(t, dtype=q.dtype).expand(b, g, t, t)
    return kernel.op(q, k, eye, [], mask, "", SCALE, dropout=dropout, **options)


@pytest.mark.parametrize("elements", [1 << 20, 1 << 13], ids=["few tiles", "many"])
def test_dropout_keeps_its_share_and_scales_it(elements, monkeypatch):
    monkeypatch.setattr(_attention_cpu, "ELEMENTS", elements)
    q, k, _, _ = tensors(4, 4, 2, 100, 128, 8, 8)
    p, full = weights_of(q, k, 0.3), weights_of(q, k, 0.0)
    kept = p != 0
    torch.testing.assert_close(p[kept], full[kept] / 0.7)
    n = p.numel()
    assert abs(kept.sum().item() - 0.7 * n) < 5 * math.sqrt(n * 0.21)
    spread = 5 * math.sqrt(0.21)
    for over in ((0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):  # no key, query, head or batch is special
        share = kept.double().mean(over)
        assert ((share - 0.7).abs() < spread / math.sqrt(n / share.numel())).all()
    pairs = (kept[..., 1:] == kept[..., :-1]).double().mean().item()
    assert abs(pairs - 0.58) < 0.01  # 0.7 ** 2 + 0.3 ** 2, of neighbours that know nothing of each other
    for one, other in (
        (kept[:, 1:], kept[:, :-1]),
        (kept[1:], kept[:-1]),
        (kept[:, :, 16:], kept[:, :, :-16]),
        (kept[:, 2:], kept[:, :-2]),
    ):
        assert abs((one == other).double().mean().item() - 0.58) < 0.01


def test_the_seed_reproduces_dropout_and_a_call_draws_anew():
    q, k, v, _ = tensors(2, 4, 2, 70, 50, 8, 8)
    call = lambda: kernel.op(q, k, v, [], "k <= q", "", SCALE, dropout=0.5)  # noqa: E731
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert torch.equal(call(), second)
    assert not torch.equal(first, second)
    q.requires_grad_()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    before = torch.random.get_rng_state()
    kernel.op(q, k, v, [], "k <= q", "", SCALE)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("blocks", [False, True], ids=["one tile", "several"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", ["", "(k <= q) & (q - k < 20)", "t1[b, k]"])
def test_backward_drops_what_forward_dropped(mask, sinks, blocks, near, monkeypatch):
    if blocks:
        monkeypatch.setattr(_attention_cpu, "ELEMENTS", 2000)
    q, k, v, dout = tensors(2, 4, 2, 70, 50, 8, 8)
    bias = "t0[h, k - q + S - 1]"
    tables = tables_for(mask, bias, 2, 4, 70, 50)
    sinks = torch.randn(4) if sinks else None
    torch.manual_seed(5)
    eye = torch.eye(50).expand(2, 2, 50, 50)
    kept = kernel.op(q, k, eye, tables, mask, bias, SCALE, 0.0, sinks, 0.4) != 0
    torch.manual_seed(5)
    got = results(kernel.op, q, k, v, dout, tables, mask, bias, sinks, True, dropout=0.4)
    weights = kept.double() / 0.6
    wide = [x.double() for x in (q, k, v, dout)]
    tables[0], sinks = tables[0].double(), None if sinks is None else sinks.double()
    want = results(exact, *wide, tables, mask, bias, sinks, True, weights=weights)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-5)


# memory


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


LINEAR = {
    "causal": ("k <= q", "", {}),
    "bottom right": ("k <= q + T - S", "", {}),
    "window": ("(k <= q) & (q - k < 64)", "", {}),
    "chunks": ("q // 64 == k // 64", "", {}),
    "padding": ("(k <= q) & t1[b, k]", "", {}),
    "documents": ("(k <= q) & (t2[b, q % T] == t2[b, k])", "", {}),
    "relative": ("k <= q", "t0[h, k - q + S - 1]", {}),
    "softcap": ("k <= q", "", {"softcap": 5.0}),
    "dropout": ("k <= q", "", {"dropout": 0.1}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_the_largest_tensor_grows_with_the_length(name, monkeypatch):
    mask, bias, options = LINEAR[name]
    monkeypatch.setattr(_attention_cpu, "ELEMENTS", 1 << 12)
    largest = []
    for n in (512, 1024, 2048):
        q, k, v, dout = tensors(1, 2, 1, n, n, 4, 4)
        tables = [torch.randn(2, 2 * n - 1), torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None] // 100]
        with Largest() as mode:
            given = [x.requires_grad_() for x in (q, k, v)]
            # below the operator, whose own kernels a mode does not see
            seed = torch.ones(1, dtype=torch.int64)
            rest = (SCALE, options.get("softcap", 0.0), None, options.get("dropout", 0.0), seed)
            given = [x.detach() for x in given]
            out, lse = _attention_cpu.launch_forward(*given, tables, mask, bias, *rest)
            wanted = [bool(bias), False, False, False]
            _attention_cpu.launch_backward(dout, *given, tables, mask, bias, out, lse, *rest, wanted)
        largest.append(mode.bytes)
    assert largest[-1] <= 2.1 * largest[-2]
    assert largest[-1] < 2048 * 2048, "bytes: a quarter of the scores of one head"


# registration


def test_gradcheck():
    q, k, v, _ = (x.requires_grad_() for x in tensors(1, 2, 1, 3, 4, 4, 3, dtype=torch.float64))
    table = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    call = lambda q, k, v, t, s: kernel.op(q, k, v, [t], "k <= q", "t0[h, k - q + S - 1]", SCALE, 2.0, s)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, table, sinks))


def test_gradients_only_where_they_are_wanted():
    q, k, v, _ = tensors(1, 2, 2, 5, 5, 4, 4)
    used, other = torch.randn(2, requires_grad=True), torch.randn(2)
    sinks = torch.randn(2, requires_grad=True)
    kernel.op(q, k, v, [other, used], "", "t0[h] + t1[h]", SCALE, sinks=sinks).sum().backward()
    assert used.grad.shape == sinks.grad.shape == (2,)
    assert other.grad is q.grad is None
    out = kernel.op(
        q.requires_grad_(), k, v, [other, used.detach()], "", "t0[h] + t1[h]", SCALE, sinks=sinks.detach()
    )
    out.sum().backward()
    assert q.grad is not None


def test_second_derivative_raises():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    grad = torch.autograd.grad(kernel.op(q, q, q, [], "k <= q", "", 0.5).sum(), q, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()
    table = torch.randn(3, requires_grad=True)
    out = kernel.op(q.detach(), q.detach(), q.detach(), [table], "", "t0[k]", 0.5)
    grad = torch.autograd.grad(out.square().sum(), table, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("mask", "bias", "options"),
    [
        ("", "", {}),
        ("k <= q", "", {"sinks": True}),
        ("(k <= q) & t1[b, k]", "t0[h, k - q + S - 1]", {"softcap": 2.0, "sinks": True}),
        ("t1[b, k]", "t0[0, h, q, k]", {"empty": "fill"}),
        ("k < q - 2", "", {"empty": "mean"}),
    ],
)
@pytest.mark.parametrize("width", [(8, 8), (8, 4)])
def test_opcheck(width, mask, bias, options):
    q, k, v, _ = tensors(2, 4, 2, 5, 7, *width)
    tables = tables_for(mask, bias, 2, 4, 5, 7)[: 2 if mask or bias else 0]
    sinks = torch.randn(4) if options.pop("sinks", False) else None
    torch.library.opcheck(kernel.op, (q, k, v, tables, mask, bias, SCALE), {"sinks": sinks, **options})
    for x in (q, k, v, *([tables[0]] if bias else []), *([] if sinks is None else [sinks])):
        x.requires_grad_()
    torch.library.opcheck(kernel.op, (q, k, v, tables, mask, bias, SCALE), {"sinks": sinks, **options})


def test_operators_that_draw_say_so():
    tag = torch.Tag.nondeterministic_seeded
    assert [tag in x.tags for x in (kernel.op, kernel.save_op, kernel.backward_op)] == [True, True, False]


def test_opcheck_with_dropout():
    q, k, v, _ = tensors(2, 4, 2, 5, 7, 8, 8)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(kernel.op, (q, k, v, [], "k <= q", "", SCALE), {"dropout": 0.5}, test_utils=utils)
    q.requires_grad_()
    torch.library.opcheck(kernel.op, (q, k, v, [], "k <= q", "", SCALE), {"dropout": 0.5}, test_utils=utils)


def test_same_as_sdpa():
    q, k, v, _ = tensors(2, 4, 2, 16, 16, 8, 8)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    assert torch.equal(kernel.op(q, k, v, [], "k <= q", "", SCALE), theirs)


@pytest.mark.parametrize("mask", ["", "k <= q", "t0[b, 0, 0, k]", "t1[b, h, q, k]"])
@pytest.mark.parametrize("sizes", [(4, 2), (6, 2), (3, 3)])
def test_one_query_of_several_heads_to_a_key(mask, sizes):
    """Keys are not copied to heads, whose masks may differ."""
    heads, groups = sizes
    q, k, v, _ = tensors(2, heads, groups, 1, 20, 8, 6)
    masks = [torch.rand(2, h, 1, 20) > 0.5 for h in (1, heads)]
    tables = [t.index_fill(-1, torch.tensor(3), True) for t in masks]
    given = q, k, v, tables, mask, "", SCALE
    small = kernel.shared.made(q, k, tables, mask, "") if mask[:1] == "t" else None
    got = kernel.direct(*given, shared=small)
    torch.testing.assert_close(got, kernel.reference(*given))
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mask", ["", "k <= q", "abs(q - k) <= 5"])
def test_direct_is_the_operator(mask):
    q, k, v, _ = tensors(2, 4, 2, 16, 20, 8, 8)
    torch.testing.assert_close(
        kernel.direct(q, k, v, [], mask, "", SCALE), kernel.op(q, k, v, [], mask, "", SCALE)
    )
    sinks = torch.randn(4)
    got = kernel.direct(q, k, v, [], mask, "", SCALE, 2.0, sinks)
    assert torch.equal(got, kernel.op(q, k, v, [], mask, "", SCALE, 2.0, sinks))
    got = kernel.direct(q, k, v, [], mask, "", -SCALE, empty="nan")
    assert torch.equal(got, kernel.op(q, k, v, [], mask, "", -SCALE))


def test_autocast_lowers_all_but_the_tables():
    q, k, v, _ = tensors(1, 2, 2, 8, 8, 8, 8)
    bias, sinks = torch.full((8, 8), 1 + 2**-12), torch.randn(2)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel.op(q, k, v, [bias], "", "t0[q, k]", SCALE, sinks=sinks)
        low = [x.bfloat16() for x in (q, k, v, sinks)]
        assert torch.equal(got, kernel.op(*low[:3], [bias], "", "t0[q, k]", SCALE, sinks=low[3]))
        assert kernel.op(q, k, v, [bias > 0], "t0[q, k]", "", SCALE).dtype == torch.bfloat16
        assert kernel.op(*(x.double() for x in (q, k, v)), [], "", "", 1.0).dtype == torch.float64
        q, bias = q.requires_grad_(), bias.requires_grad_()
        kernel.op(q, k, v, [bias], "", "t0[q, k]", SCALE).float().sum().backward()
    assert q.grad.dtype == bias.grad.dtype == torch.float32


def test_flops():
    q, k, v, dout = tensors(2, 4, 2, 16, 32, 8, 24)
    q.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = kernel.op(q, k, v, [], "", "", SCALE)
    assert forward.get_total_flops() == 2 * 2 * 4 * 16 * 32 * (8 + 24)
    with FlopCounterMode(display=False) as backward:
        out.backward(dout)
    assert backward.get_total_flops() == 2 * 2 * 4 * 16 * 32 * (3 * 8 + 2 * 24)


def test_compiled():
    q, k, v, _ = (x.requires_grad_() for x in tensors(2, 4, 2, 16, 16, 8, 8))
    bias, sinks = (torch.randn(n, requires_grad=True) for n in ((4, 31), (4,)))
    text = "t0[h, k - q + S - 1]"

    def f(q, k, v, bias, sinks):
        out = kernel.op(q * 2, k, v, [bias], "k <= q", text, SCALE, 3.0, sinks)
        return out.transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    given = (q, k, v, bias, sinks)
    torch.testing.assert_close(compiled(*given), f(*given))
    for a, b in zip(*(torch.autograd.grad(g(*given).sum(), given) for g in (compiled, f)), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_dropout_draws_from_the_generator():
    q, k, v, _ = tensors(2, 4, 2, 16, 16, 8, 8)
    f = lambda q: kernel.op(q, k, v, [], "", "", SCALE, dropout=0.5)  # noqa: E731
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.manual_seed(7)
    first = compiled(q)
    assert not torch.equal(compiled(q), first)
    torch.manual_seed(7)
    assert torch.equal(f(q), first)


def test_exported_whole_with_symbolic_sizes():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, keep):
            assert not list(kernel.unsupported(q, k, v, [keep], "(k <= q) & t0[b, k]", "", 0.5))
            return kernel.op(q, k, v, [keep], "(k <= q) & t0[b, k]", "", 0.5)

    q, k, v, _ = tensors(2, 4, 2, 16, 16, 8, 8)
    auto = torch.export.Dim.AUTO
    dims = {name: {0: auto, 2: auto} for name in "qkv"} | {"keep": {0: auto, 1: auto}}
    keep = torch.rand(2, 16) > 0.3
    program = torch.export.export(Model(), (q, k, v, keep), dynamic_shapes=dims)
    assert kernel.op in [n.target for n in program.graph.nodes]
    q, k, v, _ = tensors(3, 4, 2, 9, 9, 8, 8)
    keep = torch.rand(3, 9) > 0.3
    tables = [torch.zeros(1), keep]
    torch.testing.assert_close(
        program.module()(q, k, v, keep), exact(q, k, v, tables, "(k <= q) & t1[b, k]", "", 0.5)
    )


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


Q, K = meta(2, 4, 5, 8), meta(2, 2, 7, 8)
KEEP = meta(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("args", "options", "why"),
    [
        ((meta(2, 4, 5, 8, dtype=torch.int32),) * 3, {}, "dtype torch.int32 is not one of"),
        ((Q, K.half(), K), {}, "dtypes differ: q is torch.float32, k torch.float16, v torch.float32"),
        ((Q[0], K, K), {}, "q, k, v have 3, 4, 4 dimensions"),
        ((Q, meta(2, 2, 7, 4), K), {}, ": D differs"),
        ((Q, K, meta(3, 2, 7, 8)), {}, "B, heads or T differ"),
        ((Q, meta(3, 2, 7, 8), meta(3, 2, 7, 8)), {}, ": B differs"),
        ((Q, K, meta(2, 2, 6, 8)), {}, "B, heads or T differ"),
        ((meta(2, 3, 5, 8), K, K), {}, "3 query heads are not a multiple of 2 key heads"),
        ((meta(2, 4, 5, 264), meta(2, 2, 7, 264), K), {}, "D = 264 is not within 1 .. 256"),
        ((Q, K, meta(2, 2, 7, 0)), {}, "E = 0 is not within 1 .. 256"),
        ((Q, K, K, [KEEP] * 5), {}, "it reads 5 tables; the kernel takes up to 4"),
        ((Q, K, K, [meta(2, 7, dtype=torch.complex64)], "", "t0[b, k]"), {}, "t0 is torch.complex64"),
        ((Q, K, K, [torch.ones(2, 7)], "", "t0[b, k]"), {}, "t0 is on cpu, q on meta"),
        ((Q, K, K, [], "k <= x"), {}, "the mask: 'x' is not part of the language"),
        ((Q, K, K, [], "k <="), {}, "the mask: 'k <=' is no expression"),
        ((Q, K, K, [], "k - q"), {}, "the mask, 'k - q', is a int"),
        ((Q, K, K, [], "", "k <= q"), {}, "the bias, 'k <= q', is a bool"),
        ((Q, K, K, [KEEP], "t1[b, k]"), {}, "the mask reads t1, and there are 1 tables"),
        ((Q, K, K, [KEEP] * 4, "r4[b, k]"), {}, "the mask reads r4, and there are 4 tables"),
        ((Q, K, K, [KEEP], "t0[b]"), {}, "the mask reads t0 by 1 indices; it has 2 dimensions"),
        ((Q, K, K, [KEEP], "t0[b, q]"), {}, ""),
        ((Q, K, K, [KEEP[:, :5]], "t0[b, k]"), {}, "t0 has 5 entries in dimension 1, which k reads up to 7"),
        ((Q, K, K), {"sinks": meta(5)}, "the sinks are [5]; the kernel takes one for each of 4 query heads"),
        ((Q, K, K), {"sinks": meta(4, dtype=torch.int64)}, "the sinks are torch.int64"),
        ((Q, K, K), {"dropout": 1.0}, "it drops weights with probability 1.0"),
        ((Q, K, K), {"empty": "one"}, "empty is 'one', none of zero, nan, nan_fill, mean, fill"),
    ],
)
def test_unsupported(args, options, why):
    found = list(kernel.unsupported(*args, **options))
    assert any(why in sentence for sentence in found) if why else not found


def test_supported():
    read = "t0[h, 0, k]"
    assert list(kernel.unsupported(Q, K, K, [meta(4, 1, 7)], "", read)) == []
    assert list(kernel.unsupported(Q, K, meta(2, 2, 7, 256), [KEEP], "t0[b, k]")) == []
    table = meta(4).requires_grad_()
    for empty, sinks in itertools.product(kernel.EMPTY, (meta(4), None)):
        options = {"softcap": 30.0, "sinks": sinks, "dropout": 0.5, "empty": empty}
        assert list(kernel.unsupported(Q, K, K, [table], "k <= q", "t0[h]", 0.5, **options)) == []


def test_sizes_that_are_symbols_are_not_decided():
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    env = ShapeEnv()
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 3 + [DimDynamic.STATIC])
    real = torch.empty(Q.shape), torch.empty(K.shape)
    with FakeTensorMode(shape_env=env) as mode:
        q, k = (mode.from_tensor(x, symbolic_context=dynamic) for x in real)
        found = list(kernel.unsupported(q, k, k, [], "k <= q + T - S", ""))
        assert len(found) == 1
        assert "query heads are not known to be a multiple of" in found[0]
        same = list(kernel.unsupported(q, q, q, [], "k <= q + T - S", ""))
        assert same == []
        one = q.shape[3] * 1
        assert kernel.known(one) == 8
        assert kernel.known(q.shape[2]) is None
        assert kernel.known(q.shape[2] - q.shape[2] + 3) == 3
    assert not env.guards


def test_every_combination_of_sizes_with_one_query_or_one_key(near):
    for (s, t), mask in itertools.product(((1, 1), (1, 9), (9, 1)), MASKS):
        q, k, v, dout = tensors(1, 2, 1, s, t, 4, 4)
        compare(near, q, k, v, dout, tables_for(mask, "", 1, 2, s, t), mask, "")


@pytest.mark.parametrize(
    ("mask", "bias", "options"),
    [
        ("k <= q", "", {}),
        ("(k <= q) & t1[b, k]", "t0[h, k - q + S - 1]", {"softcap": 2.0, "sinks": True}),
        ("(k <= q) & t1[b, k]", "", {"empty": "mean"}),
        ("t1[b, k]", "t0[b, 0, 0, k]", {"empty": "fill"}),
        ("k <= q + T - S", "", {"empty": "zero"}),
    ],
)
def test_the_operator_over_the_triton_kernels(mask, bias, options, near, interpreter, monkeypatch):
    """What a GPU runs, interpreted: the same registration, settling of rows and gradients around it."""
    monkeypatch.setattr(kernel, "_kernels", lambda q: _flash)
    q, k, v, dout = tensors(2, 4, 2, 20, 17, 8, 8)
    tables = tables_for(mask, bias, 2, 4, 20, 17)
    tables[1][1] = bool(bias)
    sinks = torch.randn(4) if options.pop("sinks", False) else None
    compare(near, q, k, v, dout, tables, mask, bias, sinks, bool(bias), **options)
    torch.manual_seed(0)
    one = kernel.op(q, k, v, [], "", "", SCALE, dropout=0.5)
    torch.manual_seed(0)
    assert torch.equal(kernel.op(q.requires_grad_(), k, v, [], "", "", SCALE, dropout=0.5), one)
