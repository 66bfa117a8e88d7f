"""Attention in every spelling is raised to one kernel with its mask named; what only looks like it is not."""

import copy

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.ir import arguments
from tests.helpers import thinned
from tests.passes.attention_look_alikes import LOOK_ALIKES
from tests.passes.attention_programs import PROGRAMS, B, S

EAGER_ERRORS = 4  # two bits: what another order of the same sums may lose
REASSOCIATED = 64 * torch.finfo(torch.float64).eps  # where eager is itself the yardstick


def accelerated(model, *inputs):
    return fxaccel.accelerate(model, passes=["fuse-attention"], example_inputs=inputs)


def record(fast):
    (one,) = fast.report().captures
    return one.passes[0], one


def results(model, inputs, seed=0):
    """Output and gradients of everything, by name."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    torch.manual_seed(seed)
    out = model(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    watched = dict(model.named_parameters()) | {
        f"input {i}": x for i, x in enumerate(leaves) if x.requires_grad
    }
    watched = {n: t for n, t in watched.items() if t.requires_grad}
    total = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    grads = torch.autograd.grad(total, list(watched.values()), allow_unused=True)
    return found | {f"gradient of {n}": g for n, g in zip(watched, grads, strict=True) if g is not None}


def assert_as_near_to_fp64(model, fast, inputs):
    """`fast` may be two bits worse than the model, both measured from the model in fp64."""
    exact = results(
        copy.deepcopy(model).double(), [x.double() if x.is_floating_point() else x for x in inputs]
    )
    eager, ours = results(model, inputs), results(fast, inputs)
    assert ours.keys() == eager.keys() == exact.keys()
    # a gradient sums terms as large as other gradients, of which nothing may be left (as for the bias of k)
    scale = {}
    for name, reference in exact.items():
        kind = name.split()[0]
        scale[kind] = max(
            scale.get(kind, 0.0), reference.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item()
        )
    for name, reference in exact.items():
        eps = torch.finfo(eager[name].dtype).eps
        finite = torch.isfinite(reference)
        assert torch.equal(torch.isfinite(ours[name]), finite), name
        if not finite.any():
            continue
        lost = (eager[name].double() - reference)[finite].abs().max()
        found = (ours[name].double() - reference)[finite].abs().max()
        largest = scale[name.split()[0]]
        allowed = EAGER_ERRORS * (lost + eps * largest) + REASSOCIATED * largest
        assert found <= allowed, f"{name}: {found:.3g}, eager loses {lost:.3g}"


@thinned(6, program=PROGRAMS)
def test_a_spelling_of_attention_becomes_one_kernel_with_its_mask_named(program):
    model, inputs = program.model(), program.arguments()
    fast = accelerated(model, *inputs)
    found, one = record(fast)
    assert [s.why for s in found.applied] == [program.kind], [
        s.why for s in (*found.refused, *found.near_misses)
    ]
    calls = [n for n in fast_graph(fast).nodes if n.target is torch.ops.fxaccel.attention.default]
    assert len(calls) == 1
    assert not [n for n in fast_graph(fast).nodes if n.target is torch.ops.aten.softmax.int]
    bound = arguments(calls[0])
    assert bound["empty"] == program.empty
    assert "checked against the model" in one.check
    if "dropped" not in program.core.__name__ or not program.train:
        for sizes in ((B, S), (B + 1, S + 4)):
            assert_as_near_to_fp64(model, fast, program.arguments(*sizes, seed=1))
        fixed = {"bias", "mask"} & set(program.inputs)  # of an input of 4 dimensions only the batch may vary
        assert len(fast.report().captures) == 1 + bool(fixed)


def fast_graph(fast):
    return fast.__dict__["_fxaccel"].all[0].program.graph


def test_the_zoo_is_as_large_as_promised():
    assert len(PROGRAMS) >= 80
    assert len(LOOK_ALIKES) >= 40


# -- look-alikes -----------------------------------------------------------------------------------------


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.gate = nn.Parameter(torch.randn(9, 9, generator=torch.Generator().manual_seed(3)))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, q, k, v):
        return self.function(self, q, k, v)


def qkv(seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, 9, 8, generator=g) for _ in range(3))


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_keeps_its_meaning_and_its_reason_is_told(name):
    function, why = LOOK_ALIKES[name]
    model = Module(function)
    fast = accelerated(model, *qkv())
    found, _ = record(fast)
    assert not found.error
    said = " | ".join(s.why for s in (*found.refused, *found.near_misses))
    if why == "":
        assert len(found.applied) == 1, said
    else:
        assert not found.applied
        assert why == "no softmax" or why in said, said
    if name != "dropped_twice":
        for seed in (0, 1):
            assert_as_near_to_fp64(model, fast, qkv(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax_over_queries", "permuted_keys"])
def test_what_inductor_gets_wrong_is_right_behind_our_inductor_backend(name):
    model = Module(LOOK_ALIKES[name][0])
    fast = fxaccel.accelerate(model, passes=["fuse-attention"], backend="inductor", example_inputs=qkv())
    assert_as_near_to_fp64(model, fast, qkv())
