"""What `accelerate` returns is the model in everything but how its forward is computed."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fxaccel

F = nn.functional


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A small model with everything a module can hold."""

    threshold = 0.5

    def __init__(self, width=8):
        super().__init__()
        self.width = width
        self.config = {"width": width}
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("hidden", torch.ones(width), persistent=False)

    def forward(self, x: torch.Tensor, *, gain: float = 1.0) -> torch.Tensor:
        """Doubles as a docstring."""
        for block in self.blocks:
            x = block(x)
        return x * self.scale * gain + self.hidden

    def helper(self):
        return self.width * 2


def pair(**options):
    model = Net()
    return model, fxaccel.accelerate(model, **options), torch.randn(4, 8)


def captures(fast):
    return len(fast.report().captures)


def close(a, b):
    torch.testing.assert_close(a, b)


# -- it looks like the model -----------------------------------------------------------------------


def test_attributes_methods_class_and_signature_are_the_models():
    model, fast, _ = pair()
    assert isinstance(fast, Net)
    assert isinstance(fast, fxaccel.AcceleratedModule)
    assert (fast.width, fast.config, fast.threshold, fast.helper()) == (8, {"width": 8}, 0.5, 16)
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.forward.__doc__ == model.forward.__doc__
    assert type(fast.blocks[0]) is Block
    assert repr(fast).startswith("Accelerated(")
    assert fast.training == model.training
    with pytest.raises(AttributeError, match="nothing"):
        _ = fast.nothing


def test_names_of_parameters_buffers_and_modules_are_the_models():
    model, fast, _ = pair()
    for names in ("named_parameters", "named_buffers", "named_modules"):
        assert [n for n, _ in getattr(fast, names)()] == [n for n, _ in getattr(model, names)()]
    want, got = model.state_dict(), fast.state_dict()
    assert list(got) == list(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert list(fast.state_dict(prefix="a.")) == ["a." + k for k in want]


def test_parameters_are_shared_so_that_an_optimizer_built_before_moves_both():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = fxaccel.accelerate(model)
    x = torch.randn(4, 8)
    before = fast(x).detach()
    fast(x).square().sum().backward()
    assert all(a is b for a, b in zip(model.parameters(), fast.parameters(), strict=True))
    optimizer.step()
    assert not torch.equal(fast(x), before)
    close(fast(x), model(x))


def test_gradients_of_parameters_and_inputs_are_the_models():
    model, fast, x = pair()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(a).square().sum().backward()
    want = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    fast(b).square().sum().backward()
    close(a.grad, b.grad)
    for name, parameter in fast.named_parameters():
        close(parameter.grad, want[name])


def test_frozen_parameters_stay_frozen_and_without_gradient():
    model = Net()
    model.blocks[0].up.weight.requires_grad_(False)
    fast = fxaccel.accelerate(model)
    fast(torch.randn(4, 8)).sum().backward()
    assert not fast.blocks[0].up.weight.requires_grad
    assert {n for n, p in fast.named_parameters() if p.grad is None} == {"blocks.0.up.weight"}
    fast.blocks[0].up.weight.requires_grad_(True)
    fast.blocks[1].up.weight.requires_grad_(False)
    fast.zero_grad()
    fast(torch.randn(4, 8)).sum().backward()
    assert {n for n, p in fast.named_parameters() if p.grad is None} == {"blocks.1.up.weight"}


def test_second_derivatives_and_two_backwards():
    model, fast = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), None
    fast = fxaccel.accelerate(model, passes=[])
    x = torch.randn(3, 4, requires_grad=True)

    def penalty(m):
        (g,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(m.parameters()), allow_unused=True)

    for a, b in zip(penalty(model), penalty(fast), strict=True):
        close(a, b)
    out = fast(x).sum()
    out.backward(retain_graph=True)
    first = x.grad.clone()
    out.backward()
    close(x.grad, 2 * first)


# -- it follows the model's life -------------------------------------------------------------------


def test_loaded_weights_are_used():
    model, fast, x = pair()
    fast(x)
    other = Net()
    fast.load_state_dict(other.state_dict())
    close(fast(x), other(x))
    close(model(x), other(x))  # shared parameters
    third = Net()
    model.load_state_dict(third.state_dict())
    close(fast(x), third(x))
    fast.load_state_dict({k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    close(fast(x), other(x))


def test_a_wrong_state_dict_is_refused_as_torch_does():
    _, fast, _ = pair()
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict({})
    assert fast.load_state_dict({"more": torch.ones(1)}, strict=False).unexpected_keys == ["more"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_captured_anew(dtype):
    model, _, x = pair()
    model = copy.deepcopy(model)
    fast = fxaccel.accelerate(model)
    fast(x)
    fast = fast.to(dtype)
    want = copy.deepcopy(model).to(dtype)(x.to(dtype))
    got = fast(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_half_and_back_leaves_no_stale_capture():
    _, fast, x = pair()
    want = fast(x)
    fast.half().float()
    assert captures(fast) == 0
    torch.testing.assert_close(fast(x), want, rtol=1e-2, atol=1e-2)


def test_a_submodule_that_is_exchanged_is_used():
    _, fast, x = pair()
    fast(x)
    new = Block()
    fast.blocks[1] = new
    close(fast(x), fast.original()(x))
    fast.blocks[0].up = nn.Linear(8, 16, bias=False)
    close(fast(x), fast.original()(x))
    fast.blocks = nn.ModuleList([new])
    close(fast(x), fast.original()(x))
    fast.extra = nn.Linear(2, 2)
    close(fast(x), fast.original()(x))


def test_a_parameter_or_buffer_that_is_exchanged_is_used():
    _, fast, x = pair()
    fast(x)
    fast.blocks[0].up.weight = nn.Parameter(torch.zeros(16, 8))
    fast.scale = torch.tensor(5.0)
    fast.hidden = torch.zeros(8)
    close(fast(x), fast.original()(x))


def test_the_original_and_a_second_accelerated_module_are_independent_in_structure():
    model, fast, x = pair()
    other = fxaccel.accelerate(model, passes=[])
    fast.blocks[0] = nn.Identity()
    close(other(x), model(x))
    assert isinstance(model.blocks[0], Block)
    again = fxaccel.accelerate(fast)
    assert type(again)._original_class is Net
    close(again(x), fast(x))
    assert type(fast.original()) is Net


def test_deepcopy_is_a_model_of_its_own_and_keeps_its_captures():
    _, fast, x = pair()
    want = fast(x)
    twin = copy.deepcopy(fast)
    assert captures(twin) == 1
    close(twin(x), want)
    assert captures(twin) == 1
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    close(fast(x), want)
    assert not torch.equal(twin(x), want)
    trees = copy.deepcopy({"a": fast, "b": fast})
    assert trees["a"] is trees["b"]


def test_pickle_and_torch_save():
    _, fast, x = pair()
    want = fast(x)
    again = pickle.loads(pickle.dumps(fast))
    assert isinstance(again, fxaccel.AcceleratedModule)
    close(again(x), want)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x), want)


def test_functional_call_and_vmap_of_parameters():
    model, fast, x = pair()
    fast(x)
    other = {k: v + 0.1 for k, v in Net().named_parameters()}
    close(functional_call(fast, other, (x,)), functional_call(model, other, (x,)))
    close(fast(x), model(x))


def test_hooks_run_once_around_the_call_and_those_inside_are_captured():
    model, x = Net(), torch.randn(4, 8)
    calls = []
    model.register_forward_hook(lambda m, a, out: calls.append("root") or out + 1)
    model.register_forward_pre_hook(lambda m, a: calls.append("pre"))
    model.blocks[0].register_forward_hook(lambda m, a, out: out * 2)
    want = model(x)
    calls.clear()
    fast = fxaccel.accelerate(model)
    fast(x)
    calls.clear()
    close(fast(x), want)
    assert calls == ["pre", "root"]
    handle = fast.register_forward_hook(lambda m, a, out: out * 0)
    assert not fast(x).any()
    handle.remove()
    close(fast(x), want)


def test_tensor_hooks_on_parameters_run():
    _, fast, x = pair()
    seen = []
    fast.blocks[0].up.weight.register_hook(lambda g: seen.append(g.shape))
    fast(x).sum().backward()
    assert seen == [(16, 8)]


def test_training_flags_follow_train_and_eval_of_root_and_child():
    _, fast, _ = pair()
    fast.eval()
    assert not any(m.training for m in fast.modules())
    fast.blocks[1].train()
    assert fast.blocks[1].norm.training
    assert fast.train() is fast
    assert all(m.training for m in fast.modules())


def test_moving_a_model_to_where_it_is_keeps_its_captures():
    model, fast, x = pair()
    fast(x)
    for move in (lambda: fast.to("cpu"), lambda: fast.float(), fast.cpu, fast.share_memory):
        move()
        assert captures(fast) == 1
    close(fast(x), model(x))
    fast.double()
    assert captures(fast) == 0
