"""Add a bias and run the activation behind it as one kernel.

    y = gelu(linear(x, w, b))         =>   y = fxaccel.bias_activation(linear(x, w), b, 'gelu')
    y = relu(x + b)                   =>   y = fxaccel.bias_activation(x, b, 'relu')
    y = x * sigmoid(1.702 * x)        =>   y = fxaccel.bias_activation(x, None, 'quick_gelu')
    y = gelu_tanh(linear(x, w, b))    =>   y = fxaccel.linear_activation(x, w, b, 'gelu_tanh')

Fires on   relu, gelu with erf and with tanh, silu, tanh, sigmoid, mish and hardswish behind a bias over the
           last dimension, of a linear in training on a GPU, or written out; quick_gelu and relu(x)**2, which
           are several operators, behind anything. Gelu with a tanh of a linear in inference on the CPU, in
           float32, is one call of oneDNN. A gate of a product is left to fuse-glu.
Saves      on a GPU, of a linear's bias, 1 of 4 tensor-sized transfers backward, for its gradient is summed in
           the same kernel; where the bias is written out 2 of 4 forward, too; of quick_gelu 5 of 7 forward,
           and one of 2 tensors kept for backward. On the CPU an allocation in inference,
           or most of the time of a tanh.
Exact      on the CPU bit for bit, but for what oneDNN sums in another order; on a GPU the sum is not rounded
           before the activation.
Source     Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053.
"""

import dataclasses
from typing import Any

import torch

from fxaccel.ir import Program, expr, is_call, is_tensor
from fxaccel.kernels import bias_activation as kernel
from fxaccel.kernels import linear_activation
from fxaccel.passes import _advice, _gated
from fxaccel.passes._activations import SEVERAL, activation, whole, written
from fxaccel.rule import Match, Ops, Refusal, Refusals, Rule, Rules, register

aten = torch.ops.aten
GATES = "it gates a product, of which fuse-glu makes one kernel"


def unequal(x: torch.Tensor, b: torch.Tensor) -> Refusals:
    """Why sizes that no kernel can tell apart are not equal."""
    if expr(b.shape[0]) != expr(x.shape[-1]):
        yield f"b has {b.shape[0]} elements and rows of x {x.shape[-1]}, which are not known to be equal"


def gates(m: Match) -> bool:
    """Whether it is one factor of a gated activation."""
    if activation(m) not in _gated.NAMES or len(m.root.users) != 1:
        return False
    product = next(iter(m.root.users))
    if not is_call(product, aten.mul.Tensor):
        return False
    values = [a.meta["val"] for a in product.all_input_nodes if is_tensor(a.meta["val"])]
    return len(values) == 2 and not list(_gated.unequal(*values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused(Rule):
    """What both rules have in common."""

    even_if_slower: bool = False

    def slower(self, m: Match) -> Refusals:
        """Why the operators run as they are."""
        y, of_linear = m.root.meta["val"], m.chose("linear")
        on_cpu = y.device.type == "cpu"
        why = ""
        if on_cpu and of_linear:
            why = "on the CPU the product adds the bias, and to write over its result saves no time"
        elif on_cpu and m.program.grad:
            why = "with gradients the CPU runs torch's own operators, and would after this rewrite"
        elif on_cpu and y.itemsize < 4:
            why = f"on the CPU {y.dtype} takes its time in casts, and an allocation less saves none"
        elif of_linear and not m.program.grad:
            why = "without gradients the product adds the bias, and all else is as much to read and write"
        if why and not self.even_if_slower:
            yield Refusal(why, _advice.EVEN_IF_SLOWER)


class BiasActivation(Fused):
    """An activation behind a bias becomes one kernel with it."""

    def pattern(self, op: Ops, x, w, b):
        return written(op, op.either(linear=op.aten.linear.default(x, w, b), sum=op.aten.add.Tensor(x, b)))

    def refuse(self, m: Match) -> Refusals:
        x, b = m.root.meta["val"] if m.chose("linear") else m.val("x"), m.val("b")
        if not isinstance(b, torch.Tensor):
            yield "the linear has no bias" if b is None else f"what is added is the number {b}"
            return
        if name := whole(m.program, m.root):
            yield f"it is a part of {name}"
        if gates(m):
            yield GATES
        yield from list(kernel.unsupported(x, b, activation(m))) or unequal(x, b)
        yield from self.slower(m)

    def rewrite(self, op: Ops, m: Match):
        x = op.aten.linear.default(m.x, m.w) if m.chose("linear") else m.x
        return op.fxaccel.bias_activation.default(x, m.b, activation(m))

    def remark(self, m: Match) -> str:
        of = "behind the bias of a linear" if m.chose("linear") else "of a sum"
        return f"{activation(m)} {of}"


class LinearActivation(Rule):
    """A linear and an activation that oneDNN computes behind its product become one call of it."""

    def pattern(self, op: Ops, x, w, b):
        return written(op, op.aten.linear.default(x, w, b), tuple(linear_activation.ACTIVATIONS))

    def refuse(self, m: Match) -> Refusals:
        x, w, b = m.val("x", "w", "b")
        if m.program.grad:
            yield Refusal("its product in one call with the activation has no gradients", _advice.NO_GRAD)
        if gates(m):
            yield GATES
        if m.root.meta["val"].dtype != x.dtype:
            yield _advice.autocast(m.root.meta["val"].dtype, "multiplied")
        yield from linear_activation.unsupported(x, w, b, activation(m))

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.linear_activation.default(m.x, m.w, m.b, activation(m))

    def remark(self, m: Match) -> str:
        return f"{activation(m)} in the product of a linear"


class OneActivation(Fused):
    """An activation of several operators becomes one kernel."""

    def pattern(self, op: Ops, x):
        return written(op, x, SEVERAL)

    def refuse(self, m: Match) -> Refusals:
        yield from kernel.unsupported(m.val("x"), None, activation(m))
        yield from self.slower(m)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.bias_activation.default(m.x, None, activation(m))

    def remark(self, m: Match) -> str:
        return activation(m)


@register
class FuseActivation(Rules):
    """Activations become one kernel with the bias before them.

    even_if_slower    fuse where nothing is gained too: on the CPU, and of linears without gradients
    """

    name = "fuse-activation"
    step = "lower"
    default = True

    even_if_slower: bool = False

    def apply(self, program: Program, plan: Any, driver: Any) -> None:
        """Every site of all rules."""
        fused = [rule(even_if_slower=self.even_if_slower) for rule in (BiasActivation, OneActivation)]
        driver.rewrite([LinearActivation(), *fused])
