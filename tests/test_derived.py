"""Values that passes compute from parameters alone: once in inference, anew when a parameter changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.capture import capture
from fxaccel.derived import derived
from fxaccel.ir import is_call
from tests.helpers import session

aten = torch.ops.aten


class CentreWeights(fxaccel.Rule):
    """linear(x, w) becomes the linear with the mean over its outputs taken from w, and added again."""

    name = "centre-weights-for-test"

    def pattern(self, op, x, w):
        return op.aten.linear.default(x, w)

    def refuse(self, m):
        if m.w.op != "placeholder":
            yield "the weight is computed"

    def rewrite(self, op, m):
        mean = op.aten.mean.dim(m.w, [0], True)
        centred = op.aten.sub.Tensor(m.w, mean)
        return op.aten.add.Tensor(op.aten.linear.default(m.x, centred), op.aten.linear.default(m.x, mean))


def built(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 5, bias=False)).eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        fast = fxaccel.accelerate(model, passes=[CentreWeights], example_inputs=(x,), **options)
    return model, fast, x


def agree(model, fast, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **kwargs or {})


def called(fast, x):
    with torch.no_grad(), Calls() as calls:
        fast(x)
    return calls.names


def test_they_are_computed_once_where_no_gradient_flows_and_at_each_call_elsewhere():
    model, fast, x = built()
    agree(model, fast, x)
    assert not {"mean", "sub"} & set(called(fast, x))
    assert "4 values of 0.000" in str(fast.report())
    assert "computed from parameters once" in str(fast.report())
    fast(x).sum().backward()
    want = model(x).sum()
    torch.testing.assert_close(fast[0].weight.grad, torch.autograd.grad(want, model[0].weight)[0])
    assert "derive" not in session(fast).all[1].source  # the one with gradients
    assert "derive" in session(fast).all[0].source


def write(fast):
    with torch.no_grad():
        fast[0].weight.mul_(3)


def exchange(fast):
    fast[0].weight = nn.Parameter(torch.randn(4, 6))


def move(fast):
    fast[0].weight.data = torch.randn(4, 6)


def load(fast):
    fast.load_state_dict({k: torch.randn_like(v) for k, v in fast.state_dict().items()})


def step(fast):
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    fast(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [write, exchange, move, load, step])
def test_a_change_of_a_parameter_is_seen_at_the_next_call(change):
    model, fast, x = built()
    agree(model, fast, x)
    before = fast(x)
    change(fast)
    model.load_state_dict(fast.state_dict())
    agree(model, fast, x)
    assert not torch.allclose(fast(x), before)
    called(fast, x)
    assert "sub" not in called(fast, x)


def test_parameters_that_count_no_writes_are_read_at_each_call():
    model, fast, x = built()
    with torch.inference_mode():
        fast[0].weight = model[0].weight = nn.Parameter(torch.randn(4, 6))
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
            model[0].weight.mul_(2)


def test_other_casts_and_copies_have_their_own():
    model, fast, x = built()
    double = copy.deepcopy(fast).double()
    agree(copy.deepcopy(model).double(), double, x.double())
    with torch.no_grad():
        double[0].weight.mul_(2)
    agree(model, fast, x)
    agree(model, pickle.loads(pickle.dumps(fast)), x)


def test_a_saved_model_computes_them_itself(tmp_path):
    model, fast, x = built()
    fast.save(tmp_path / "m.fxa")
    again = fxaccel.load(tmp_path / "m.fxa")
    agree(model, again, x)
    assert "sub" not in called(again, x)


def test_functional_calls_and_vmap_over_parameters_see_theirs():
    model, fast, x = built()
    stacked = {n: torch.stack([p, 2 * p]).detach() for n, p in fast.named_parameters()}

    def call(m):
        return lambda parameters: torch.func.functional_call(m, parameters, (x,))

    with torch.no_grad():
        for i in range(2):
            one = {n: t[i] for n, t in stacked.items()}
            torch.testing.assert_close(call(fast)(one), call(model)(one))
        torch.testing.assert_close(torch.vmap(call(fast))(stacked), torch.vmap(call(model))(stacked))
    agree(model, fast, x)


def test_exported_and_compiled_they_are_part_of_the_graph():
    model, fast, x = built()
    with torch.no_grad():
        exported = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))
        compiled = torch.compile(fast, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
        fast[0].weight.mul_(2)
        model.load_state_dict(fast.state_dict())
        torch.testing.assert_close(compiled(x), model(x))


class Shown(nn.Module):
    """Returns a value that follows from a parameter, for the caller to write to."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4, bias=False)

    def forward(self, x):
        return self.linear(x), self.linear.weight.sigmoid()


class SigmoidByTanh(fxaccel.Rule):
    """sigmoid(x) becomes (tanh(x / 2) + 1) / 2."""

    name = "sigmoid-by-tanh-for-test"

    def pattern(self, op, x):
        return op.aten.sigmoid.default(x)

    def rewrite(self, op, m):
        tanh = op.aten.tanh.default(op.aten.mul.Tensor(m.x, 0.5))
        return op.aten.mul.Tensor(op.aten.add.Tensor(tanh, 1.0), 0.5)


def test_what_the_caller_gets_is_never_kept():
    model, x = Shown(), torch.randn(2, 3)
    with torch.no_grad():
        fast = fxaccel.accelerate(model, passes=[SigmoidByTanh], example_inputs=(x,))
        fast(x)[1].zero_()
        torch.testing.assert_close(fast(x)[1], model(x)[1])


class Counter(nn.Module):
    """A buffer that each call changes, and a value that follows from it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x):
        self.count.add_(1)
        return x * self.count.sigmoid()


def test_what_the_graph_itself_writes_is_never_kept():
    with torch.no_grad():
        program = capture(Counter(), (torch.randn(3),), {})
    sigmoid = next(n for n in program.graph.nodes if is_call(n, aten.sigmoid.default))
    sigmoid.meta["by"] = "a pass"
    assert derived(program) == ([], [])
