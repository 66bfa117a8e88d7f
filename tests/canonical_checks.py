"""What tests of the canonical form check: values, gradients, types, layouts, guards, and a second run."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxaccel.canonical import canonicalize
from fxaccel.capture import capture
from fxaccel.evaluate import run, run_nodes
from fxaccel.ir import Program, expr
from fxaccel.listing import lines, listing


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def state_of(program: Program, module: nn.Module) -> dict[str, Tensor]:
    named = tensors_of(module)
    return {
        placeholder: (program.constants[slot.name] if slot.kind == "constant" else named[slot.name])
        for placeholder, slot in program.state.items()
    }


def text(program: Program) -> str:
    """The listing without where each node came from."""
    bare = [
        f"{' '.join(line.results)} = {line.op}({line.args}) : {line.type}"
        for _, line in lines(program, ends=True)
    ]
    return "\n".join(bare)


def inputs_of(shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def larger(program: Program, inputs: list[Tensor], grow: int) -> list[Tensor]:
    """Inputs whose free sizes are larger by `grow`, each by one more than the last."""
    sizes = {s: n + grow + i for i, (s, n) in enumerate(program.hints.items())}
    names = [n for n in program.inputs if n is not None]
    shapes = [[_at(s, sizes) for s in program.placeholder(n).meta["val"].shape] for n in names]
    generator = torch.Generator().manual_seed(grow)
    return [
        torch.randn(shape, generator=generator).to(x.dtype) if x.is_floating_point() else x.new_zeros(shape)
        for shape, x in zip(shapes, inputs, strict=True)
    ]


def results(program: Program, state: dict[str, Tensor], leaves: list[Tensor], *, double: bool = True):
    """Outputs and the gradients of a weighted sum of them, in double precision."""
    cast = (lambda t: t.detach().double()) if double else (lambda t: t.detach().clone())
    state = {
        k: cast(v).requires_grad_(v.requires_grad) if v.is_floating_point() else v.clone()
        for k, v in state.items()
    }
    leaves = [cast(x).requires_grad_() if x.is_floating_point() else x for x in leaves]
    torch.manual_seed(7)
    outputs = run(program, state, leaves, double=double)
    total = sum(
        (o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in outputs if o.is_floating_point()
    )
    wanted = [t for t in (*state.values(), *leaves) if t.requires_grad]
    gradients = (
        torch.autograd.grad(total, wanted, allow_unused=True)
        if isinstance(total, Tensor) and total.requires_grad
        else []
    )
    return outputs, list(gradients)


def check(
    module: nn.Module, inputs: list[Tensor], *, grow: tuple[int, ...] = (1, 3), tolerance: float = 1e-6
) -> Program:
    """Canonicalize a captured call; values, gradients, dtypes, shapes and idempotence must hold."""
    before = capture(module, tuple(inputs), {})
    after = before.copy()
    guards = len(_guards(after))
    canonicalize(after)
    after.graph.lint()
    assert len(_guards(after)) == guards, "a guard was added"
    first = listing(after, ends=True)
    assert canonicalize(after) == [], "a second run finds something to do"
    assert listing(after, ends=True) == first
    for leaves in [inputs, *(larger(before, inputs, g) for g in grow)]:
        _agree(before, after, module, leaves, tolerance)
    _metadata(before, after, module, inputs)
    return after


def _guards(program: Program):
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if hasattr(leaf, "fake_mode") and leaf.fake_mode.shape_env is not None:
                return leaf.fake_mode.shape_env.guards
    return []


def _agree(
    before: Program, after: Program, module: nn.Module, leaves: list[Tensor], tolerance: float
) -> None:
    state = state_of(before, module)
    old, old_gradients = results(before, state, leaves)
    new, new_gradients = results(after, state, leaves)
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
    for a, b in zip(old_gradients, new_gradients, strict=True):
        assert (a is None) == (b is None), "a gradient came or went"
        if a is not None:
            torch.testing.assert_close(b, a, rtol=10 * tolerance, atol=10 * tolerance, equal_nan=True)


def _metadata(before: Program, after: Program, module: nn.Module, leaves: list[Tensor]) -> None:
    """Every value is of the dtype, shape and layout that its meta says; outputs are as they were."""
    env = {}
    state = {k: v.detach().clone() for k, v in state_of(after, module).items()}
    given = {n: leaves[i] for i, n in enumerate(after.inputs) if n is not None}
    for node in after.graph.nodes:
        if node.op == "placeholder":
            env[node] = state[node.name] if node.name in state else given[node.name].clone()
    body = [n for n in after.graph.nodes if n.op not in ("placeholder", "output")]
    run_nodes(body, env, after.root)
    symbols = {s: leaves[i].shape[d] for s, (i, d) in after.sizes.items()}
    for node in body:
        for real, fake in zip(
            pytree.tree_leaves(env[node]), pytree.tree_leaves(node.meta["val"]), strict=True
        ):
            if isinstance(real, Tensor):
                assert real.dtype == fake.dtype, node.format_node()
                assert list(real.shape) == [_at(s, symbols) for s in fake.shape], node.format_node()
                strides = [
                    (a, _at(b, symbols))
                    for a, b, n in zip(real.stride(), fake.stride(), real.shape, strict=True)
                    if n > 1
                ]
                assert all(a == b for a, b in strides), f"{node.format_node()}: {strides}"
    old, new = (
        run(before, state_of(before, module), list(leaves)),
        run(after, state_of(after, module), list(leaves)),
    )
    for a, b in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def _at(size, symbols) -> int:
    e = expr(size)
    return int(e.subs({s: symbols[str(s)] for s in e.free_symbols}))
