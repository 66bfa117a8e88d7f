"""Sizes, layouts and dtypes that passes get wrong without a word."""

import contextlib
import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import fxaccel
from fxaccel.evaluate import run_nodes
from fxaccel.ir import number
from tests.helpers import Method as Function
from tests.helpers import captures
from tests.test_pitfalls import Block, differentiated, fired, programs, rule

F = nn.functional
aten = torch.ops.aten


# -- sizes -----------------------------------------------------------------------------------------


def test_the_passes_neither_add_conditions_nor_write_sizes_of_the_example():
    model, x = Block(), torch.randn(37, 53, 8)
    fast = fxaccel.accelerate(model, example_inputs=(x,), measure=False)
    assert fired(fast) == {"fuse-attention", "fuse-norm"}
    (one,) = fast.__dict__["_fxaccel"].all
    assert one.program.guards == one.raw.guards
    code = re.sub(r"#.*", "", one.source)
    assert "37" not in code
    assert "53" not in code
    for batch, length in ((2, 3), (5, 2), (7, 64)):
        x = torch.randn(batch, length, 8)
        torch.testing.assert_close(fast(x), model(x))
    assert captures(fast) == 1


def test_a_rewrite_that_holds_for_some_sizes_is_not_used_for_others():
    """The view holds for even batches only; only the fake run of the operator knows."""

    def rewrite(self, op, m):
        halves = op.aten.view.default(m.x, [2, -1, 4])
        nothing = op.aten.mul.Tensor(op.aten.sum.default(halves), 0.0)
        return op.aten.add.Tensor(op.aten.relu.default(m.x), nothing)

    halved = rule("halved", lambda self, op, x: op.aten.relu.default(x), rewrite)
    model = Function(lambda self, x: (x + 1).relu())
    fast = fxaccel.accelerate(model, passes=[halved])
    for batch in (6, 7, 8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast(torch.randn(batch, 4))
        torch.testing.assert_close(fast(x := torch.randn(batch, 4)), model(x))


def test_a_wrong_shape_raises_after_the_passes():
    model = Block()
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 8, 8),))
    assert fired(fast)
    for wrong in (torch.randn(8, 4, 16), torch.randn(4, 16, 4), torch.randn(256)):
        with pytest.raises((RuntimeError, fxaccel.CaptureError)):
            fast(wrong)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 1, 8), (1, 1, 8), (3, 123, 8), (2, 65, 8)], ids=str)
def test_sizes_that_fill_no_block(shape):
    model, x = Block(), torch.randn(shape)
    fast = fxaccel.accelerate(model)
    torch.testing.assert_close(differentiated(fast, x), differentiated(model, x))


LAYOUTS = {
    "transposed": lambda: torch.randn(5, 2, 8).transpose(0, 1),
    "sliced": lambda: torch.randn(2, 5, 20)[..., 3:11],
    "stepped": lambda: torch.randn(2, 10, 16)[:, ::2, ::2],
    "expanded": lambda: torch.randn(1, 5, 8).expand(2, 5, 8),
    "one value": lambda: torch.randn(1, 1, 8).expand(2, 5, 8),
    "last dimension first": lambda: torch.randn(8, 2, 5).permute(1, 2, 0),
    "offset": lambda: torch.randn(81)[1:].view(2, 5, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_input(layout):
    model, x = Block(), LAYOUTS[layout]()
    fast = fxaccel.accelerate(model, measure=False)
    got, want = model(x), fast(x)
    assert got.stride() == want.stride()
    torch.testing.assert_close(differentiated(fast, x), differentiated(model, x))
    assert fired(fast) == {"fuse-attention", "fuse-norm"}


def test_images_in_channels_last_stay_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    fast = fxaccel.accelerate(copy.deepcopy(model))
    got, want = fast(x), model(x)
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want)


# -- types -----------------------------------------------------------------------------------------


def values(fast, x):
    """Pairs of what a node computes and what the graph says that it computes."""
    (program,) = programs(fast)
    state = dict(fast.named_parameters())
    env = {
        n: state[program.state[n.name].name] if n.name in program.state else x
        for n in program.graph.nodes
        if n.op == "placeholder"
    }
    run_nodes([n for n in program.graph.nodes if n.op == "call_function"], env, program.root)
    for node, value in env.items():
        for real, fake in zip(tree_leaves(value), tree_leaves(node.meta["val"]), strict=True):
            if isinstance(real, torch.Tensor):
                sizes, strides = ([number(s, program.hints) for s in v] for v in (fake.shape, fake.stride()))
                yield node, real, fake.dtype, sizes, strides


@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_value_is_of_the_type_that_the_graph_says(training, cast):
    model = nn.Sequential(Block(p=0.2), nn.Linear(8, 4)).train(training)
    around = torch.autocast("cpu", dtype=cast) if cast else contextlib.nullcontext()
    x = torch.randn(3, 5, 8)
    with around:
        fast = fxaccel.accelerate(model, example_inputs=(x,))
        assert fast(x).dtype is model(x).dtype
    for node, real, dtype, sizes, _ in values(fast, x):
        assert (real.dtype, list(real.shape)) == (dtype, sizes), node


def test_every_value_has_the_strides_that_the_graph_says():
    x = torch.randn(3, 5, 8)
    fast = fxaccel.accelerate(Block(), example_inputs=(x,))
    for node, real, _, _, strides in values(fast, x):
        assert list(real.stride()) == strides, node


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_values_in_half_precision_are_no_further_from_float64(dtype):
    model = Block().to(dtype)
    exact = copy.deepcopy(model).double()
    fast = fxaccel.accelerate(model)
    x = (100 * torch.randn(4, 9, 8)).to(dtype)
    got, old, want = (m(x.to(next(m.parameters()).dtype)).double() for m in (fast, model, exact))
    assert fired(fast)
    assert got.isfinite().all()
    eps = torch.finfo(dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= 2 * float((old - want).abs().max()) + eps


def test_complex_numbers():
    model = nn.Sequential(
        nn.Linear(4, 4, dtype=torch.complex64),
        Function(lambda self, x: x.conj() * x.exp()),
        nn.Linear(4, 4, dtype=torch.complex64),
    )
    fast, grads = fxaccel.accelerate(model), []
    x = torch.randn(3, 4, dtype=torch.complex64, requires_grad=True)
    for m in (model, fast):
        grads.append(torch.autograd.grad(m(x).abs().sum(), [x, *m.parameters()]))
    torch.testing.assert_close(*grads)
    exact = fxaccel.accelerate(copy.deepcopy(model).to(torch.complex128))
    assert torch.autograd.gradcheck(
        lambda x: torch.view_as_real(exact(x)), x.detach().cdouble().requires_grad_()
    )


def test_devices_of_factories_follow_the_input():
    model = Function(lambda self, x: x + torch.arange(x.shape[1], device=x.device), a=nn.Linear(2, 2))
    fast = fxaccel.accelerate(model, check=False)
    assert fast(torch.randn(3, 4)).device.type == "cpu"
    assert fast.to("meta")(torch.randn(3, 4, device="meta")).device.type == "meta"
