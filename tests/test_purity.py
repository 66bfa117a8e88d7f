"""Nothing that belongs to someone else is touched: not the model, not torch, whatever happens."""

import copy
import random
import sys

import numpy
import pytest
import torch
import torch.nn.functional
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError

F = nn.functional
NAMESPACES = (
    torch,
    torch.nn,
    torch.nn.functional,
    torch.Tensor,
    torch.nn.Module,
    torch.autograd,
    torch.random,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.body = (
            nn.BatchNorm1d(6),
            nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.5)),
        )
        self.head = nn.Linear(6, 6)
        self.head.weight = self.body[0].weight
        self.register_buffer("calls", torch.zeros(()))
        self.config = {"a": [1, 2]}
        self.body[0].bias.requires_grad_(False)
        self.body.register_forward_hook(lambda m, a, out: out * 1.0)
        self.register_forward_pre_hook(lambda m, a: None)
        self.norm.eval()

    def forward(self, x):
        self.calls += 1
        random.random(), numpy.random.rand()
        self.seen = x.shape
        return F.relu(self.head(self.body(self.norm(x))))


def everything(model):
    """All there is to know of a model: identities, values, flags, tables and attributes."""
    facts = {}
    for name, module in model.named_modules(remove_duplicate=False):
        facts[name] = (id(module), type(module), module.training)
        for key, value in module.__dict__.items():
            if isinstance(value, dict):
                facts[name, key] = [(k, id(v)) for k, v in value.items()]
            else:
                facts[name, key] = (id(value), repr(value))
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        facts["tensor", name] = (
            id(tensor),
            tensor.data_ptr(),
            tensor.requires_grad,
            tensor.dtype,
            tensor.stride(),
            None if tensor.grad is None else id(tensor.grad),
            tensor._backward_hooks,
            tensor.detach().numpy().tobytes(),
        )
    facts["config"] = copy.deepcopy(model.config)
    return facts


class Wrong(fxaccel.Rule):
    name = "wrong"

    def pattern(self, op, x):
        return op.aten.relu.default(x)

    def rewrite(self, op, m):
        return op.aten.clamp.default(m.x, 0.01)


class Raises(fxaccel.Pass):
    name = "raises"

    def apply(self, program, plan, driver):
        for node in list(program.graph.nodes):
            node.meta.clear()
        raise RuntimeError("half way")


def capture_fails(model, x):
    broken = copy.copy(model)
    broken.forward = lambda x: {}[x]
    with pytest.raises((CaptureError, KeyError)):
        fxaccel.accelerate(broken)(x)


def unproved(model, x, **options):
    with pytest.raises(fxaccel.ProofError):
        fxaccel.accelerate(model, example_inputs=(x,), **options)


CASES = {
    "default passes": lambda m, x: fxaccel.accelerate(m, example_inputs=(x,)),
    "without a check": lambda m, x: fxaccel.accelerate(m, check=False, example_inputs=(x,)),
    "a wrong rule": lambda m, x: fxaccel.accelerate(m, passes=[Wrong], example_inputs=(x,)),
    "a pass that raises": lambda m, x: fxaccel.accelerate(m, passes=[Raises], example_inputs=(x,)),
    "strict": lambda m, x: unproved(m, x, passes=[Wrong], strict=True),
    "unmet expectation": lambda m, x: unproved(m, x, passes=["fuse-norm"], expect={"fuse-norm": 9}),
    "a failing capture": capture_fails,
}


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_bit_identical_afterwards(case, training):
    model, x = Model(), torch.randn(4, 6)
    model.train(training).norm.eval()
    before, state, given = everything(model), torch.get_rng_state(), x.clone()
    drawn = random.getstate(), numpy.random.get_state()[1].tobytes()
    CASES[case](model, x)
    after = everything(model)
    assert {k for k in before if before[k] != after.get(k)} == set()
    assert set(after) == set(before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (random.getstate(), numpy.random.get_state()[1].tobytes()) == drawn
    assert torch.equal(x, given)
    assert x.grad is None


def test_a_call_of_the_result_moves_only_what_the_model_itself_would_move():
    model, x = Model(), torch.randn(4, 6)
    fast = fxaccel.accelerate(model)
    before = everything(model)
    fast(x)
    changed = {k for k, v in everything(model).items() if before.get(k) != v}
    assert changed == {("tensor", "calls")}
    assert model.calls == 1


def test_a_deepcopy_of_the_result_shares_nothing_with_the_model():
    model, x = Model(), torch.randn(4, 6)
    fast = fxaccel.accelerate(model, example_inputs=(x,))
    before = everything(model)
    twin = copy.deepcopy(fast)
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    twin(x).sum().backward()
    optimizer.step()
    assert everything(model) == before


class Keeps(nn.Module):
    """Its forward keeps results in containers, and its layers also stand in a list."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.seen, self.log, self.also = {"old": {}}, [], [[self.norm]]
        self.also[0][0].register_buffer("last", torch.zeros(6))

    def forward(self, x):
        if "table" not in self.seen["old"]:
            self.seen["old"]["table"] = self.weight.tril()
        self.log.append(x)
        (norm,) = self.also[0]
        norm.last = x[0].detach() * 1.0
        return norm(x @ self.seen["old"]["table"])


def test_containers_that_the_forward_writes_to_are_not_the_models():
    model, x = Keeps(), torch.randn(4, 6)
    fast = fxaccel.accelerate(model, example_inputs=(x,))
    assert (model.seen, model.log) == ({"old": {}}, [])
    assert not model.norm.last.any()
    assert model.norm.num_batches_tracked == 0
    assert fast.also[0][0] is fast.norm
    with torch.no_grad():
        model.weight.mul_(2)  # what the forward keeps in its table is no part of the graph
    torch.testing.assert_close(fast(x), Keeps.forward(copy.deepcopy(model), x))


@pytest.mark.filterwarnings("ignore:pass")
def test_the_namespaces_of_torch_are_as_they_were():
    def snapshot():
        return {n.__name__: {k: id(v) for k, v in vars(n).items()} for n in NAMESPACES}

    model, x = Model(), torch.randn(4, 6)
    fxaccel.accelerate(model, example_inputs=(x,))  # torch imports parts of itself at its first export
    before, modes = snapshot(), torch.overrides._get_current_function_mode_stack()
    for case in CASES.values():
        case(Model(), x)
    fast = fxaccel.accelerate(Model(), passes=["fuse-norm", "fuse-attention"])
    fast(x).sum().backward()
    fast.verify(), fast.code, str(fast.diff()), str(fast.report())
    after = snapshot()
    for name in before:
        changed = {
            k for k in before[name].keys() | after[name].keys() if before[name].get(k) != after[name].get(k)
        }
        assert not changed, f"{name}: {sorted(changed)}"
    assert torch.overrides._get_current_function_mode_stack() == modes
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_classes_of_the_user_are_as_they_were():
    before = {cls: dict(vars(cls)) for cls in (Model, nn.Linear, nn.LayerNorm, nn.Sequential, nn.Module)}
    fast = fxaccel.accelerate(Model(), example_inputs=(torch.randn(4, 6),))
    assert {cls: dict(vars(cls)) for cls in before} == before
    assert type(fast) is not Model
    assert "AcceleratedModel" not in vars(sys.modules[__name__])
