"""What a structured matrix is fitted to: a dense weight, and the norm in which the difference is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxaccel.errors import OptionError

DAMPING = 1e-10
"""Added to a gram's diagonal, in units of its mean: directions that the inputs never took count this much.

Of a fit it decides the parts that the inputs leave free, and costs sqrt(DAMPING) = 1e-5 of |W| at most.
"""


def wide(tensor: Tensor) -> Tensor:
    """A detached copy in float64 or complex128."""
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def root(gram: Tensor) -> Tensor:
    """Lower triangular R, of positive diagonal, with R R^H = gram [..., n, n].

    A gram summed in float32 has eigenvalues below zero by rounding: then they are raised to DAMPING of the
    mean of their sizes, and R belongs to the gram so changed.
    """
    found, failed = torch.linalg.cholesky_ex(gram)
    if not bool(failed.any()):
        return found
    values, vectors = torch.linalg.eigh(gram)
    least = DAMPING * values.abs().mean(-1, True).clamp_min(torch.finfo(values.dtype).tiny)
    half = vectors * values.maximum(least).sqrt()[..., None, :]
    triangle = torch.linalg.qr(half.mH, mode="r").R.mH
    sign = torch.diagonal(triangle, dim1=-2, dim2=-1).sgn()
    return triangle * sign.conj()[..., None, :]


def relative(gap: Tensor, weight: Tensor) -> float:
    """|E| / |W| of their squares; 0 where both are 0."""
    over, under = float(gap), float(weight)
    if under <= 0:
        return 0.0 if over <= 0 else math.inf
    return math.sqrt(max(0.0, over) / under)


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix with zeros below and to the right, [rows, columns]."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[-1], 0, rows - matrix.shape[-2]))


@dataclass(frozen=True)
class Target:
    """A weight W [rows, columns] and the norm |E| = sqrt(tr(E G E^H)); gram G None is the Frobenius norm.

    All float64 or complex128. `gram` is damped and positive definite, `root` its lower triangular root.
    """

    weight: Tensor
    gram: Tensor | None = None
    root: Tensor | None = None

    @classmethod
    def of(cls, weight: Tensor, gram: Tensor | None) -> Target:
        """From what a user gives: G [columns, columns] = sum x x^H, or a multiple of it."""
        if not bool(torch.isfinite(weight).all()):
            raise OptionError("the weight holds values that are not finite, expected finite ones")
        weight = wide(weight)
        if gram is None:
            return cls(weight)
        checked(weight, gram)
        gram = wide(gram).to(weight.device)
        gram = (gram + gram.mH) / 2
        scale = float(gram.diagonal().real.mean())
        if scale <= 0:
            return cls(weight)  # no input but zero was seen: every direction counts the same
        gram = (gram / scale).to(weight.dtype)
        gram.diagonal().add_(DAMPING)
        half = root(gram)
        return cls(weight, half @ half.mH, half)

    def square(self, difference: Tensor) -> Tensor:
        """|E|^2 over the last two dimensions."""
        if self.root is not None:
            difference = difference @ self.root
        return (difference.real**2 + (difference.imag**2 if difference.is_complex() else 0)).sum((-2, -1))

    def gram_padded(self, columns: int) -> Tensor | None:
        """The gram of inputs padded to `columns`; a padded input counts, so that its weights become zero."""
        if self.gram is None:
            return None
        more = torch.ones(columns - self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)
        return torch.block_diag(self.gram, torch.diag(more))


def checked(weight: Tensor, gram: Tensor) -> None:
    """Raises OptionError where the gram is none of this weight's inputs."""
    columns = weight.shape[-1]
    if tuple(gram.shape) != (columns, columns):
        raise OptionError(
            f"the gram is {list(gram.shape)}, expected [{columns}, {columns}]",
            "it is the sum of x x^T over inputs of the linear",
        )
    if gram.is_complex() and not weight.is_complex():
        raise OptionError(f"the gram is {gram.dtype}, expected a real one: the weight is {weight.dtype}")
    if not bool(torch.isfinite(gram).all()):
        raise OptionError("the gram holds values that are not finite, expected finite ones")
