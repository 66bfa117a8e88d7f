"""fuse-activation: what it rewrites, what it leaves alone and why, and that values survive."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxaccel
from fxaccel import manager
from fxaccel.ir import is_tensor
from fxaccel.listing import listing
from fxaccel.passes import FuseActivation
from fxaccel.passes._activations import NAMES
from fxaccel.passes.fuse_activation import BiasActivation, OneActivation
from tests.helpers import Function, Method, session, targets, thinned

F = nn.functional
aten = torch.ops.aten
WIDTH, INNER = 8, 12
X, R, B = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH), torch.randn(WIDTH)
ALL = "fuse-activation{even_if_slower=true}"


class Layer(nn.Module):
    """An activation behind a linear, which is used by a second one."""

    def __init__(self, activation, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, INNER, bias=bias), nn.Linear(INNER, WIDTH)
        self.activation = activation

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


def accelerated(model, *args, grad=False, passes=(ALL,)):
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


SPELLINGS = {
    "silu": (F.silu, lambda x: x * torch.sigmoid(x), lambda x: x / (1 + torch.exp(-x))),
    "gelu": (F.gelu, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), lambda x: (
        0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))))),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.sigmoid(x * 1.702).mul(x)),
    "relu": (torch.relu, nn.ReLU(), nn.ReLU(inplace=True)),
    "relu_squared": (lambda x: F.relu(x).square(), lambda x: F.relu(x) ** 2, lambda x: (r := F.relu(x)) * r),
    "tanh": (torch.tanh, nn.Tanh()),
    "sigmoid": (torch.sigmoid, nn.Sigmoid()),
    "mish": (F.mish, lambda x: x * torch.tanh(F.softplus(x))),
    "hardswish": (F.hardswish, nn.Hardswish()),
}  # fmt: skip


# -- it fires --------------------------------------------------------------------------------------


def test_behind_the_bias_of_a_linear():
    fast = accelerated(Layer(F.gelu), X)
    assert text(fast) == [
        "%linear_default = aten.linear(%x, %p_up_weight)",
        "%gelu = fxaccel.bias_activation(%linear_default, %p_up_bias, 'gelu')",
        "%linear_1 = aten.linear(%gelu, %p_down_weight, %p_down_bias)",
    ]
    (site,) = fast.report()["fuse-activation"].applied
    assert site.why == "gelu behind the bias of a linear"
    assert site.proof


def test_of_a_sum():
    fast = accelerated(Function(lambda x, b: torch.tanh(b + x) + 1), X, B, passes=["fuse-activation"])
    first, x, b = text(fast)[0].replace("(", ", ").split(", ")[:3]
    assert text(fast)[0] == f"{first}({x}, {b}, 'tanh')"
    assert first == "%tanh = fxaccel.bias_activation"
    assert fast.report()["fuse-activation"].applied[0].why == "tanh of a sum"


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_is_one_kernel_of_the_same_bits(name):
    for spelling in SPELLINGS[name]:
        model = Function(lambda x, b, f=spelling: f(x + b) + 1)  # an output may not share storage
        plain, fast = (accelerated(model, X, B, passes=p) for p in ([], ["fuse-activation"]))
        assert targets(session(fast).all[0].program) == ["fxaccel.bias_activation.default", "aten.add.Tensor"]
        with torch.no_grad():
            x, b = torch.randn(5, 1, WIDTH), torch.randn(WIDTH)
            assert torch.equal(fast(x, b), plain(x, b))
            torch.testing.assert_close(fast(x, b), model(x, b))


@pytest.mark.parametrize("name", ["quick_gelu", "relu_squared"])
def test_what_is_several_operators_is_one_behind_anything(name):
    for before in (lambda x: x, lambda x: x + R):
        model = Function(lambda x, before=before: SPELLINGS[name][0](before(x)) + 1)
        fast = accelerated(model, X, passes=["fuse-activation"])
        (site,) = fast.report()["fuse-activation"].applied
        assert site.why == name
        with torch.no_grad():
            assert torch.equal(fast(X), model(X))


def test_in_the_product_of_a_linear():
    model = Layer(SPELLINGS["gelu_tanh"][0])
    fast = accelerated(model, X, passes=["fuse-activation"])
    assert text(fast)[0] == ("%gelu = fxaccel.linear_activation(%x, %p_up_weight, %p_up_bias, 'gelu_tanh')")
    assert fast.report()["fuse-activation"].applied[0].why == "gelu_tanh in the product of a linear"
    x = torch.randn(2, 2**25 // (WIDTH * INNER) // 2 + 1, WIDTH)  # as many as oneDNN takes
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
        assert torch.equal(fast(X), model(X))
    again = manager.run(session(fast).all[0].program, [FuseActivation()]).report.passes[0]
    assert (again.applied, again.refused, again.error) == ([], [], "")


def test_no_product_of_a_linear_where_it_is_another():
    model, why = (
        Layer(SPELLINGS["gelu_tanh"][0]),
        "its product in one call with the activation has no gradients",
    )
    trained = accelerated(model, X, grad=True, passes=["fuse-activation"]).report()["fuse-activation"]
    assert [s.why for s in trained.refused] == [why, SLOWER]
    with torch.autocast("cpu", torch.bfloat16):
        cast = accelerated(model, X, passes=["fuse-activation"]).report()["fuse-activation"]
    assert "the result is torch.bfloat16: autocast rounds what is multiplied" in cast.refused[0].why
    gated = Method(lambda self, x: F.gelu(self.up(x), approximate="tanh") * x, up=nn.Linear(WIDTH, WIDTH))
    gate = accelerated(gated, X, passes=["fuse-activation"]).report()["fuse-activation"]
    assert gate.refused[0].why == DECLINED["gate"][1]


class Gated(nn.Module):
    """A gate with a bias, and up."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)

    def forward(self, x):
        return F.silu(self.gate(x)) * self.up(x)


@pytest.mark.parametrize("order", [1, -1])
def test_gates_are_left_to_fuse_glu_in_either_order(order):
    fast = accelerated(Gated(), X, passes=["fuse-glu", ALL][::order])
    assert len(fast.report()["fuse-glu"].applied) == 1
    assert not fast.report()["fuse-activation"].applied


def test_with_passes_that_change_the_linear():
    for one in ("merge-linears{even_if_slower=true}", "pack-weights",
                "quantize{weights=int8,even_if_slower=true}"):  # fmt: skip
        model = Layer(lambda x: x * torch.sigmoid(1.702 * x)).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fast = fxaccel.accelerate(
                model, [one, "fuse-activation"], example_inputs=(X,), allow="lower_precision"
            )
            alone = fxaccel.accelerate(model, [one], example_inputs=(X,), allow="lower_precision")
            assert len(fast.report()["fuse-activation"].applied) == 1, one
            assert torch.equal(fast(X), alone(X))


# -- it declines -----------------------------------------------------------------------------------

SLOWER = "on the CPU the product adds the bias, and to write over its result saves no time"
DECLINED = {
    "no bias": (Layer(F.gelu, bias=False), "the linear has no bias"),
    "number": (Function(lambda x: torch.relu(x + 1.5) * 2), "what is added is the number 1.5"),
    "residual": (Function(lambda x: torch.relu(x + R) * 2), "the kernel adds one row to x"),
    "part": (Function(lambda x: (r := torch.relu(x + B)) ** 2 + r), "it is a part of relu_squared"),
    "gate": (Function(lambda x: F.silu(x + B) * torch.sin(x)),
             "it gates a product, of which fuse-glu makes one kernel"),
    "dtypes": (Function(lambda x: torch.relu(x + B.double()) * 2), "dtypes differ: x is torch.float32, b"),
    "broadcast": (Function(lambda x: torch.relu(x.mean(-1, keepdim=True) + x[0, 0]) * 2),
                  "which are not known to be equal"),
    "read": (Function(lambda x: (y := x + B).relu() * y.sin()),
             "the intermediate aten.add.Tensor is also read"),
    "complex": (Function(lambda x: torch.view_as_real(
        torch.complex(x, x) * torch.sigmoid(1.702 * torch.complex(x, x)))),
        "dtype torch.complex64 is not one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declines_and_says_why(name):
    model, why = DECLINED[name]
    fast = accelerated(model, X)
    record = fast.report()["fuse-activation"]
    assert any(why in s.why for s in record.refused), record
    assert (record.applied, record.error) == ([], "")
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X))


def test_declines_where_nothing_is_gained():
    quick = SPELLINGS["quick_gelu"][0]
    for grad in (False, True):
        (site,) = (
            accelerated(Layer(F.gelu), X, grad=grad, passes=["fuse-activation"])
            .report()["fuse-activation"]
            .refused
        )
        assert site.why == SLOWER
    for model in (Function(lambda x: torch.relu(x + B) * 2), Function(lambda x: quick(x) * 2)):
        fast = accelerated(model, X.clone().requires_grad_(), grad=True, passes=["fuse-activation"])
        (site,) = fast.report()["fuse-activation"].refused
        assert site.why == "with gradients the CPU runs torch's own operators, and would after this rewrite"


@pytest.mark.parametrize("name", ["relu", "quick_gelu"])
def test_declines_in_half_precision(name):
    model = Function(lambda x: SPELLINGS[name][0](x + B.to(x.dtype)) * 2)
    record = accelerated(model, X.bfloat16(), passes=["fuse-activation"]).report()["fuse-activation"]
    assert not record.applied
    why = "on the CPU torch.bfloat16 takes its time in casts, and an allocation less saves none"
    assert {s.why for s in record.refused} == {why}


def on_cuda(fast):
    """The captured program, its values said to lie on a GPU."""
    program = session(fast).all[0].program.copy()
    with FakeTensorMode() as mode:
        for node in program.graph.nodes:
            val = node.meta.get("val")
            if is_tensor(val):
                node.meta["val"] = mode.from_tensor(torch.empty(2, dtype=val.dtype)).new_empty(
                    [int(s) if isinstance(s, int) else 5 for s in val.shape], device="cuda"
                )
    return program


def reasons(program, rule):
    """What is said against the site at the last call of a rule's operators; None where there is none."""
    search = rule().traced()
    roots = [n for n in program.graph.nodes if n.op == "call_function" and n.target in search.targets]
    found = search.find(program, roots[-1])
    return list(rule().refuse(found))


def test_on_a_gpu_it_is_worth_it():
    """The graph is made to say CUDA; what would be proved there is proved on the CPU above."""
    trained, inferred = (on_cuda(accelerated(Layer(F.gelu), X, grad=g, passes=[])) for g in (True, False))
    assert reasons(trained, BiasActivation) == []
    assert reasons(inferred, BiasActivation) == [
        "without gradients the product adds the bias, and all else is as much to read and write"
    ]
    quick = SPELLINGS["quick_gelu"][0]
    for grad in (True, False):
        assert reasons(on_cuda(accelerated(Layer(quick), X, grad=grad, passes=[])), OneActivation) == []
        of_sum = Function(lambda x, b: torch.relu(x + b) + 1)
        x = X.clone().requires_grad_(grad)
        assert reasons(on_cuda(accelerated(of_sum, x, B, grad=grad, passes=[])), BiasActivation) == []


@pytest.mark.parametrize("look_alike", [F.elu, F.softplus, lambda x: x * torch.sigmoid(1.7 * x),
                                        lambda x: torch.relu(x) ** 3, F.relu6])  # fmt: skip
def test_other_activations_are_no_sites(look_alike):
    record = accelerated(Function(lambda x: look_alike(x + R) * 2), X).report()["fuse-activation"]
    assert not record.applied
    assert all("the kernel adds one row" in s.why for s in record.refused)  # of the relu or sigmoid in it


# -- values agree ----------------------------------------------------------------------------------


@thinned(2, name=NAMES, dtype=[torch.float32, torch.bfloat16])
def test_values_and_gradients_agree(name, dtype):
    """With those of float64, but for what the model itself is off by in this dtype."""
    model, x = Layer(SPELLINGS[name][0]).to(dtype), X.to(dtype)
    fast = accelerated(model, x, grad=True)
    assert len(fast.report()["fuse-activation"].applied) == 1
    x = torch.randn(5, 7, WIDTH).to(dtype)
    got, want = differentiated(fast, x), differentiated(model, x)
    exact = differentiated(Layer(SPELLINGS[name][0]).to(dtype).double(), x.double())
    for ours, theirs, true in zip(got, want, exact, strict=True):
        error, own = ((t.double() - true).abs().max() for t in (ours, theirs))
        assert error <= 4 * own + 4 * torch.finfo(dtype).eps * true.abs().max()  # as a proof allows


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    fast = accelerated(Layer(F.gelu), X)
    (record,) = manager.run(session(fast).all[0].program, [FuseActivation()]).report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
