"""Seconds of the backward of a call for each argument that a gradient goes to.

A product has one product in backward for each of its factors, which is left out where that one takes no
gradient; other calls take as much whatever the gradient goes to, half of it for parameters where it goes to
both these and activations.
"""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from fxaccel.effects import differentiable
from fxaccel.ir import arguments
from fxaccel.roofline import BACKWARD

ADDED = {"bias", "attn_mask", "mask", "attn_bias"}  # what a product adds, which is no factor of it


def gradients(
    node: fx.Node, seconds: float, product: bool, learns: Container[fx.Node], state: Container[fx.Node]
) -> dict[fx.Node, float]:
    """Argument -> seconds of its gradient, where the forward of the call takes `seconds`.

    product    whether the call is one;  learns: what a gradient may flow to;  state: parameters, their views
    """
    given = [a for a in node.all_input_nodes if "val" in a.meta and differentiable(a.meta["val"])]
    into = [a for a in given if a in learns] if node in learns else []
    if product:
        added = [v for name, v in arguments(node).items() if name in ADDED]
        factors = [a for a in given if a not in added] or given
        return {a: BACKWARD * seconds / len(factors) if a in factors else 0.0 for a in into}
    own, made = [a for a in into if a in state], [a for a in into if a not in state]
    whole = BACKWARD * seconds / (2 if own and made else 1)
    return {a: whole / len(kind) for kind in (own, made) for a in kind}
