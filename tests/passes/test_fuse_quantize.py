"""fuse-quantize: what it rewrites, what it leaves alone and why, and that values stay bit for bit."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.kernels import quantize_rows
from fxaccel.listing import listing
from fxaccel.passes import FuseQuantize, Quantize
from tests.helpers import session, thinned

WIDTH, INNER = 16, 40
X, R = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)


class Block(nn.Module):
    """As Llama's, with products in place of attention."""

    def __init__(self, norm=lambda: nn.RMSNorm(WIDTH, eps=1e-5), activation=F.silu):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.activation = norm(), norm(), activation
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        h = self.first(x)
        x = x + self.o(self.q(h) * self.k(h))
        h = self.second(x)
        return x + self.down(self.activation(self.gate(h)) * self.up(h))


def calls(count, dtype=torch.float32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 5, WIDTH, generator=draw).to(dtype),) for _ in range(count)]


def accelerated(model, *args, passes=("fuse-quantize",), **options):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        return fxaccel.accelerate(
            model, passes=list(passes), example_inputs=args, allow="approximate", **options
        )


def quantized(model, *more, inputs="dynamic-int8", weights="int8", dtype=torch.float32):
    """The model with quantized linears, and what further passes make of them."""
    options = Quantize(weights=weights, inputs=inputs, even_if_slower=True)
    return accelerated(
        model, *calls(1, dtype)[0], passes=["fuse-norm", options, *more], calibration=calls(4, dtype)
    )


def text(fast):
    lines = listing(session(fast).all[0].program).splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines]


def rounded(value, dtype=torch.int8):
    return torch.ops.fxaccel.quantize_rows(value, dtype)


def same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)


# -- it fires --------------------------------------------------------------------------------------


def test_a_llama_block_has_its_norms_and_its_gate_rounded_where_they_are_computed():
    before, after = quantized(Block().eval()), quantized(Block().eval(), "fuse-quantize")
    assert [line for line in text(before) if "quantize_rows" in line or "norm" in line] == [
        "%rms_norm = fxaccel.rms_norm(%x, %p_first_weight, 1e-05)",
        "%getitem, %getitem_1 = fxaccel.quantize_rows(%rms_norm, i8)",
        "%getitem_4, %getitem_5 = fxaccel.quantize_rows(%mul, i8)",
        "%rms_norm_1, %add = fxaccel.add_rms_norm(%x, %linear_2, %p_second_weight, 1e-05)",
        "%getitem_6, %getitem_7 = fxaccel.quantize_rows(%rms_norm_1, i8)",
        "%getitem_10, %getitem_11 = fxaccel.quantize_rows(%mul_1, i8)",
    ]
    assert [line for line in text(after) if "quantize(" in line or "add" in line] == [
        "%getitem, %getitem_1, %_ = fxaccel.norm_quantize(%x, None, %p_first_weight, None, 1e-05, False, "
        "0.0, False, i8)",
        "%getitem_6, %getitem_7, %add = fxaccel.norm_quantize(%x, %linear_2, %p_second_weight, None, 1e-05, "
        "False, 0.0, False, i8)",
        "%getitem_10, %getitem_11 = fxaccel.glu_quantize(%linear_3, %linear_4, 'silu', i8)",
        "%add_1 = aten.add.Tensor(%add, %linear_5)",
    ]
    report = after.report()
    assert len(report["fuse-quantize"].applied) == 3
    assert all(site.proof for site in report["fuse-quantize"].applied)
    assert len(report["quantize"].applied) == len(before.report()["quantize"].applied) == 6
    assert sum("quantize_rows" in line for line in text(after)) == 1  # of the product, which is no gate


def layer(s, x, r):
    return F.layer_norm(x, [WIDTH], s.w, s.b)


NORMS = [
    (layer, "norm_quantize(%x, None, %p_w, %p_b, 1e-05, True, 0.0, False, i8)"),
    (
        lambda s, x, r: F.layer_norm(x, [WIDTH], None, None),
        "norm_quantize(%x, None, None, None, 1e-05, True, 0.0, False, i8)",
    ),
    (
        lambda s, x, r: F.layer_norm(x, [WIDTH], s.w, None, 1e-6),
        "norm_quantize(%x, None, %p_w, None, 1e-06, True, 0.0, False, i8)",
    ),
    (
        lambda s, x, r: F.rms_norm(x, [WIDTH], s.w, 1e-6),
        "norm_quantize(%x, None, %p_w, None, 1e-06, False, 0.0, False, i8)",
    ),
    (
        lambda s, x, r: F.rms_norm(x, [WIDTH], 1.0 + s.w, 1e-6) + s.b,
        "norm_quantize(%x, None, %p_w, %p_b, 1e-06, False, 1.0, False, i8)",
    ),
    (
        lambda s, x, r: layer(s, x + r, r),
        "norm_quantize(%x, %r, %p_w, %p_b, 1e-05, True, 0.0, False, i8)",
    ),
    (
        lambda s, x, r: F.rms_norm(x + r, [WIDTH], None, 1e-6),
        "norm_quantize(%x, %r, None, None, 1e-06, False, 0.0, False, i8)",
    ),
]
GATES = [
    (lambda s, x, r: F.silu(x) * r, "glu_quantize(%x, %r, 'silu', i8)"),
    (lambda s, x, r: r * F.silu(x), "glu_quantize(%x, %r, 'silu', i8)"),
    (lambda s, x, r: F.gelu(x) * r, "glu_quantize(%x, %r, 'gelu', i8)"),
    (lambda s, x, r: r * F.gelu(x, approximate="tanh"), "glu_quantize(%x, %r, 'gelu_tanh', i8)"),
    (lambda s, x, r: F.relu(x) * r, "glu_quantize(%x, %r, 'relu', i8)"),
    (lambda s, x, r: F.silu(x) * x, "glu_quantize(%x, %x, 'silu', i8)"),
    (lambda s, x, r: torch.sigmoid(x) * r, "glu_quantize(%x, %r, 'sigmoid', i8)"),
]
SPELLINGS = [*NORMS, *GATES]


class Site(nn.Module):
    """A function of (self, x, r); two weights."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(2)
        self.w, self.b = (nn.Parameter(torch.randn(WIDTH, dtype=dtype)) for _ in range(2))
        self.function = function

    def forward(self, x, r):
        return self.function(self, x, r)


@pytest.mark.filterwarnings("ignore:pass")  # fuse-norm, where there is none
@thinned(
    6, number=range(len(SPELLINGS)), to=[torch.int8, torch.float8_e4m3fn],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)  # fmt: skip
def test_every_spelling_becomes_one_kernel_of_the_same_values(number, to, dtype):
    function, line = SPELLINGS[number]

    def forward(s, x, r):
        q, scale = rounded(function(s, x, r), to)
        return q.float(), scale, r + 1

    model = Site(forward, dtype).eval()
    x, r = torch.randn(3, 5, WIDTH).to(dtype), torch.randn(3, 5, WIDTH).to(dtype)
    before, after = (
        accelerated(model, x, r, passes=["fuse-norm", *more]) for more in ((), ("fuse-quantize",))
    )
    (applied,) = after.report()["fuse-quantize"].applied
    assert applied.proof
    found = [t.partition(" = fxaccel.")[2] for t in text(after) if "fxaccel" in t]
    code = "i8" if to == torch.int8 else "float8_e4m3fn"
    assert found == [line.replace("i8", code)]
    with torch.no_grad():
        for shape in ((3, 5, WIDTH), (4, 2, WIDTH), (1, 1, WIDTH)):
            x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            same(after(x, r), before(x, r))


@pytest.mark.parametrize("passes", [(), ("fuse-norm",)])
def test_layer_norm_as_torch_has_it_and_as_ours(passes):
    fast = accelerated(
        Site(lambda s, x, r: rounded(layer(s, x, r))).eval(), X, R, passes=[*passes, "fuse-quantize"]
    )
    (line,) = text(fast)
    assert line.endswith("fxaccel.norm_quantize(%x, None, %p_w, %p_b, 1e-05, True, 0.0, False, i8)")
    assert fast.report()["fuse-quantize"].applied[0].proof


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.sigmoid])
@pytest.mark.parametrize("first", ["fuse-glu", "fuse-quantize"])
def test_gates_that_fuse_glu_has_taken_are_rounded_too(first, activation):
    passes = [first, "fuse-quantize" if first == "fuse-glu" else "fuse-glu"]
    model = Site(lambda s, x, r: rounded(activation(x) * r)).eval()
    before, after = accelerated(model, X, R, passes=[]), accelerated(model, X, R, passes=passes)
    assert ["fxaccel.glu_quantize(" in line for line in text(after)] == [True]
    assert len(after.report()["fuse-glu"].applied) == (first == "fuse-glu")
    with torch.no_grad():
        same(after(X, R), before(X, R))


def test_rounded_before_the_weight():
    def forward(s, x, r):
        return rounded(s.w * F.rms_norm(x.float(), [WIDTH], None, 1e-6).to(x.dtype))

    model, x = Site(forward, torch.bfloat16).eval(), X.bfloat16()
    fast = accelerated(model, x, x, passes=["fuse-norm", "fuse-quantize"])
    (line,) = text(fast)
    assert line.endswith("fxaccel.norm_quantize(%x, None, %p_w, None, 1e-06, False, 0.0, True, i8)")


def test_the_sum_stays_readable():
    def forward(s, x, r):
        h = x + r
        q, scale = rounded(F.rms_norm(h, [WIDTH], s.w, 1e-6))
        return q, scale, h * 2, h

    model, x, r = Site(forward).eval(), torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    before, after = (
        accelerated(model, x, r, passes=["fuse-norm", *more]) for more in ((), ("fuse-quantize",))
    )
    assert [line for line in text(after) if "fxaccel" in line] == [
        "%getitem, %getitem_1, %add = fxaccel.norm_quantize(%x, %r, %p_w, None, 1e-06, False, 0.0, False, i8)"
    ]
    with torch.no_grad():
        same(after(x, r), before(x, r))


# -- it declines -----------------------------------------------------------------------------------


def twice(function):
    """What is rounded is read beside."""

    def forward(s, x, r):
        y = function(s, x, r)
        q, scale = rounded(y)
        return q, scale, y + 1

    return forward


def plain(function):
    return lambda s, x, r: rounded(function(s, x, r))


DECLINED = [
    (twice(layer), "the intermediate aten.layer_norm is also read by aten.add.Tensor"),
    (
        twice(lambda s, x, r: torch.ops.fxaccel.add_layer_norm(x, r, s.w, None, 1e-6)[0]),
        "the intermediate operator.getitem is also read by aten.add.Tensor",
    ),
    (
        twice(lambda s, x, r: F.silu(x) * r),
        "the intermediate aten.mul.Tensor is also read by aten.add.Tensor",
    ),
    (
        lambda s, x, r: (*rounded(F.silu(x) * r), F.silu(x) + 1),
        "the intermediate aten.silu is also read by aten.add.Tensor",
    ),
    (
        lambda s, x, r: (*rounded(layer(s, x, r)), *rounded(layer(s, x, r), torch.float8_e4m3fn)),
        "the intermediate aten.layer_norm is also read by fxaccel.quantize_rows",
    ),
    (
        twice(lambda s, x, r: torch.ops.fxaccel.glu(x, r, "silu")),
        "the intermediate fxaccel.glu is also read by aten.add.Tensor",
    ),
    (
        plain(lambda s, x, r: F.rms_norm(x, [WIDTH], s.w, 1e-5)),
        "it is PyTorch's rms_norm, which rounds at other steps than ours",
    ),
    (
        plain(lambda s, x, r: F.layer_norm(x, [3, WIDTH])),
        f"it normalises over [3, {WIDTH}]; the kernel takes the last dimension, {WIDTH}",
    ),
    (
        plain(lambda s, x, r: F.silu(x) * 1.5),
        "the activation is multiplied by the number 1.5, not by a tensor",
    ),
    (plain(lambda s, x, r: F.silu(x) * r[0]), "the kernel does not broadcast"),
    (
        plain(lambda s, x, r: F.silu(x[:, :1]) * r),
        "which are not known to be equal",
    ),
    (plain(lambda s, x, r: F.silu(x) * r.double()), "dtypes differ: gate is torch.float32, up torch.float64"),
]


@pytest.mark.parametrize(("function", "why"), DECLINED, ids=[str(i) for i in range(len(DECLINED))])
def test_declines_and_says_why(function, why):
    model = Site(function).eval()
    fast = accelerated(model, X, R)
    record = fast.report()["fuse-quantize"]
    assert any(why in s.why for s in record.refused), fast.report()
    assert record.applied == []
    with torch.no_grad():
        same(fast(X, R), model(X, R))


def test_an_activation_times_itself_stays():
    """The canonical form writes it as a power; an earlier pass may not."""
    fast = accelerated(Site(plain(lambda s, x, r: F.relu(x) * r)).eval(), X, R, passes=[])
    program = session(fast).all[0].program.copy()
    (mul,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    gate = mul.args[0]
    mul.args = (gate, gate)
    (record,) = manager.run(program, [FuseQuantize()]).report.passes
    assert [s.why for s in record.refused] == ["the activation is multiplied by itself"]
    assert (record.applied, record.error) == ([], "")


def test_it_serves_inference_alone():
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fast = fxaccel.accelerate(model, passes=["fuse-quantize"], example_inputs=(X,))
    assert "serves inference only" in fast.report()["fuse-quantize"].error


# -- values agree ----------------------------------------------------------------------------------


MODULES = {"rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5), "layer": lambda: nn.LayerNorm(WIDTH)}
BLOCKS = list(
    itertools.product(MODULES, (F.silu, F.gelu, F.relu), (torch.float32, torch.bfloat16), ("int8", "float8"))
)
COVERING = (BLOCKS[0], BLOCKS[7], BLOCKS[9], BLOCKS[14], BLOCKS[16], BLOCKS[23])  # each of all, in few


@pytest.mark.parametrize(
    ("norm", "activation", "dtype", "codes"),
    [pytest.param(*b, marks=[] if b in COVERING else pytest.mark.slow) for b in BLOCKS],
)
def test_a_quantized_block_computes_the_same_bits(norm, activation, dtype, codes):
    model = Block(MODULES[norm], activation).eval().to(dtype)
    before, after = (
        quantized(model, *more, inputs=f"dynamic-{codes}", weights=codes, dtype=dtype)
        for more in ((), ("fuse-quantize",))
    )
    assert len(after.report()["fuse-quantize"].applied) == 3
    assert after.verify().ok
    with torch.no_grad():
        for (x,) in calls(3, dtype, seed=7):
            assert torch.equal(before(x), after(x))


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    fast = quantized(Block().eval(), "fuse-quantize")
    run = manager.run(session(fast).all[0].program, [FuseQuantize()])
    (record,) = run.report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
    assert quantize_rows.op in {n.target for n in run.program.graph.nodes}


def test_it_needs_no_other_pass_to_have_run_before_in_the_process():
    script = (
        "import torch, fxaccel\n"
        "fast = fxaccel.accelerate(torch.nn.LayerNorm(8).eval(), ['fuse-quantize'], check=False)\n"
        "with torch.no_grad():\n    fast(torch.randn(2, 8))\n"
        "assert not fast.report()['fuse-quantize'].error, fast.report()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
