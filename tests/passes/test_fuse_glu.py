"""fuse-glu: what it rewrites, what it leaves alone and why, and that values survive."""

import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.listing import listing
from fxaccel.passes import FuseGLU
from tests.helpers import Function, saved_bytes, session, targets

F = nn.functional
WIDTH, INNER = 8, 12
X, R = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)


class MLP(nn.Module):
    """As Llama's."""

    def __init__(self, activation=F.silu):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down, self.activation = nn.Linear(INNER, WIDTH, bias=False), activation

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    """Gate and up of one linear, one way or the other."""

    def __init__(self, parts, activation=F.silu):
        super().__init__()
        torch.manual_seed(0)
        self.both, self.down = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)
        self.parts, self.activation = parts, activation

    def forward(self, x):
        gate, up = self.parts(self.both(x))
        return self.down(up * self.activation(gate))


def accelerated(model, *args, grad=False, passes=("fuse-glu",)):
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        return fxaccel.accelerate(model, passes=list(passes), example_inputs=args)


def text(fast):
    lines = listing(session(fast).all[0].program).splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines]


def differentiated(model, *args):
    """The result and every gradient."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    y = model(*leaves)
    return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *model.parameters()])]


# -- it fires --------------------------------------------------------------------------------------


def test_an_mlp_of_llama():
    fast = accelerated(MLP(), X)
    assert text(fast) == [
        "%linear = aten.linear(%x, %p_gate_weight)",
        "%linear_1 = aten.linear(%x, %p_up_weight)",
        "%mul = fxaccel.glu(%linear, %linear_1, 'silu')",
        "%linear_2 = aten.linear(%mul, %p_down_weight)",
    ]
    (site,) = fast.report()["fuse-glu"].applied
    assert site.why == "SwiGLU"
    assert site.proof


SPELLINGS = {
    "silu": (lambda x, r: F.silu(x) * r, "(%x, %r, 'silu')"),
    "written silu": (lambda x, r: x * torch.sigmoid(x) * r, "(%x, %r, 'silu')"),
    "up first": (lambda x, r: r * F.silu(x), "(%x, %r, 'silu')"),
    "gelu": (lambda x, r: F.gelu(x) * r, "(%x, %r, 'gelu')"),
    "tanh": (lambda x, r: r * F.gelu(x, approximate="tanh"), "(%x, %r, 'gelu_tanh')"),
    "relu": (lambda x, r: torch.relu(x).mul(r), "(%x, %r, 'relu')"),
    "in place": (lambda x, r: torch.relu(x).mul_(r), "(%x, %r, 'relu')"),
    "sigmoid": (lambda x, r: torch.sigmoid(x) * r, "(%x, %r, 'sigmoid')"),
    "two activations": (lambda x, r: torch.sigmoid(x) * torch.tanh(r), "(%x, %tanh, 'sigmoid')"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_kernel_of_the_same_bits(name, dtype):
    function, arguments = SPELLINGS[name]
    x, r = X.to(dtype), R.to(dtype)
    model = Function(lambda x, r: function(x, r) + 1)  # an output may not share storage
    plain, fast = accelerated(model, x, r, passes=[]), accelerated(model, x, r)
    glus = [line.partition("fxaccel.glu")[2] for line in text(fast) if "fxaccel.glu" in line]
    glus = [line.replace("%args", "%x").replace("%arg1", "%r") for line in glus]
    assert glus == [arguments], text(fast)
    assert not {"aten.mul.Tensor", "aten.sigmoid.default", "aten.silu.default"} & set(
        targets(session(fast).all[0].program)
    )
    with torch.no_grad():
        for shape in ((2, 3, WIDTH), (5, 1, WIDTH)):
            x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
            assert torch.equal(fast(x, r), plain(x, r))
            torch.testing.assert_close(fast(x, r), model(x, r))


PARTS = {
    "chunk": lambda y: y.chunk(2, -1),
    "chunk, up first": lambda y: y.chunk(2, -1)[::-1],
    "split": lambda y: y.split(INNER, -1),
    "slices": lambda y: (y[..., :INNER], y[..., INNER:]),
    "every other": lambda y: (y[..., ::2], y[..., 1::2]),
    "unflatten": lambda y: y.unflatten(-1, (2, INNER)).unbind(-2),
}


@pytest.mark.parametrize("name", PARTS)
def test_halves_of_one_result_are_read_where_they_lie(name):
    model = Packed(PARTS[name])
    fast = accelerated(model, X)
    assert len(fast.report()["fuse-glu"].applied) == 1
    assert "aten.clone.default" not in targets(session(fast).all[0].program)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_glu_of_torch():
    model = nn.Sequential(nn.Linear(WIDTH, 2 * INNER), nn.GLU(), nn.Linear(INNER, 2))
    fast = accelerated(model, X)
    assert text(fast)[1:3] == [
        "%getitem_1, %getitem = aten.split.Tensor(%linear, 12, 2)",
        "%mul = fxaccel.glu(%getitem, %getitem_1, 'sigmoid')",
    ]
    assert fast.report()["fuse-glu"].applied[0].why == "GLU"
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_after_merge_linears_it_reads_halves():
    fast = accelerated(MLP(), X, passes=["fuse-glu", "merge-linears{even_if_slower=true}"])
    assert text(fast)[1:] == [
        "%linear_default = aten.linear(%x, %cat_default)",
        "%linear, %linear_1 = aten.split.Tensor(%linear_default, 12, 2)",
        "%mul = fxaccel.glu(%linear, %linear_1, 'silu')",
        "%linear_2 = aten.linear(%mul, %p_down_weight)",
    ]
    with torch.no_grad():
        torch.testing.assert_close(fast(X), MLP()(X))


def test_it_is_a_default_pass():
    fast = fxaccel.accelerate(MLP(), example_inputs=(X,), measure=False)
    assert len(fast.report()["fuse-glu"].applied) == 1


# -- it declines -----------------------------------------------------------------------------------

DECLINED = {
    "number": (lambda x, r: F.silu(x) * 1.5,
               "the activation is multiplied by the number 1.5, not by a tensor"),
    "one value": (lambda x, r: F.silu(x) * x, "gate and up are one value, which makes an activation of it"),
    "quick gelu": (lambda x, r: x * torch.sigmoid(1.702 * x),
                   "it is x * sigmoid(1.702 x), an activation of one value as quick-gelu is"),
    "broadcast": (lambda x, r: F.silu(x) * r[0], "the kernel does not broadcast"),
    "broadcast gate": (lambda x, r: torch.sigmoid(x.mean(-1, keepdim=True)) * r,
                       "which are not known to be equal"),
    "dtypes": (lambda x, r: F.silu(x) * r.double(), "dtypes differ: gate is torch.float32, up torch.float64"),
    "no dimension": (lambda x, r: F.silu(x.mean()) * r.mean(), "gate has no dimension"),
    "complex": (lambda x, r: torch.sigmoid(torch.complex(x, r)) * torch.complex(r, x),
                "dtype torch.complex64 is not one of"),
    "read": (lambda x, r: (F.silu(x) * r) + F.silu(x), "the intermediate aten.silu is also read by aten.add"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declines_and_says_why(name):
    function, why = DECLINED[name]
    model = Function(lambda x, r: function(x, r) + 1)
    fast = accelerated(model, X, R)
    record = fast.report()["fuse-glu"]
    assert any(why in s.why for s in record.refused), record
    assert (record.applied, record.error) == ([], "")
    with torch.no_grad():
        torch.testing.assert_close(fast(X, R), model(X, R))


def test_an_activation_times_itself_stays():
    """The canonical form writes it as a power; an earlier pass may not."""
    fast = accelerated(Function(lambda x, r: F.relu(x) * r + 1), X, R, passes=[])
    program = session(fast).all[0].program.copy()
    (mul,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
    mul.args = (mul.args[0], mul.args[0])
    (record,) = manager.run(program, [FuseGLU()]).report.passes
    assert ["gate and up are one value" in s.why for s in record.refused] == [True]
    assert (record.applied, record.error) == ([], "")


@pytest.mark.parametrize("look_alike", [lambda x, r: F.mish(x) * r, lambda x, r: F.softplus(x) * r,
                                        lambda x, r: F.silu(x) + r, lambda x, r: F.silu(x * r)])  # fmt: skip
def test_other_activations_are_no_sites(look_alike):
    record = accelerated(Function(lambda x, r: look_alike(x, r) + 1), X, R).report()["fuse-glu"]
    assert (record.applied, record.refused) == ([], [])


# -- values agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.sigmoid])
def test_training_is_the_models_bit_for_bit(activation, dtype):
    """On the CPU: results, gradients, and the bytes that are kept for them."""
    for model in (MLP(activation), Packed(PARTS["chunk"], activation)):
        model, x = model.to(dtype), X.to(dtype)
        fast = accelerated(model, x, grad=True)
        assert len(fast.report()["fuse-glu"].applied) == 1
        for shape in ((2, 3, WIDTH), (1, 7, WIDTH)):
            x = torch.randn(shape).to(dtype)
            for got, want in zip(*(differentiated(m, x) for m in (fast, model)), strict=True):
                assert torch.equal(got, want)
        assert saved_bytes(fast, x.requires_grad_()) == saved_bytes(model, x)


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    fast = accelerated(MLP(), X)
    (record,) = manager.run(session(fast).all[0].program, [FuseGLU()]).report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
