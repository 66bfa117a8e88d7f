"""Round to few bits in the kernel of the norm or gated activation that computes the values.

    y = layer_norm(x, w, b, eps)               q, s, _ = fxaccel.norm_quantize(x, None, w, b, eps, ...)
    q, s = quantize_rows(y)               =>
    y, h = add_rms_norm(x, r, w, eps)          q, s, h = fxaccel.norm_quantize(x, r, w, None, eps, ...)
    q, s = quantize_rows(y)               =>
    q, s = quantize_rows(silu(g) * u)     =>   q, s = fxaccel.glu_quantize(g, u, "silu")

Fires on   what `quantize` puts before its linears, in inference: LayerNorm, and the norms of fuse-norm, with
           and without a residual add, whose sum may have other readers; silu, gelu, its form with a tanh,
           relu and sigmoid, times a value of the same shape, written out or as fuse-glu leaves them. What is
           rounded is read by nothing else: linears of one input share what it is rounded to.
Saves      on a GPU, in bf16, a norm 4 of 7 bytes an element, with a residual add 4 of 11, a gated activation
           8 of 13; on the CPU an allocation.
Exact      on the CPU bit for bit; on a GPU but for the last place of a sum, an exponential, or erf, by which
           a code that lies at a tie is the next one.
Source     fusing the rounding of inputs into what precedes: Yao et al. 2022, "ZeroQuant", arXiv:2206.01861,
           section 4.3.
"""

import dataclasses
import operator

import torch
from torch import fx

from fxaccel.ir import Program, is_call
from fxaccel.kernels import kernel
from fxaccel.passes._advice import not_last
from fxaccel.passes._gated import activation, unequal, written
from fxaccel.pattern import Pattern
from fxaccel.rule import ANY, Finder, Match, Miss, Ops, Refusal, Refusals, Rule, Rules, register


class Rounded(Rule):
    """Values that are rounded by rows, found at the call that rounds them.

    Its results may have any readers, and so may the sum that a norm of ours returns beside its own.
    """

    def traced(self):
        pattern = Pattern.trace(self.pattern)

        def find(program: Program, root: fx.Node) -> Match | Miss:
            found = pattern.find(program, root)
            return found if isinstance(found, Miss) else _with_results(found)

        return Finder(pattern.targets, find)


def _with_results(m: Match) -> Match | Miss:
    """The match with all that may be read of it: codes, scales, and the sum of an add."""
    outputs = tuple(
        user
        for node in m.nodes
        for user in node.users
        if is_call(user, operator.getitem) and (node is m.root or user.args[1] == 1)
    )
    if not outputs:
        return Miss()
    terms = m.terms | {node: node for node in outputs}
    return dataclasses.replace(m, terms=terms, outputs=outputs)


def _results(m: Match, made: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """For each that may be read, what takes its place: codes and scales come first of what is made."""
    return tuple(made[g.args[1]] if g.args[0] is m.root else made[2] for g in m.outputs)


class NormQuantize(Rounded):
    """A norm whose rows are rounded becomes one kernel."""

    def pattern(self, op, x, r, w, b, dims, eps, offset, round_first, dtype):
        aten = op.aten
        y = op.either(
            layer=op(kernel("layer_norm").op, x, w, b, eps),
            plain=aten.layer_norm.default(x, dims, w, b, eps, ANY),
            rms=op(kernel("rms_norm").op, x, w, eps, offset, round_first, b),
            plain_rms=aten.rms_norm.default(x, dims, w, eps),
            add_layer=op(kernel("add_layer_norm").op, x, r, w, b, eps)[0],
            add_rms=op(kernel("add_rms_norm").op, x, r, w, eps, offset, round_first, b)[0],
        )
        return op(kernel("quantize_rows").op, y, dtype)

    def refuse(self, m: Match) -> Refusals:
        x, r, w, b = m.val("x", "r", "w", "b")
        if m.chose("plain_rms"):
            yield Refusal(
                "it is PyTorch's rms_norm, which rounds at other steps than ours", "fuse-norm before"
            )
            return
        if m.dims is not None and list(m.dims) != [x.shape[-1]]:
            yield not_last(m.dims, x.shape[-1])
            return
        eps, centred, offset, round_first = _how(m)
        unsupported = kernel("norm_quantize").unsupported
        yield from unsupported(x, r, w, b, eps, centred, offset, round_first, m.dtype)

    def rewrite(self, op: Ops, m: Match):
        made = op.fxaccel.norm_quantize.default(m.x, m.r, m.w, m.b, *_how(m), m.dtype)
        return _results(m, made)


def _how(m: Match) -> tuple[float, bool, float, bool]:
    """eps, centred, offset and round_first."""
    if m.chose("rms") or m.chose("add_rms"):
        return float(m.eps), False, float(m.offset), bool(m.round_first)
    return float(m.eps), True, 0.0, False


class GLUQuantize(Rounded):
    """A gated activation whose rows are rounded becomes one kernel."""

    def pattern(self, op, gate, up, activation, dtype):
        y = op.either(ours=op(kernel("glu").op, gate, up, activation), written=written(op, gate, up))
        return op(kernel("quantize_rows").op, y, dtype)

    def refuse(self, m: Match) -> Refusals:
        gate, up = m.val("gate", "up")
        if not isinstance(up, torch.Tensor):
            yield f"the activation is multiplied by the number {up}, not by a tensor"
        elif m.up in m.nodes:
            yield "the activation is multiplied by itself"
        else:
            unsupported = kernel("glu_quantize").unsupported
            yield from list(unsupported(gate, up, _activation(m), m.dtype)) or unequal(gate, up)

    def rewrite(self, op: Ops, m: Match):
        return _results(m, op.fxaccel.glu_quantize.default(m.gate, m.up, _activation(m), m.dtype))


def _activation(m: Match) -> str:
    return activation(m) if m.chose("written") else m.activation


@register
class FuseQuantize(Rules):
    """Norms and gated activations round to few bits in their own kernel."""

    name = "fuse-quantize"
    step = "lower"
    serves = ("inference",)
    rules = (NormQuantize, GLUQuantize)
