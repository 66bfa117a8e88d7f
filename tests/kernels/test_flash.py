"""Attention's Triton kernels against fp64: every feature, its gradients, and samples of features together."""

import random
from dataclasses import replace

import pytest
import torch
from flash_reference import Case, compare, kept, launched, weights

from fxaccel.kernels import _flash, _flash_backward, _flash_blocks, _flash_forward
from fxaccel.kernels._flash_blocks import Config

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def mostly_slow(cases, *quick):
    """A grid of which only some cases run by default: the interpreter takes about a second for each."""
    return [pytest.param(c, marks=[] if i in quick else pytest.mark.slow) for i, c in enumerate(cases)]


def case(b, h, g, s, t, d=16, e=16, dtype=torch.float32, device="cpu", **features):
    torch.manual_seed(s * 7 + t)
    made = [torch.randn(n) for n in ((b, h, s, d), (b, g, t, d), (b, g, t, e), (b, h, s, e))]
    features = {n: on(device, x) for n, x in features.items()}
    return Case(*(x.to(dtype).to(device) for x in made), **features)


def on(device, x):
    if isinstance(x, list):
        return [on(device, y) for y in x]
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.fixture
def small(monkeypatch):
    """Many blocks of few rows, so that short sequences have edges and insides."""
    square = Config(16, 16, 4, 1)
    blocks = {"forward": Config(32, 16, 4, 1), "keys": Config(16, 32, 4, 1), "relative": square}
    monkeypatch.setattr(_flash_blocks, "default", lambda kernel, *_: blocks.get(kernel, square))


@pytest.fixture(autouse=True)
def _untuned(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


SIZES = [(1, 1), (7, 7), (129, 129), (64, 128), (130, 70), (1, 40), (40, 1)]


@pytest.mark.parametrize("mask", ["", "k <= q"], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", mostly_slow(SIZES, 0, 4), ids=str)
def test_sizes(sizes, mask, device, near):
    for dtype in DTYPES:
        compare(near, case(2, 1, 1, *sizes, dtype=dtype, device=device, mask=mask))


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, 2), ids=str)
@pytest.mark.parametrize(
    "width", mostly_slow([(1, 1), (24, 24), (48, 20), (20, 48), (80, 80), (256, 256)], 2, 5)
)
def test_head_sizes(width, dtype, device, near):
    compare(near, case(1, 2, 2, 40, 50, *width, dtype, device, mask="k <= q"))


@pytest.mark.parametrize("mask", mostly_slow(["", "k <= q", "t0[b, h, k]"], 2))
@pytest.mark.parametrize("heads", mostly_slow([(4, 2), (6, 2), (3, 1)], 0))
def test_grouped_heads(heads, mask, small, device, near):
    h, g = heads
    tables = [torch.rand(2, h, 40) > 0.5] if "t0" in mask else []
    compare(near, case(2, h, g, 40, 40, device=device, mask=mask, tables=tables))


BANDS = [
    "k <= q", "k < q", "k <= q + T - S", "(k <= q) & (q - k < 20)", "(k <= q) & (q - k < 1)",
    "abs(q - k) <= 5", "k >= q", "k >= q + 30", "k <= q - 30", "(k >= q + 7) & (k <= q + 40)",
    "(k > q) & (k < q)",
    "k <= q + 1000", "(q - k < 64) & (k - q < 16)", "k == q",
]  # fmt: skip


@pytest.mark.parametrize("sizes", mostly_slow([(65, 65), (40, 129), (129, 40)], 0), ids=str)
@pytest.mark.parametrize("mask", mostly_slow(BANDS, 0, 3, 6, 8))
def test_bands(mask, sizes, small, device, near):
    compare(near, case(1, 1, 1, *sizes, device=device, mask=mask))


def tables_for(text, b=2, h=2, s=65, t=70):
    """A table for each mask or bias below that reads one."""
    torch.manual_seed(1)
    shapes = {
        "t0[b, k]": (b, t), "t0[b, q]": (b, s), "t0[b, k] > 0.5": (b, t), "t0[q, k]": (s, t),
        "t0[b, 0, q, k]": (b, 1, s, t), "t0[h, q]": (h, s), "t0[k // 4]": (t,),
        "t0[k - q + S - 1, h]": (s + t - 1, h),
        "t0[min(q, k)]": (max(s, t),), "t0[h]": (h,),
    }  # fmt: skip
    found = max((x for x in shapes if x in text), key=len, default=None)
    if found is None:
        return []
    if "==" in text:
        return [(torch.arange(shapes[found][1]) // 17).expand(shapes[found]).to(torch.int32)]
    made = torch.rand(shapes[found])
    return [made if ">" in text else made > 0.4]


MASKS = [
    "(k <= q) & t0[b, k]", "t0[b, q] & (k <= q)", "t0[b, k] > 0.5", "t0[q, k]", "t0[b, 0, q, k] & (k <= q)",
    "t0[h, q]", "t0[k // 4]", "t0[k - q + S - 1, h]", "t0[min(q, k)]", "t0[h]", "t0[b, q] == t0[b, k]",
    "(k <= q) & (t0[b, q] == t0[b, k])", "q // 16 == k // 16", "q // 16 != k // 16", "(k <= q) | (k < 7)",
    "(q - k) // 16 == 0", "(k - q) % 3 == 0", "(k - q) % -3 == 0", "~(k < q) | (k * 2 > 90)", "h == 1",
    "b < 1", "max(q, k) < 50", "abs(q - k * 2) < 20", "where(k < 20, q > 30, q <= 30)",
    "min(q - 20, 5) <= k - 30",
    "-k + 40 > q", "q * k < 500", "(q % 16 < 8) & (k <= q)", "q + 0 * k > S // 2", "(q < 32) == (k < 32)",
    "k < T - 6 + 0 * h",
]  # fmt: skip


@pytest.mark.parametrize("mask", mostly_slow(MASKS, 0, 6, 11, 12))
def test_masks(mask, small, device, near):
    compare(near, case(2, 2, 1, 65, 70, device=device, mask=mask, tables=tables_for(mask)))


FORMS = {
    "t0[b, h, q, k]": (2, 2, 40, 35), "t0[0, h, q, k]": (1, 2, 40, 35), "t0[b, 0, q, k]": (2, 1, 40, 35),
    "t0[q, k]": (40, 35), "t0[b, k]": (2, 35), "t0[h, k]": (2, 35), "t0[b, q]": (2, 40), "t0[0]": (1,),
    "t0[h]": (2,), "t0[k, h, q]": (35, 2, 40), "t0[h, k - q + S - 1]": (2, 74), "t0[S - 1 + k - q]": (74,),
    "t0[b, k - q + S - 1, h, 0]": (2, 74, 2, 1), "t0[k]": (50,), "t0[h, q] + t0[h, k]": (2, 40),
}  # fmt: skip


@pytest.mark.parametrize(
    "mask", mostly_slow(["k <= q", "", "(k <= q) & (q - k < 9)", "q // 16 == k // 16"], 0)
)
@pytest.mark.parametrize("bias", mostly_slow(FORMS, 1, 5, 10, 13, 14))
def test_bias_and_its_gradient(bias, mask, small, device, near):
    table = torch.randn(FORMS[bias])
    features = {"bias": bias, "tables": [table], "wanted": (True, False)}
    compare(near, case(2, 2, 1, 40, 35, device=device, mask=mask, **features))


@pytest.mark.parametrize(
    "bias",
    mostly_slow(
        ["t0[h] * (k - q)", "-t0[h] * abs(q - k)", "float(k) * 0.01", "where(k < 9, 0.0, t1[q, k])"], 0, 3
    ),
)
def test_bias_of_any_expression(bias, small, device, near):
    tables = [torch.randn(2), torch.randn(40, 35)]
    compare(near, case(2, 2, 1, 40, 35, device=device, bias=bias, tables=tables))


def test_two_tables_and_a_mask(small, device, near):
    tables = [torch.randn(2, 40), torch.rand(2, 35) > 0.3, torch.randn(2, 35)]
    features = {"bias": "t0[h, q] + t2[b, k]", "mask": "t1[b, k]", "tables": tables}
    compare(near, case(2, 2, 1, 40, 35, device=device, wanted=(True, False, True, False), **features))


@pytest.mark.parametrize("dtype", mostly_slow([torch.float16, torch.bfloat16], 1), ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_bias_dtypes(table, dtype, device, near):
    features = {"bias": "t0[q, k]", "tables": [torch.randn(33, 33).to(table)], "wanted": (True, False)}
    made = case(1, 2, 2, 33, 33, dtype=dtype, device=device, **features)
    if table == torch.float32:
        *others, dbias = launched(made)
        assert dbias.dtype == torch.float32
        made = replace(made, wanted=())
        compare(near, made, others)
    else:
        compare(near, made)


@pytest.mark.parametrize("mask", ["", "k <= q"], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, 0), ids=str)
def test_a_row_of_the_least_number_is_the_mean(dtype, mask, device, near):
    bias = torch.zeros(40, 40)
    bias[5] = torch.finfo(torch.float32).min
    made = case(1, 1, 1, 40, 40, dtype=dtype, device=device, mask=mask, bias="t0[q, k]", tables=[bias])
    out = launched(made)[0]
    exact = made.v.double()[0, 0, : 6 if mask else 40].mean(0)
    near(out[0, 0, 5], exact.to(dtype), exact)


ROWS = [0, 7, 39]


@pytest.mark.parametrize("cause", ["table", "bias", "band", "sink"])
def test_a_row_that_keeps_no_key_is_zero(cause, small, device, near):
    shut = torch.zeros(40, 40, dtype=torch.bool)
    shut[ROWS] = True
    features = {"mask": "t0[q, k]", "tables": [~shut]}
    if cause == "bias":
        features = {"bias": "t0[q, k]", "tables": [torch.zeros(40, 40).masked_fill(shut, -torch.inf)]}
        features["wanted"] = (True, False)
    if cause == "band":
        features = {"mask": "k >= q + 35"}
    if cause == "sink":
        features |= {"sinks": torch.tensor([-torch.inf, 1.0]), "wanted": (False, True)}
    made = case(1, 2, 2, 40, 40, device=device, **features)
    rows = range(5, 40) if cause == "band" else ROWS
    compare(near, made)
    out, dq, *others = launched(made)
    assert not out[:, :, rows].any()
    assert not dq[:, :, rows].any()
    if cause == "bias":
        assert not others[-1][rows].any()
    lse = _flash.launch_forward(*made.inputs, *made.rest, save=True)[1]
    empty = torch.isinf(lse)
    assert empty[0, 0, rows].all()
    assert (lse[empty] > 0).all()
    if cause == "sink":
        assert not empty[0, 1].any()


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, 0), ids=str)
@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap, dtype, small, device, near):
    made = case(1, 2, 1, 40, 50, dtype=dtype, device=device, softcap=softcap, mask="k <= q")
    compare(near, made)
    compare(near, replace(made, scale=5.0))


def test_softcap_comes_before_the_bias(small, device, near):
    features = {"bias": "t0[h, k - q + S - 1]", "tables": [torch.randn(2, 79) * 3], "wanted": (True, False)}
    compare(near, case(1, 2, 1, 40, 40, device=device, softcap=1.0, **features))


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, 0), ids=str)
@pytest.mark.parametrize("mask", mostly_slow(["k <= q - 3", "", "q // 16 == k // 16"], 0))
def test_sinks(mask, dtype, small, device, near):
    sinks = torch.tensor([0.5, -2.0, 8.0, -torch.inf]).to(dtype)
    compare(near, case(2, 4, 2, 40, 40, dtype=dtype, device=device, mask=mask, sinks=sinks, wanted=(True,)))


SEED = torch.tensor([2**40 + 12345])


@pytest.mark.parametrize("dtype", mostly_slow(DTYPES, 2), ids=str)
@pytest.mark.parametrize("mask", mostly_slow(["(k <= q) & t0[b, k]", ""], 0))
def test_dropout(mask, dtype, small, device, near):
    tables = [torch.rand(2, 50) > 0.3] if mask else []
    features = {"mask": mask, "tables": tables, "dropout": 0.3, "seed": SEED}
    compare(near, case(2, 2, 1, 40, 50, dtype=dtype, device=device, **features))


def test_dropout_with_everything(small, device, near):
    tables = [torch.arange(40).expand(2, 40) // 11, torch.randn(2, 2, 40, 40), torch.randn(2, 79)]
    compare(near, case(
        2, 2, 1, 40, 40, device=device, mask="(k <= q) & (t0[b, q] == t0[b, k])", tables=tables,
        bias="t1[b, h, q, k] + t2[h, k - q + S - 1]", softcap=3.0, sinks=torch.randn(2), dropout=0.2,
        seed=SEED, wanted=(False, True, True, True),
    ))  # fmt: skip


def test_dropout_keeps_its_share_of_each_row_and_column(device):
    made = case(2, 2, 2, 64, 64, device=device, dropout=0.25, seed=SEED)
    keep = kept(made).double()
    assert abs(keep.mean() - 0.75) < 4 * (0.1875 / keep.numel()) ** 0.5
    for dim in (0, 1, 2, 3):  # no index is without effect, and neighbours are independent
        assert not torch.equal(keep, keep.roll(1, dim))
        together = ((keep - 0.75) * (keep.roll(1, dim) - 0.75)).mean()
        assert abs(together) < 5 * 0.1875 / keep.numel() ** 0.5


def test_dropout_follows_its_seed_and_no_block_size(small, device, monkeypatch):
    made = case(1, 2, 2, 40, 40, device=device, dropout=0.5, seed=SEED)
    keep = kept(made)
    assert not torch.equal(keep, kept(replace(made, seed=made.seed + 1)))
    assert not torch.equal(keep, kept(replace(made, seed=made.seed + 2**32)))
    monkeypatch.setattr(_flash_blocks, "default", lambda *_: Config(64, 32, 4, 1))
    assert torch.equal(keep, kept(made))


@pytest.mark.parametrize("dropout", [1.0, 0.0])
def test_dropout_of_all_or_nothing(dropout, device):
    made = case(1, 2, 2, 20, 20, device=device, dropout=dropout, seed=SEED)
    plain = launched(replace(made, dropout=0.0, seed=None))
    for got, without in zip(launched(made), plain, strict=True):
        assert torch.equal(got, torch.zeros_like(got) if dropout else without)


def relaid(x, layout):
    if layout == "heads last":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns first":
        return x.mT.contiguous().mT
    if layout == "part of a wider tensor":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x[:1].expand_as(x)


LAYOUTS = ["heads last", "columns first", "part of a wider tensor", "one batch for all"]


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, 3))
def test_strides(layout, device, near):
    made = case(2, 2, 2, 20, 20, device=device, mask="(k <= q) & t1[b, h, q, k]", bias="t0[b, h, q, k]")
    tables = [torch.randn(2, 2, 20, 20, device=device), torch.rand(2, 2, 20, 20, device=device) > 0.2]
    tensors = {n: relaid(getattr(made, n), layout) for n in ("q", "k", "v", "dout")}
    tables = [relaid(t, layout) for t in tables]
    compare(near, replace(made, tables=tables, wanted=(True, False, False), **tensors))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0])
def test_any_scale(scale, device, near):
    compare(near, case(1, 2, 1, 40, 40, device=device, scale=scale, mask="k <= q"))


@pytest.mark.parametrize(("s", "t"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mask", ["k <= q", "t0[b, k]"])
def test_empty(s, t, mask, device):
    tables = [torch.ones(1, t, dtype=torch.bool)] if "t0" in mask else []
    out, *grads = launched(case(1, 2, 2, s, t, device=device, mask=mask, tables=tables))
    assert out.shape == (1, 2, s, 16)
    assert not any(x.any() for x in (out, *grads))


def test_logits_past_fp16(device, near):
    made = case(1, 1, 1, 40, 40, 64, 16, torch.float16, device, scale=1.0, mask="k <= q")
    made = replace(made, q=made.q * 60, k=made.k * 60)
    assert (made.q.float() @ made.k.float().mT).abs().max() > torch.finfo(torch.float16).max
    compare(near, made)


def test_large_logits(device, near):
    made = case(1, 1, 1, 40, 40, dtype=torch.bfloat16, device=device, mask="k <= q")
    compare(near, replace(made, q=made.q * 30, k=made.k * 30))


EVERYTHING = {
    "mask": "(k <= q) & t0[b, k]", "bias": "t1[h, k - q + S - 1] + t2[q, k]", "softcap": 5.0, "dropout": 0.1,
    "seed": SEED, "wanted": (False, True, True, True),
}  # fmt: skip


def everything(device, s=20):
    torch.manual_seed(3)
    tables = [torch.rand(1, s) > 0.2, torch.randn(2, 2 * s - 1), torch.randn(s, s)]
    return case(1, 2, 1, s, s, device=device, tables=tables, sinks=torch.randn(2), **EVERYTHING)


def test_same_bits_on_every_run(small, device):
    made = everything(device)
    for one, other in zip(launched(made), launched(made), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mask", ["(k <= q) & (q - k < 16)", "t0[b, q] == t0[b, k]", "q // 32 == k // 32"])
def test_blocks_outside_the_mask_are_not_read(mask, small, device):
    made = case(1, 1, 1, 128, 128, device=device, mask=mask)
    made.tables = [torch.arange(128, device=device)[None] // 32] if "t0" in mask else []
    plain = launched(made)
    spoilt = {n: getattr(made, n).clone() for n in ("q", "k", "v", "dout")}
    for x in spoilt.values():
        x[:, :, :32] = torch.nan
    for got, exact in zip(launched(replace(made, **spoilt)), plain, strict=True):
        assert torch.equal(got[:, :, 64:], exact[:, :, 64:])


@pytest.mark.parametrize(
    ("mask", "share"),
    [("", 0), ("k <= q", 0.35), ("q // 32 == k // 32", 0), ("t0[b, k]", 0), ("t0[q, k]", 0)],
)
def test_blocks_inside_the_mask_run_without_it(mask, share, small, interpreter, monkeypatch):
    runs = []
    for module in (_flash_forward, _flash_backward):
        old = module.scores
        monkeypatch.setattr(module, "scores", lambda *a, old=old: (runs.append(bool(a[-2])), old(*a))[1])
    shapes = {"t0[b, k]": (1, 128), "t0[q, k]": (128, 128)}
    tables = [torch.arange(128).expand(shapes[mask]) < 64] if mask in shapes else []
    launched(case(1, 1, 1, 128, 128, mask=mask, tables=tables))
    assert sum(runs) <= share * len(runs)
    assert len(runs) < 33 * 3 * (0.8 if mask else 4)


@pytest.mark.parametrize(
    ("bias", "why"),
    [
        ("t0[h, q]", None),
        ("t0[h] + t1[b, k]", None),
        ("t0[h, k - q + S - 1]", None),
        ("t0[h] * (k - q)", "t0"),
        ("t0[h, k // 2]", "its index"),
        ("t1[h]", "t0 is no part"),
    ],
)
def test_tables_without_a_gradient_say_why(bias, why):
    told = _flash.unsupported_gradient(bias, [(2, 40)], 0)
    assert told is None if why is None else why in told


SAMPLED = (1, 7, 63, 64, 65, 129)


def sampled(seed, device):
    """An attention with features drawn at random."""
    draw = random.Random(seed)
    s, t = draw.choice(SAMPLED), draw.choice(SAMPLED)
    h, g = draw.choice([(1, 1), (2, 1), (4, 2), (2, 2)])
    d, e = draw.choice([(16, 16), (24, 8), (8, 40), (64, 64)])
    torch.manual_seed(seed)
    masks = {
        "": None, "k <= q": None, "k <= q + T - S": None, "(k <= q) & (q - k < 20)": None,
        "abs(q - k) <= 9": None, "(k <= q) & t0[b, k]": torch.rand(2, t) > 0.3,
        "t0[b, q] == t0[b, k]": torch.randint(0, 3, (2, max(s, t))),
        "q // 16 == k // 16": None, "(k <= q) | (k < 5)": None,
        "t0[b, 0, q, k]": torch.rand(2, 1, s, t) > 0.3,
    }  # fmt: skip
    biases = {
        "": None, "t1[b, h, q, k]": (2, h, s, t), "t1[0, h, q, k]": (1, h, s, t),
        "t1[h, k - q + S - 1]": (h, s + t - 1),
        "t1[b, k]": (2, t), "t1[h] * (k - q)": (h,),
    }  # fmt: skip
    mask, bias = draw.choice([*masks]), draw.choice([*biases])
    tables = [torch.zeros(1) if masks[mask] is None else masks[mask], torch.randn(biases[bias] or (1,))]
    sinks = draw.random() < 0.3
    features = {
        "mask": mask, "bias": bias, "tables": tables, "softcap": draw.choice([0.0, 0.0, 4.0]),
        "sinks": torch.randn(h) if sinks else None, "dropout": draw.choice([0.0, 0.0, 0.2]), "seed": SEED,
        "wanted": (False, bool(bias) and "*" not in bias, sinks),
    }  # fmt: skip
    return case(2, h, g, s, t, d, e, draw.choice(DTYPES), device, **features)


@pytest.mark.parametrize("seed", mostly_slow(range(16), 0, 1, 2))
def test_features_together(seed, small, device, near):
    compare(near, sampled(seed, device))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_more_features_together(seed, small, device, near):
    compare(near, sampled(seed, device))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300, 340))
def test_features_together_in_blocks_as_chosen(seed, device, near):
    compare(near, sampled(seed, device))


def test_dropout_weights_are_the_scaled_ones(small, device):
    made = case(1, 1, 1, 40, 40, 16, 40, device=device, dropout=0.4, seed=SEED, mask="k <= q")
    keep = kept(made)
    eye = torch.eye(40, device=device).expand(1, 1, 40, 40)
    out = launched(replace(made, v=eye, dout=torch.ones_like(eye)))[0]
    p, _ = weights(made, torch.float32)
    torch.testing.assert_close(out, p * keep / 0.6)
