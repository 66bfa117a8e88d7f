"""Listing, diff and cost: one text everywhere, aligned by where nodes come from, FLOPs that are right."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sympy
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxaccel
from fxaccel import cost
from fxaccel.canonical import canonicalize
from fxaccel.capture import capture
from fxaccel.diff import SCHEMA, Diff
from fxaccel.listing import Namer, lines, listing

F = nn.functional
aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(torch.relu(self.up(h)))


class Clamp(fxaccel.Rule):
    name = "clamp"

    def pattern(self, op, x):
        return op.aten.relu.default(x)

    def rewrite(self, op, m):
        return op.aten.clamp.default(m.x, 0)


def program_of(model, *args):
    program = capture(model, args, {})
    canonicalize(program)
    return program


def shortened(text):
    """Listing text without the padding."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


# -- listing ---------------------------------------------------------------------------------------


def test_a_line_shows_result_operator_arguments_type_source_and_pass():
    fast = fxaccel.accelerate(Block(), passes=[Clamp], example_inputs=(torch.randn(4, 3, 8),))
    program = fast.__dict__["_fxaccel"].all[0].program
    first = next(
        i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "h = self.norm(x)" in line
    )
    wide, at = "f32[s0,s1,8]", "test_diff.py"
    assert shortened(listing(program)).splitlines() == [
        f"%layer_norm = aten.layer_norm(%x, [8], %p_norm_weight, %p_norm_bias) # {wide} {at}:{first}",
        f"%linear = aten.linear(%layer_norm, %p_up_weight, %p_up_bias) # f32[s0,s1,16] {at}:{first + 1}",
        f"%relu = aten.clamp(%linear, 0) # f32[s0,s1,16] {at}:{first + 1} by clamp",
        f"%linear_1 = aten.linear(%relu, %p_down_weight, %p_down_bias) # {wide} {at}:{first + 1}",
        f"%add = aten.add.Tensor(%x, %linear_1) # {wide} {at}:{first + 1}",
    ]


def test_results_of_an_operator_with_several_stand_left_and_ends_are_shown_on_request():
    class Top(nn.Module):
        def forward(self, x):
            values, indices = x.topk(2)
            return values, indices + 1

    program = program_of(Top(), torch.randn(3, 4))
    text = shortened(listing(program, ends=True))
    assert "%getitem, %getitem_1 = aten.topk(%x, 2, 1) # f32[s0,2] i64[s0,2]" in text
    assert text.startswith("%x = input()")
    assert "return(" in text.splitlines()[-1]
    assert "getitem(" not in text


def test_sizes_are_numbered_in_the_order_of_the_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a @ b

    program = program_of(Two(), torch.randn(5, 4), torch.randn(4, 7))
    assert set(Namer(program).by_name.values()) == set(sympy.symbols("s0 s1 s2"))
    assert lines(program)[0][1].type == "f32[s0,s2]"


def test_the_listing_is_equal_in_two_processes(tmp_path):
    script = """
        import torch, sys
        sys.path[:0] = [sys.argv[1]]
        from test_diff import Block, program_of
        import fxaccel
        from fxaccel.listing import listing
        model = torch.nn.Sequential(Block(), Block())
        fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 3, 8),), measure=False)
        print(listing(fast.__dict__["_fxaccel"].all[0].program, ends=True))
        print(fast.code); print(fast.diff()); print(fast.diff().to_json())
        print(sorted(fast.__dict__["_fxaccel"].all[0].manifest.proofs.items()))
    """
    texts = []
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), os.path.dirname(__file__)],
            capture_output=True, text=True, env=env, check=True,
        )  # fmt: skip
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert "add_layer_norm" in texts[0]


# -- diff ------------------------------------------------------------------------------------------


def test_a_rewritten_line_is_all_that_shows():
    fast = fxaccel.accelerate(Block(), passes=[Clamp], example_inputs=(torch.randn(4, 3, 8),))
    changed = [c for c in fast.diff().changes if c.sign != " "]
    assert [(c.sign, c.line.op) for c in changed] == [("-", "aten.relu"), ("+", "aten.clamp")]
    assert fast.diff()
    assert fast.diff().operators() == {"aten.clamp": (0, 1), "aten.relu": (1, 0)}
    text = str(fast.diff())
    assert text.count("@@") == 1
    assert "nodes: 5 -> 5" in text


def test_equal_programs_have_no_diff():
    fast = fxaccel.accelerate(Block(), passes=[], example_inputs=(torch.randn(4, 3, 8),))
    assert not fast.diff()
    assert list(fast.diff().hunks()) == []
    assert "@@" not in str(fast.diff())


def test_renamed_nodes_do_not_show():
    program = program_of(Block(), torch.randn(4, 3, 8))
    other = program.copy()
    for i, node in enumerate(other.graph.nodes):
        if node.op == "call_function":
            node.name = f"renamed_{i}"
    assert listing(program) != listing(other)
    assert not Diff(program, other)


def test_a_change_of_a_literal_or_of_an_operand_shows():
    program = program_of(Block(), torch.randn(4, 3, 8))
    for change in ("literal", "operand"):
        other = program.copy()
        norm = next(n for n in other.graph.nodes if n.target is aten.layer_norm.default)
        linears = [n for n in other.graph.nodes if n.target is aten.linear.default]
        if change == "literal":
            norm.args = (*norm.args, 0.5)
        else:
            linears[1].args = (linears[1].args[0], linears[1].args[1])
        assert Diff(program, other)


def test_the_order_of_two_captures_and_the_raw_graph():
    fast = fxaccel.accelerate(Block(), passes=["fuse-norm"], example_inputs=(torch.randn(4, 3, 8),))
    with torch.no_grad():
        fast(torch.randn(4, 3, 8))
    assert fast.diff(capture=0)
    assert fast.diff(capture=1)
    assert len(fast.diff(raw=True).changes) >= len(fast.diff().changes)
    with pytest.raises((IndexError, fxaccel.OptionError)):
        fast.diff(capture=7)


def test_the_json_has_its_schema_and_every_line():
    fast = fxaccel.accelerate(Block(), passes=[Clamp], example_inputs=(torch.randn(4, 3, 8),))
    data = json.loads(fast.diff().to_json())
    assert data["schema"] == SCHEMA == "fxaccel-diff/1"
    assert set(data) == {"schema", "before", "after", "operators", "hunks"}
    assert set(data["before"]) == {"nodes", "parameter_bytes", "flops"}
    (hunk,) = data["hunks"]
    assert [line["sign"] for line in hunk] == [" ", "-", "+", " "]
    assert set(hunk[1]) == {
        "sign",
        "text",
        "results",
        "op",
        "args",
        "type",
        "path",
        "source",
        "by",
        "regions",
    }
    assert hunk[2]["by"] == "clamp"


def test_a_diff_of_a_model_in_pieces_says_why_there_is_none():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    fast = fxaccel.accelerate(Branch(), example_inputs=(torch.ones(3, 3),))
    with pytest.raises(fxaccel.OptionError, match="captured in pieces"):
        fast.diff()


# -- cost ------------------------------------------------------------------------------------------


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2)) + x @ x.mT @ x


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.group = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, groups=3)

    def forward(self, x):
        return self.group(self.conv(x))


class Products(nn.Module):
    def forward(self, x):
        b = torch.bmm(x, x.transpose(1, 2))
        m = torch.einsum("bij,bkj->bik", x, b @ x)
        return torch.addmm(b[0], m[0], b[1]) + torch.mm(b[0], b[1]) @ m[0]


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (Block(), [(2, 3, 8), (5, 4, 8), (7, 11, 8)]),
        (Attends(), [(2, 3, 8), (5, 4, 8), (7, 11, 8)]),
        (Convolves(), [(2, 3, 9, 8), (5, 3, 9, 8), (6, 3, 9, 8)]),
        (Products(), [(2, 3, 4), (5, 6, 4), (4, 3, 4)]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_symbolic_flops_are_those_that_torch_counts(model, shapes):
    program = program_of(model, torch.randn(shapes[0]))
    count = cost.flops(program)
    for shape in shapes:
        x = torch.randn(shape)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the others go uncounted on CPU
            model(x)
        values = {s: shape[d] for s, (_, d) in program.sizes.items()}
        got = count.xreplace({s: sympy.Integer(values[str(s)]) for s in count.free_symbols})
        assert int(got) == counter.get_total_flops()


def test_our_kernels_count_as_what_they_replace():
    fast = fxaccel.accelerate(Attends(), passes=["fuse-attention"], example_inputs=(torch.randn(2, 3, 8),))
    before, after = fast.diff().totals
    assert before.flops == after.flops != 0
    assert {str(s) for s in before.flops.free_symbols} == {"s0", "s1"}


def test_parameter_bytes_count_tied_ones_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    assert cost.parameter_bytes(program_of(Tied(), torch.randn(2, 8))) == 8 * 8 * 4
