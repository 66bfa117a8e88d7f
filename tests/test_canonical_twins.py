"""Every in-place operator does what its out-of-place form does: values, gradients, random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fxaccel.canonical.effects import functional

NAMES = sorted(n for n in dir(torch.Tensor) if n.endswith("_") and not n.endswith("__"))
MORE = ["dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_", "rrelu_", "celu_", "elu_",
        "gelu_", "silu_", "mish_", "selu_", "hardswish_", "hardsigmoid_", "hardtanh_", "leaky_relu_",
        "threshold_", "relu6_"]  # fmt: skip


def overloads() -> list[Any]:
    packets = [getattr(torch.ops.aten, n, None) for n in sorted({*NAMES, *MORE})]
    return [getattr(p, o) for p in packets if p is not None for o in p.overloads()]


PAIRS = [(t, twin) for t in overloads() if (twin := functional(t)) is not None]

# What it takes to call an operator whose arguments are not any tensor of the same shape or any number.
INDEX, ROWS = torch.tensor([[0, 2, 1, 3]] * 3), torch.tensor([0, 2])
GIVEN: dict[str, dict[str, Any]] = {
    "addbmm": {"batch1": torch.rand(2, 3, 5), "batch2": torch.rand(2, 5, 4)},
    "addmm": {"mat1": torch.rand(3, 5), "mat2": torch.rand(5, 4)},
    "addmv": {"self": torch.rand(3), "mat": torch.rand(3, 5), "vec": torch.rand(5)},
    "addr": {"vec1": torch.rand(3), "vec2": torch.rand(4)},
    "baddbmm": {"self": torch.rand(2, 3, 4), "batch1": torch.rand(2, 3, 5), "batch2": torch.rand(2, 5, 4)},
    "index_add": {"dim": 0, "index": ROWS, "source": torch.rand(2, 4)},
    "index_copy": {"dim": 0, "index": ROWS, "source": torch.rand(2, 4)},
    "index_fill": {"dim": 0, "index": ROWS, "value": 2.0},
    "index_put": {"indices": [ROWS], "values": torch.rand(2, 4)},
    "index_reduce": {"dim": 0, "index": ROWS, "source": torch.rand(2, 4), "reduce": "amax"},
    "masked_fill": {"mask": INDEX > 1, "value": 2.0},
    "masked_scatter": {"mask": INDEX > 1, "source": torch.rand(3, 4)},
    "put": {"index": INDEX, "source": torch.rand(3, 4)},
    "scatter": {"dim": 1, "index": INDEX, "src": torch.rand(3, 4), "value": 2.0, "reduce": "add"},
    "scatter_add": {"dim": 1, "index": INDEX, "src": torch.rand(3, 4)},
    "scatter_reduce": {"dim": 1, "index": INDEX, "src": torch.rand(3, 4), "reduce": "sum"},
    "feature_dropout": {"self": torch.rand(2, 3, 4)},
    "feature_alpha_dropout": {"self": torch.rand(2, 3, 4)},
    "renorm": {"p": 2, "dim": 0, "maxnorm": 0.5},
    "mvlgamma": {"self": torch.rand(3, 4) + 3, "p": 2},
    "fill": {"value": 0.5},
    "round": {"decimals": 1},
    "gelu": {"approximate": "tanh"},
    "div": {"rounding_mode": "floor"},
    "divide": {"rounding_mode": "floor"},
    "acosh": {"self": torch.rand(3, 4) + 1.5},
    "arccosh": {"self": torch.rand(3, 4) + 1.5},
    "float_power": {"self": torch.rand(3, 4).double()},
    "cumsum": {"dtype": None},
    "cumprod": {"dtype": None},
}
INTEGRAL = ("bitwise", "gcd", "lcm")


def sample(target: Any) -> dict[str, Any]:
    """Arguments for an operator; the first is the tensor that is written to."""
    name = target._opname.removesuffix("_")
    given = GIVEN.get(name, {})
    made: dict[str, Any] = {}
    for i, a in enumerate(target._schema.arguments):
        kind = str(a.type)
        key = "self" if i == 0 else a.name
        if key in given:
            value = given[key]
            value = torch.tensor(value) if isinstance(value, float) and kind == "Tensor" else value
        elif "Tensor" in kind:
            value = torch.rand(3, 4) * 0.8 + 0.1
        elif "Generator" in kind or (a.has_default_value() and a.default_value is not None):
            continue
        else:
            value = {"bool": True, "int": 1, "Optional[bool]": True}.get(kind, 0.5)
        if name.startswith(INTEGRAL):
            value = (value * 10).long() if isinstance(value, Tensor) else 3
        made[a.name] = value.clone() if isinstance(value, Tensor) else value
    return made


def called(target: Any, given: dict[str, Any], *, grad: bool) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """The result on a value made from `given`, the gradients, and the state of the generator behind it."""
    leaves = [
        v.detach().clone().requires_grad_(grad) if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in given.values()
    ]
    schema = target._schema.arguments
    values = [leaves[0] + 0, *leaves[1:]]
    args = [v for v, a in zip(values, schema, strict=False) if not a.kwarg_only]
    names = list(given)
    kwargs = {
        n: v for n, v in zip(names, leaves, strict=True) if n in {a.name for a in schema if a.kwarg_only}
    }
    torch.manual_seed(5)
    result = target(*args, **kwargs)
    after = torch.get_rng_state()
    wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
    gradients: list[Tensor | None] = []
    if result.requires_grad:
        total = (result * torch.arange(result.numel()).view(result.shape).cos()).sum()
        gradients = list(torch.autograd.grad(total, wanted, allow_unused=True))
    return result, gradients, after


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("target", "twin"), PAIRS, ids=lambda t: str(t).removeprefix("aten."))
def test_twins_do_the_same(target: Any, twin: Any):
    given = sample(target)
    old, _, old_state = called(target, given, grad=False)
    new, _, new_state = called(twin, given, grad=False)
    same(new.to(old.dtype), old)
    assert torch.equal(old_state, new_state)
    if new.dtype != old.dtype:
        return  # taken only where no gradient flows
    try:
        _, old_gradients, _ = called(target, given, grad=True)
    except RuntimeError as error:
        if "implemented" not in str(error):
            raise
        return  # the model does not train as it is
    _, new_gradients, _ = called(twin, given, grad=True)
    assert [g is None for g in old_gradients] == [g is None for g in new_gradients]
    for a, b in zip(old_gradients, new_gradients, strict=True):
        if a is not None and b is not None:
            same(b, a)


def test_there_are_many_twins():
    assert len(PAIRS) > 180
    names = {t._opname for t, _ in PAIRS}
    assert {"add_", "relu_", "dropout_", "masked_fill_", "cumsum_"} <= names
    assert not names & {
        "copy_",
        "bernoulli_",
        "zero_",
        "uniform_",
        "normal_",
        "resize_",
        "t_",
        "squeeze_",
        "set_",
    }
