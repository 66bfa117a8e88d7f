"""One site of a rewritten model as a script of its own: both forms on random inputs, and how far apart."""

from __future__ import annotations

import textwrap
from typing import Any

import torch
from torch import fx

from fxaccel.errors import OptionError
from fxaccel.ir import Program, is_tensor, number
from fxaccel.proof import Claim, Fragment

_SCRIPT = '''\
"""{title}

Runs both forms on random inputs, forward and backward, in their own dtypes, and the first in float64.
"""

import torch
from torch import device, inf, nan
{imports}

{before}

{after}

def value(dtype, shape, stride):
    """Random numbers laid out as in the model; indices are 0 or 1, masks let everything pass."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
    if dtype.is_floating_point or dtype.is_complex:
        flat = torch.randn(size, dtype=torch.float64).to(dtype)
    elif dtype is torch.bool:
        flat = torch.ones(size, dtype=dtype)
    else:
        flat = torch.randint(0, 2, (size,)).to(dtype)
    return flat.as_strided(shape, stride)


def inputs():
    """The arguments of both forms."""
    torch.manual_seed(0)
    return [
{values}
    ]


def run(form, given, double=False):
    """Results, and gradients of their sum by every input of floats."""
    leaves = []
    for v in given:
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            v = (v.double() if double else v).detach().requires_grad_({grad})
        leaves.append(v)
    results = [r for r in form(*leaves) if isinstance(r, torch.Tensor)]
    learned = [v for v in leaves if isinstance(v, torch.Tensor) and v.requires_grad]
    flowing = [r.sum() for r in results if r.requires_grad]
    grads = torch.autograd.grad(sum(flowing), learned, allow_unused=True) if flowing and learned else ()
    return [*results, *(g for g in grads if g is not None)]


def distance(a, b):
    """The largest difference, as a share of the largest value of b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) if b.numel() else 0.0


if __name__ == "__main__":
    old, new = run(before, inputs()), run(after, inputs())
    try:
        exact = run(before, inputs(), double=True)
    except RuntimeError as error:
        exact = old
        print(f"there is no run in float64: {{error}}")
    for i, (o, n, e) in enumerate(zip(old, new, exact)):
        far = f"before {{distance(o, e):.3g}}, after {{distance(n, e):.3g}} from float64"
        print(f"{{i}}: {{tuple(o.shape)}} {{far}}")
'''


def script(program: Program, claim: Claim, title: str) -> str:
    """The text of the script; raises OptionError for a site that holds a graph within the graph."""
    inputs = [*claim.before.inputs]
    names = [n.name for n in inputs]
    ops = {
        n.target for part in (claim.before, claim.after) for n in part.graph.nodes if n.op == "call_function"
    }
    ours = sorted({t._opname for t in ops if getattr(t, "namespace", "") == "fxaccel"})
    return _SCRIPT.format(
        title=title,
        imports="\n".join(f"import fxaccel.kernels.{name}" for name in ours),
        before=_function("before", claim.before, names),
        after=_function("after", claim.after, names),
        values=textwrap.indent("\n".join(_value(n, program) for n in inputs), " " * 8),
        grad=program.grad,
    )


def _function(name: str, part: Fragment, names: list[str]) -> str:
    if any(n.op == "get_attr" for n in part.graph.nodes):
        raise OptionError("the site holds a graph within the graph, which no script can show")
    graph = fx.Graph()
    env = {old: graph.placeholder(n) for old, n in zip(part.inputs, names, strict=True)}
    for node in part.graph.nodes:
        if node.op == "call_function":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = {}
    graph.output([env[o] for o in part.outputs])
    body = graph.python_code("self").src.replace("def forward(self, ", f"def {name}(")
    return body.strip() + "\n"


def _value(node: fx.Node, program: Program) -> str:
    """The expression for an input."""
    val: Any = node.meta["val"]
    constant = node.meta.get("number")
    if constant is not None:
        return f"torch.tensor({constant.item()!r}, dtype={constant.dtype}),"
    if not is_tensor(val):
        if isinstance(val, (list, tuple)):
            raise OptionError("the site reads several values of one call, which no script can show")
        return f"{number(val, program.hints) if isinstance(val, torch.SymInt) else val!r},"
    shape, stride = ([number(d, program.hints) for d in dims] for dims in (val.shape, val.stride()))
    return f"value({val.dtype}, {shape}, {stride}),"
