"""The language of masks and biases: what it takes, what it means, and what is read out of it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxaccel.kernels import _score, _score_blocks

B, H, S, T = 2, 3, 5, 7


def meaning(text, tables, sizes=(B, H, S, T)):
    """The text run by Python itself, an index at a time."""
    values = {"min": min, "max": max, "abs": abs, "float": float, "where": lambda c, x, y: x if c else y}
    values |= {f"t{i}": _Table(t) for i, t in enumerate(tables)}
    values |= {"S": sizes[2], "T": sizes[3]}
    code = compile(text.replace("~", "1^"), "text", "eval")
    found = [
        eval(code, values | dict(zip("bhqk", at, strict=True)))
        for at in itertools.product(*map(range, sizes))
    ]
    return torch.tensor(found, dtype=torch.float64 if float in map(type, found) else None).view(sizes)


class _Table:
    def __init__(self, table):
        self.table = table

    def __getitem__(self, at):
        return self.table[at].item()


TABLES = [
    torch.randint(0, 3, (B, 12), dtype=torch.int32),
    torch.rand(B, T) > 0.4,
    torch.randn(H, S, T, dtype=torch.float64),
    torch.randn(H, S + T - 1, dtype=torch.float64),
]
READ = ["t0[b, q]", "t0[b, k]", "t0[1, q + k]", "t0[0, (q * k) % 12]"]

integers = st.recursive(
    st.sampled_from(["b", "h", "q", "k", "S", "T", *READ]) | st.integers(0, 9).map(str),
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from("+-*"), x).map(lambda p: f"({' '.join(p)})"),
        st.tuples(x, st.sampled_from(["//", "%"]), st.integers(1, 5), st.booleans()).map(
            lambda p: f"({p[0]} {p[1]} {'-' * p[3]}{p[2]})"
        ),
        st.tuples(st.sampled_from(["min", "max"]), x, x).map(lambda p: f"{p[0]}({p[1]}, {p[2]})"),
        x.map(lambda p: f"abs({p})"),
        x.map(lambda p: f"-({p})"),
    ),
    max_leaves=5,
)
comparisons = st.tuples(integers, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), integers).map(
    lambda p: f"({' '.join(p)})"
)
masks = st.recursive(
    comparisons | st.just("t1[b, k]"),
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from("&|"), x).map(lambda p: f"({' '.join(p)})"),
        x.map(lambda p: f"(~{p})"),
        st.tuples(x, integers, integers, integers).map(lambda p: f"(where({p[0]}, {p[1]}, {p[2]}) < {p[3]})"),
    ),
    max_leaves=3,
)


@settings(max_examples=100)
@given(integers)
def test_integers_are_pythons(text):
    got = _score.evaluate(text, TABLES, B, H, S, T)
    assert got.dtype == torch.int64
    assert torch.equal(got.expand(B, H, S, T), meaning(text, TABLES))


@settings(max_examples=100)
@given(masks)
def test_booleans_are_pythons(text):
    got = _score.evaluate(text, TABLES, B, H, S, T)
    assert torch.equal(got.expand(B, H, S, T), meaning(text, TABLES).bool())


FLOATS = [
    "t2[h, q, k]", "t3[h, k - q + S - 1]", "t3[h, S + k - 1 - q]", "t3[1, k - q + S - 1]", "t2[h, 0, k] * 2",
    "t2[h, q, k] + t3[h, k - q + S - 1]", "-0.5 * (q - k)", "where(t1[b, k], 0.0, -1e9)", "0.25",
    "abs(q - k) * 0.1",
    "float(q) * float(t1[b, k])", "min(t2[h, q, k], 0.1)", "max(1, t2[h, 0, k])", "t2[2, q, k] - 1",
    "where(k < q, 1, 0.5)", "q + 0.3", "t2[h, q, q]", "t2[h, 4 - q, k]", "t2[b, q, k]",
]  # fmt: skip


@pytest.mark.parametrize("text", FLOATS)
def test_floats(text):
    exact = meaning(text, TABLES)
    got = _score.evaluate(text, TABLES, B, H, S, T, dtype=torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.expand(B, H, S, T), exact.double(), rtol=1e-12, atol=1e-12)
    assert _score.evaluate(text, TABLES, B, H, S, T).dtype == torch.float32


PARTS = {"b": range(1, 2), "h": range(0, 2), "q": range(1, 4), "k": range(2, 7)}


@pytest.mark.parametrize("text", [*FLOATS, "(k <= q) & (t0[b, q] == t0[b, k])", "t1[b, k]"])
def test_a_part_is_a_part_of_the_whole(text):
    whole = _score.evaluate(text, TABLES, B, H, S, T).expand(B, H, S, T)
    part = _score.evaluate(text, TABLES, B, H, S, T, **PARTS)
    sliced = whole[tuple(slice(r.start, r.stop) for r in PARTS.values())]
    assert torch.equal(part.expand(sliced.shape), sliced)
    none = _score.evaluate(text, TABLES, B, H, S, T, q=range(2, 2), k=range(0))
    assert none.numel() == 0 or not {"q", "k"} & _score.names(text)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("k <= q", (1, 1, S, T)), ("t1[b, k]", (B, 1, 1, T)), ("t2[h, q, k]", (1, H, S, T)),
        ("S + 1", (1,) * 4),
        ("t2[h, 0, k] * b", (B, H, 1, T)), ("t3[2, k - q + S - 1]", (1, 1, S, T)), ("S < T", (1,) * 4),
    ],
)  # fmt: skip
def test_no_larger_than_its_indices(text, shape):
    assert _score.evaluate(text, TABLES, B, H, S, T).shape == shape


def test_a_plain_read_copies_nothing():
    table = torch.randn(1, H, S, T)
    assert _score.evaluate("t0[0, h, q, k]", [table], B, H, S, T).data_ptr() == table.data_ptr()


REJECTED = {
    "no expression": [
        "", "k <=", "k = q", "k; q",
    ],
    "not part of": [
        "x < q", "print", "t4[k]", "t0", "q.real", "q.__class__", "__import__('os')", "print(q)", "max(q)",
        "max(q, k, b)", "abs(x=q)", "max(*q, k)", "(lambda: q)()", "[q for q in k]", "(q, k)", "[q]", "{q}",
        "q if k else b", "q and k", "not q", "q / k", "q ** k", "q << 1", "q ^ k", "+q", "0 <= k <= q",
        "k in q", "k is q", "(q := k)", "q[k]", "t0[k].t1[q]", "t0[k][q]", "min[k]", "f'{q}'", "await q",
        "t0[0:2]", "t0[*q]", "k <= q & q < 5",
    ],
    "the literal": [
        "None", "True", "'q'", "1j", "1e999", "9223372036854775808", "...", "t0[...]",
    ],
    "0 indices": [
        "t0[()]",
    ],
    "5 indices": [
        "t0[0, 0, 0, 0, 0]",
    ],
    "no integer": [
        "t0[0.5]", "t0[q < k]", "t0[t1[0.5]]",
    ],
    "divides floats": [
        "q // 2.0", "float(q) % 2",
    ],
    "calculates with a boolean": [
        "(q < k) + 1", "-(q < k)", "where(q < k, 1, q < k)", "abs(q < k)",
    ],
    "takes a number": [
        "q & k", "~q", "k <= q & t1[k]", "where(q, 1, 2)",
    ],
    "compares a boolean": [
        "(q < k) == 1", "(q < k) < (k < q)",
    ],
    "null": [
        "q\0",
    ],
    "no expression|nested": ["(" * 500 + "q" + ")" * 500, "-" * 100_000 + "q"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"), [(t, why) for why, texts in REJECTED.items() for t in texts], ids=lambda x: x[:20]
)
def test_rejected(text, why):
    with pytest.raises(ValueError, match=why):
        _score.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("t4[b, k]", "not part of"), ("t1[b]", "by 1 indices; it has 2 dimensions"),
        ("t1[b, k] + 1", "a boolean"),
        ("t0[b, k]", "is a int"), ("q + k", "is a int"), ("t0[b, k] & (k < q)", "takes a number"),
        ("t2[h, q, k] < t3[h, t2[h, q, k]]", "no integer"), ("t3[h, 0] // 2 < 1", "divides floats"),
    ],
)  # fmt: skip
def test_problems_with_the_tables(text, why):
    assert any(why in sentence for sentence in _score.problems("mask", text, TABLES, ("bool",)))
    assert all("the mask" in sentence for sentence in _score.problems("mask", text, TABLES, ("bool",)))


def test_no_problems():
    assert not list(_score.problems("mask", "(k <= q) & t1[b, k]", TABLES, ("bool",)))
    assert not list(_score.problems("bias", "t2[h, q, k] + k", TABLES, ("float", "int")))
    found = list(_score.problems("mask", "t1[b, k]", TABLES[:1], ("bool",)))
    assert found == ["the mask reads t1, and there are 1 tables"]


BANDS = {
    "": (None, None, ""),
    "k <= q": (None, "0", ""),
    "q >= k": (None, "0", ""),
    "k < q": (None, "-1", ""),
    "~(k > q)": (None, "0", ""),
    "k <= q + T - S": (None, "T - S", ""),
    "k - T <= q - S": (None, "T - S", ""),
    "(k <= q) & (q - k < 128)": ("-127", "0", ""),
    "(k <= q) & (k > q - 128)": ("-127", "0", ""),
    "abs(q - k) <= 5": ("-5", "5", ""),
    "5 > abs(k - q)": ("-4", "4", ""),
    "abs(k - q + 2) < S": ("-S - 1", "S - 3", ""),
    "k == q": ("0", "0", ""),
    "(k <= q) & (k <= q + 3) & (q < k + 2) & (k >= q - T)": ("max(-1, -T)", "min(0, 3)", ""),
    "k - q <= T // 2 - 1": (None, "(T // 2) - 1", ""),
    "k <= q + min(S, 4)": (None, "(min(S, 4))", ""),
    "2 * k <= q + k": (None, "0", ""),
    "~((k > q) | (k < q - 3))": ("-3", "0", ""),
    "(k <= q) & t1[b, k]": (None, "0", "t1[b, k]"),
    "(k <= q) & (t0[b, q] == t0[b, k])": (None, "0", "t0[b, q] == t0[b, k]"),
    "(k <= q) & ~t1[b, k] & (k > 2)": (None, "0", "~t1[b, k] & (k > 2)"),
    "q // 64 == k // 64": (None, None, "q // 64 == k // 64"),
    "(k <= q) | (k < 7)": (None, None, "(k <= q) | (k < 7)"),
    "k + q <= 5": (None, None, "k + q <= 5"),
    "2 * k <= 2 * q": (None, None, "2 * k <= 2 * q"),
    "k <= q + 0.5": (None, None, "k <= q + 0.5"),
    "k <= q + h": (None, None, "k <= q + h"),
    "k != q": (None, None, "k != q"),
    "S < 3": (None, None, "S < 3"),
    "abs(q - k) >= 2": (None, None, "abs(q - k) >= 2"),
    "(k - q) * S <= 0": (None, None, "(k - q) * S <= 0"),
    "~(t2[h, q, k] < 0.0)": (None, None, "~(t2[h, q, k] < 0.0)"),
}


def banded(text, sizes):
    """The mask put together again from its band."""
    found = _score.band(text)
    low, high = found.limits(*sizes[2:])
    q, k = torch.arange(sizes[2]).view(-1, 1), torch.arange(sizes[3])
    keep = torch.ones(sizes, dtype=torch.bool)
    keep &= True if low is None else k - q >= low
    keep &= True if high is None else k - q <= high
    return keep & _score.evaluate(found.rest, TABLES, *sizes) if found.rest else keep


@pytest.mark.parametrize("text", BANDS, ids=str)
def test_bands(text):
    assert tuple(_score.band(text)) == BANDS[text]
    for sizes in ((B, H, S, T), (B, H, 5, 3)):
        whole = _score.evaluate(text, TABLES, *sizes) if text else torch.ones(sizes, dtype=torch.bool)
        assert torch.equal(banded(text, sizes), whole.expand(sizes))


linear = st.tuples(
    st.sampled_from(["k", "q", "k - q", "q - k", "abs(q - k)", "abs(k - q + 1)", "k - S", "2 * k - q", "-q"]),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.sampled_from(
        ["q", "k", "q + 2", "k - T + S", "3", "-2", "k - (q - 1)", "-k", "S - T", "q * 2 - q", "-(2 - q)"]
    ),
).map(lambda p: f"({' '.join(p)})")
conjunctions = st.recursive(
    linear,
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from("&&|"), x).map(lambda p: f"({' '.join(p)})"), x.map(lambda p: f"(~{p})")
    ),
    max_leaves=4,
)


@settings(max_examples=200)
@given(conjunctions)
def test_a_band_and_its_rest_are_the_mask(text):
    whole = _score.evaluate(text, [], 1, 1, S, T).expand(1, 1, S, T)
    assert torch.equal(banded(text, (1, 1, S, T)), whole)


@pytest.mark.parametrize(
    ("bias", "number", "forms"),
    [
        ("t0[0, h, q, k]", 0, [("0", "h", "q", "k")]),
        ("t0[k, q]", 0, [("k", "q")]),
        ("t0[h, k - q + S - 1]", 0, [("h", "relative")]),
        ("t0[S + k - 1 - q, h] + t1[b, k]", 0, [("relative", "h")]),
        ("t0[h] + t1[b, 0, k] + t0[0]", 0, [("h",), ("0",)]),
        ("t0[h] * (k - q) + t1[b, 0, k]", 1, [("b", "0", "k")]),
    ],
)
def test_forms_that_have_a_gradient(bias, number, forms):
    assert list(_score.gradient_forms(bias, number)) == forms


@pytest.mark.parametrize(
    ("bias", "number", "why"),
    [
        ("t0[h] * (k - q)", 0, "added as it is, not in"),
        ("t1[b] - t0[h]", 0, "added as it is, not in"),
        ("t0[h] + t0[h] * 2", 0, "added as it is, not in"),
        ("where(t0[h] < 0, 0.0, 1.0)", 0, "added as it is, not in"),
        ("t0[h, t1[k]]", 0, "'t1\\[k\\]' is none of 0, b, h, q, k"),
        ("t0[1, k]", 0, "its index '1' is none of"),
        ("t0[q - k + T - 1]", 0, "is none of"),
        ("t0[q, q]", 0, "stands in it twice"),
        ("t0[q, k - q + S - 1]", 0, "stands in it twice"),
        ("t1[h]", 0, "no part of the bias"),
        ("", 0, "no part of the bias"),
    ],
)
def test_forms_that_have_none(bias, number, why):
    with pytest.raises(NotImplementedError, match=why):
        _score.gradient_forms(bias, number)


masks_of_tables = st.recursive(
    comparisons | linear | st.sampled_from(["t1[b, k]", "(q // 2 == k // 2)", "(t0[b, q] == t0[b, k])"]),
    lambda x: st.one_of(
        st.tuples(x, st.sampled_from("&|"), x).map(lambda p: f"({' '.join(p)})"),
        x.map(lambda p: f"(~{p})"),
        st.tuples(x, integers, integers, integers).map(lambda p: f"(where({p[0]}, {p[1]}, {p[2]}) < {p[3]})"),
        st.tuples(x, x, x).map(lambda p: f"where({', '.join(p)})"),
    ),
    max_leaves=3,
)


@settings(max_examples=200)
@given(masks_of_tables, st.integers(1, 3), st.integers(1, 3))
def test_reach_leaves_no_key_out(text, queries, keys):
    check_reach(text, queries, keys)


def check_reach(text, queries, keys):
    kept = _score.evaluate(text, TABLES, B, H, S, T).expand(B, H, S, T)
    found = _score_blocks.reach(text, TABLES, (B, H, S, T), queries, keys)
    assert len(found) == -(-S // queries)
    for i, (first, stop, left, right) in enumerate(found):
        rows = kept[:, :, i * queries : (i + 1) * queries]
        assert 0 <= first <= left <= right <= stop <= T
        assert not rows[..., :first].any()
        assert not rows[..., stop:].any()
        assert rows[..., first:left].all()
        assert rows[..., right:stop].all()


PERIODIC = [
    "q % 3 == 0",
    "k % 4 < 1",
    "(q - k) % 3 == 1",
    "(q + k) // 3 == k // 2",
    "(q * k) % 5 > 3",
    "-q % 4 == 0",
]
ROUNDED = "(q + 16777216) < 16777217.0"  # in float32 the two sides are equal for q = 0


@pytest.mark.parametrize("text", [*PERIODIC, ROUNDED])
@pytest.mark.parametrize(("queries", "keys"), [*itertools.product((1, 2, 3, 4), repeat=2)])
def test_reach_of_what_is_not_monotone(text, queries, keys):
    check_reach(text, queries, keys)


CHUNKS = torch.arange(64).div(16, rounding_mode="floor").expand(2, -1)


@pytest.mark.parametrize(
    ("text", "keys", "wholes"),
    [
        ("k <= q", [16, 32, 48, 64], 0),
        ("k < q + 16", [32, 48, 64, 64], 1),
        ("(k <= q) & (q - k < 16)", [16, 32, 32, 32], 0),
        ("q // 16 == k // 16", [16] * 4, 4),
        ("t0[b, q] == t0[b, k]", [16] * 4, 4),
        ("(k <= q) & (t0[b, q] == t0[b, k])", [16] * 4, 0),
        ("(k <= q) | (k < 7)", [16, 32, 48, 64], 0),
        ("q < 20", [64, 64, 0, 0], 1 + 2),
        ("t0[b, k] < 1", [16] * 4, 4),
        ("abs(q - k) <= 15", [32, 48, 48, 32], 0),
        ("q % 64 < 32", [64, 64, 0, 0], 4),
        ("t0[b, k] == t0[b, (q + k) % 64]", [64] * 4, 0),
    ],
)
def test_reach_is_narrow(text, keys, wholes):
    found = _score_blocks.reach(text, [CHUNKS], (2, 1, 64, 64), 16, 16)
    assert [r.stop - r.first for r in found] == keys
    assert sum(r.whole for r in found) == wholes


def test_reach_asks_only_at_the_edge():
    found = _score_blocks.reach("k <= q", [], (1, 1, 64, 64), 16, 16)
    assert [(r.left, r.right) for r in found] == [(0, 16), (16, 32), (32, 48), (48, 64)]
