"""Run a gated activation, activation(gate) * up, as one kernel.

    y = silu(gate) * up                    =>   y = fxaccel.glu(gate, up, 'silu')
    a, b = x.chunk(2, -1)
    y = gelu(a, approximate='tanh') * b    =>   y = fxaccel.glu(a, b, 'gelu_tanh')

Fires on   SwiGLU (Llama, Qwen, Mistral), GeGLU with erf (T5, diffusion models) and with tanh (Gemma), ReGLU,
           and GLU, also as `F.glu`: gate and up from two linears or halves of one result, in either order.
Saves      on a GPU 2 of 5 tensor-sized transfers forward, 3 of 8 backward, and a tensor kept for backward. On
           the CPU an allocation in inference; in training the operators run as they are.
Exact      on the CPU bit for bit; on a GPU but for the last place of an exponential or erf. The activation is
           rounded to its dtype before the product, as in the model.
Source     Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

import torch

from fxaccel.ir import is_call
from fxaccel.kernels import glu as kernel
from fxaccel.passes._gated import NAMES, activation, unequal, written
from fxaccel.rule import Match, Ops, Refusals, Rule, register

aten = torch.ops.aten


@register
class FuseGLU(Rule):
    """Gated activations (SwiGLU, GeGLU, ReGLU, GLU) become one kernel."""

    name = "fuse-glu"
    step = "lower"  # smooth-inputs and quantize read the product
    default = True

    def pattern(self, op: Ops, gate, up):
        return written(op, gate, up)

    def refuse(self, m: Match) -> Refusals:
        gate, up = m.val("gate", "up")
        if not isinstance(up, torch.Tensor):
            yield f"the activation is multiplied by the number {up}, not by a tensor"
            return
        if m.up is m.gate or m.up in m.nodes:
            yield "gate and up are one value, which makes an activation of it"
        if m.chose("sigmoid") and is_call(m.gate, aten.mul.Tensor) and m.up in m.gate.args:
            yield f"it is x * sigmoid({m.gate.args[1]} x), an activation of one value as quick-gelu is"
        yield from list(kernel.unsupported(gate, up, activation(m))) or unequal(gate, up)

    def rewrite(self, op: Ops, m: Match):
        return op.fxaccel.glu.default(m.gate, m.up, activation(m))

    def remark(self, m: Match) -> str:
        return NAMES[activation(m)]
