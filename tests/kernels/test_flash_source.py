"""Functions generated from expressions: their values over a tile, what they say of blocks, their source."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from flash_reference import evaluated
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fxaccel.kernels import _flash_lists, _flash_source, _flash_spans

B, H, S, T = 2, 3, 21, 37
TABLES = [
    torch.arange(B * T).view(B, T) // 5 - 3,
    torch.arange(S * T).view(S, T).remainder(7).eq(0),
    torch.linspace(-1, 1, H),
    torch.arange(S + T - 1, dtype=torch.int32) - 30,
]
KINDS = (("int64", 2), ("bool", 2), ("float", 1), ("int32", 1))

numbers = st.recursive(
    st.sampled_from(
        [
            "b",
            "h",
            "q",
            "k",
            "S",
            "T",
            "0",
            "3",
            "16",
            "-5",
            "t0[b, k]",
            "t3[k - q + S - 1]",
            "t3[q]",
            "t0[b, k // 2]",
        ]
    ),
    lambda x: st.one_of(
        st.builds("({} {} {})".format, x, st.sampled_from("+-*"), x),
        st.builds(
            "({} {} {})".format,
            x,
            st.sampled_from(["//", "%"]),
            st.sampled_from(["3", "16", "-4", "(h + 2)"]),
        ),
        st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), x, x),
        st.builds("abs({})".format, x),
        st.builds("(-{})".format, x),
        st.builds("where(q < k, {}, {})".format, x, x),
    ),
    max_leaves=4,
)
truths = st.recursive(
    st.one_of(
        st.builds("({} {} {})".format, numbers, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers),
        st.sampled_from(["t1[q, k]", "(t2[h] < 0.3)", "(t2[h] * 2.0 >= 0.5)"]),
    ),
    lambda x: st.one_of(
        st.builds("({} {} {})".format, x, st.sampled_from(["&", "|", "==", "!="]), x),
        st.builds("(~{})".format, x),
        st.builds("where({}, {}, {})".format, x, x, x),
    ),
    max_leaves=3,
)


@triton.jit
def tile_kernel(out_ptr, tables, strides, HEADS, S, T, FUNCTION: tl.constexpr, TURNED: tl.constexpr):
    """FUNCTION over all queries and keys of a head, by tiles of 16 x 16, either way round."""
    pid = tl.program_id(0)
    b, h = (pid // HEADS).to(tl.int64), (pid % HEADS).to(tl.int64)
    m, n = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    if TURNED:
        m, n = tl.arange(0, 16)[None, :], tl.arange(0, 16)[:, None]
    for top in range(0, S, 16):
        for edge in range(0, T, 16):
            x = FUNCTION(b, h, top, edge, m, n, S, T, tables, strides)
            at = (pid * S + top + m) * T + edge + n
            inside = (top + m < S) & (edge + n < T)
            tl.store(out_ptr + at, tl.broadcast_to(x, inside.shape).to(tl.int32), inside)


@pytest.fixture
def run(device):
    """Call a kernel on the tables, compiled or interpreted."""
    kernel = tile_kernel if device.type == "cuda" else triton.jit(tile_kernel.fn)
    steps = tuple(step for t in TABLES for step in t.stride())

    def tables():
        return tuple((t.view(torch.uint8) if t.dtype == torch.bool else t).to(device) for t in TABLES)

    def tile(text, turned):
        out = torch.empty(B, H, S, T, dtype=torch.int32, device=device)
        function = _flash_source.keep(text, KINDS)
        kernel[(B * H,)](out, tables(), steps, H, S, T, FUNCTION=function, TURNED=turned)
        return out.cpu().bool()

    def lists(text, m, n, turned):
        rows, cols = -(-S // m), -(-T // n)
        outer, inner = (cols, rows) if turned else (rows, cols)
        out = torch.full((B, H, outer, inner + 2), -1, dtype=torch.int32, device=device)
        test, chunk = _flash_spans.blocks(text, KINDS)
        _flash_lists.list_kernel[(B * H * outer,)](
            out, tables(), steps, H, S, T, None, None,
            TEST=test, TRANSPOSED=turned, CHUNK=chunk, BLOCK_M=m, BLOCK_N=n,
        )  # fmt: skip
        return out.cpu()

    return tile, lists


EXPRESSIONS = [
    "(q - k) // 3 == -2", "(q - k) % 4 == 1", "(k - q) // -4 < 2", "(k - q) % -4 == -1",
    "t3[k - q + S - 1] % 16 > 3", "t0[b, k // 2] == q", "t1[q, k] & (t0[b, k] > -2)", "t2[h] < 0.3",
    "~t1[q, k]", "h == 1", "t0[b, k] == t0[b, q]",
]  # fmt: skip


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_values_over_a_tile(text, run):
    for turned in (False, True):
        assert torch.equal(run[0](text, turned), evaluated(text, TABLES, B, H, S, T, "cpu").bool())


def check_lists(text, m, n, turned, made):
    """Every pair that the mask keeps lies in a listed block, every pair of a block kept whole is kept."""
    keeps = evaluated(text, TABLES, B, H, S, T, "cpu").bool()
    keeps = keeps.mT if turned else keeps
    m, n = (n, m) if turned else (m, n)
    for b in range(B):
        for h in range(H):
            for i, row in enumerate(made[b, h]):
                whole, part = row[2 : 2 + row[0]].tolist(), row[len(row) - row[1] :].tolist()
                part = part if row[1] else []
                assert sorted({*whole, *part}) == sorted(whole + part)
                part_of = keeps[b, h, i * m : i * m + m]
                for j in range(len(row) - 2):
                    block = part_of[:, j * n : j * n + n]
                    assert not block.any() or j in whole + part
                    assert j not in whole or block.all()


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_lists_of_blocks(text, run):
    for turned in (False, True):
        check_lists(text, 8, 16, turned, run[1](text, 8, 16, turned))


@pytest.mark.parametrize(
    ("text", "whole", "part"),
    [
        ("q // 16 == k // 16", 2, 0),  # the last blocks are the ragged ones
        ("k <= q", 0, 2),
        ("k // 16 < 1", 2, 0),
        ("t0[b, k] < 100", 4, 2),
        ("t0[b, k] > 100", 0, 0),
        ("(k - q) % 3 == 0", 0, 6),
        ("t2[h] >= -1.0", 4, 2),
        ("~(t2[h] >= -1.0) | (max(q, k) < 0)", 0, 0),
    ],
)
def test_blocks_are_told_apart(text, whole, part, run):
    row = run[1](text, 16, 16, False)[0, 0]
    if text == "k <= q":
        assert row[:, 0].tolist() == [0, 1]
        assert row[:, 1].tolist() == [1, 1]
    else:
        assert (row[:, 0].sum(), row[:, 1].sum()) == (whole, part)


def test_nan_in_a_table_is_known_to_be_nothing(run, monkeypatch):
    monkeypatch.setitem(globals(), "TABLES", [*TABLES[:2], torch.tensor([0.0, torch.nan, 1.0]), TABLES[3]])
    for text in ("t2[h] < 0.3", "t2[h] != 0.3", "~(t2[h] < 0.3)", "t2[h] == t2[h]"):
        check_lists(text, 16, 16, False, run[1](text, 16, 16, False))


@settings(max_examples=12, phases=[Phase.generate])
@given(truths)
def check_any(run, text):
    tile, lists = run
    try:
        exact = evaluated(text, TABLES, B, H, S, T, "cpu").bool()
    except (ZeroDivisionError, RuntimeError, IndexError):
        return
    assert torch.equal(tile(text, False), exact)
    check_lists(text, 16, 16, False, lists(text, 16, 16, False))


def test_any_expression(run):
    check_any(run)


@pytest.mark.slow
def test_many_expressions(run):
    settings(max_examples=400)(check_any)(run)


def test_source_can_be_looked_at():
    made = _flash_source.keep("(k <= q) & t0[b, k]", (("bool", 2),))
    assert "tl.load(tables[0]" in inspect.getsource(made.fn)
    assert _flash_source.keep("(k <= q) & t0[b, k]", (("bool", 2),)) is made
    again = _flash_source.keep("(k <= q) & t0[b, k]", (("int32", 2),))
    assert again is not made
    assert again.fn.__name__ != made.fn.__name__


def test_nothing_but_the_language_is_compiled():
    for text in ("__import__('os')", "q.real", "(lambda: q)()", "[q][0]", "t0", "k <= x"):
        with pytest.raises(ValueError, match=r"\S"):
            _flash_source.keep(text, (("bool", 2),))
