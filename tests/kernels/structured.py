"""What the tests of the structured matrices' operators share: results, and bounds."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def results(f, args, dy, *rest):
    """y and the gradients of the tensors among `args`."""
    given = [t if t is None else t.detach().clone().requires_grad_() for t in args]
    y = f(*given, *rest)
    leaves = [t for t in given if t is not None]
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def absolute(f, args, dy, *rest):
    """The same list of every sum's absolute terms: what its rounding error goes with."""
    given = [t if t is None else t.detach().double().abs() for t in args]
    return results(f, given, dy.double().abs(), *rest)


def within(got, exact, terms, eps, roundings):
    """Each element is within `roundings` eps of the sum of its absolute terms, to first order."""
    assert got.shape == exact.shape
    got, exact, terms = (t.detach().double().cpu() for t in (got, exact, terms))
    assert torch.isfinite(got).all()
    excess = (got - exact).abs() - roundings * eps * terms
    assert not got.numel() or excess.max() <= 0, f"{excess.max():.3g} over the bound"
