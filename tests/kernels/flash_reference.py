"""Attention with scores in full, written from its meaning: what the Triton kernels are tested with.

Expressions are Python, evaluated as such over tensors of indices.
"""

from dataclasses import dataclass, field, replace

import torch

from fxaccel.kernels import _flash

FUNCTIONS = {
    "min": lambda x, y: torch.minimum(*both(x, y)),
    "max": lambda x, y: torch.maximum(*both(x, y)),
    "where": lambda c, x, y: torch.where(torch.as_tensor(c), *both(x, y)),
    "float": lambda x: x.to(torch.float64),
    "abs": abs,
}


def both(x, y):
    if not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor):
        return torch.as_tensor(x), torch.as_tensor(y)
    like = x if isinstance(x, torch.Tensor) else y
    return torch.as_tensor(x, device=like.device), torch.as_tensor(y, device=like.device)


def evaluated(text, tables, b, h, s, t, device):
    """An expression over [b, h, s, t], broadcast."""
    sizes = dict(zip("bhqk", (b, h, s, t), strict=True))
    names = {"S": s, "T": t, **{f"t{i}": table for i, table in enumerate(tables)}, **FUNCTIONS}
    for at, (name, size) in enumerate(sizes.items()):
        names[name] = torch.arange(size, device=device).view([-1 if i == at else 1 for i in range(4)])
    value = eval(text, {}, names)
    return torch.as_tensor(value, device=device).expand(b, h, s, t)


@dataclass
class Case:
    """An attention: its inputs and what is asked of it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    tables: list = field(default_factory=list)
    mask: str = ""
    bias: str = ""
    scale: float = 0.3
    softcap: float = 0.0
    sinks: torch.Tensor | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None
    wanted: tuple = ()

    @property
    def inputs(self):
        return (self.q, self.k, self.v, self.tables, self.mask, self.bias)

    @property
    def rest(self):
        return (self.scale, self.softcap, self.sinks, self.dropout, self.seed)

    def to(self, dtype):
        """The case with every floating tensor in `dtype`."""

        def cast(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        changed = {n: cast(getattr(self, n)) for n in ("q", "k", "v", "dout", "sinks")}
        return replace(self, tables=[cast(t) for t in self.tables], **changed)


def launched(case):
    """[out, dq, dk, dv, dsinks?, dtables ...] of the Triton kernels, the last ones in the inputs' dtypes."""
    out, lse = _flash.launch_forward(*case.inputs, *case.rest, save=True)
    wanted = case.wanted or (False,) * (len(case.tables) + 1)
    *grads, dsinks, dtables = _flash.launch_backward(case.dout, *case.inputs, out, lse, *case.rest, wanted)
    made = [dsinks, *dtables]
    sources = [case.sinks, *case.tables]
    extra = [x.to(source.dtype) for x, source in zip(made, sources, strict=True) if x is not None]
    assert [x is not None for x in (*dtables, dsinks)] == [*wanted]
    return [out, *grads, *extra]


def kept(case):
    """Which weights dropout keeps, [B, H, S, T]: with v the identity, out is the weights."""
    if not case.dropout:
        return None
    t = case.k.shape[2]
    eye = torch.eye(t, device=case.q.device).to(case.q.dtype).expand(*case.k.shape[:2], t, t)
    none = replace(
        case, v=eye, k=torch.zeros_like(case.k), mask="", bias="", sinks=None, softcap=0.0, tables=[]
    )
    return _flash.launch_forward(*none.inputs, *none.rest)[0] > 0


def weights(case, f, keep=None, tables=None, sinks=None, q=None, k=None):
    """P and P after dropout in dtype f; 0 in rows that keep no key."""
    q, k = case.q.to(f) if q is None else q, case.k.to(f) if k is None else k
    (b, h, s, _), t = q.shape, k.shape[2]
    n = h // k.shape[1]
    scores = q @ k.repeat_interleave(n, 1).mT * case.scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    args = (case.tables if tables is None else tables, b, h, s, t, q.device)
    if case.bias:
        scores = scores + evaluated(case.bias, *args).to(f)
    if case.mask:
        scores = scores.masked_fill(~evaluated(case.mask, *args), -torch.inf)
    if case.sinks is not None:
        extra = case.sinks.to(f) if sinks is None else sinks
        scores = torch.cat([scores, extra[None, :, None, None].expand(b, h, s, 1)], -1)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    p = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)[..., :t]
    return p, p if keep is None else p * keep / (1 - case.dropout) if case.dropout < 1 else p * 0


def expected(case, f, keep=None):
    """The same list in dtype f by autograd, rounded to the inputs' dtypes at the end."""
    q, k, v = (x.detach().to(f).requires_grad_() for x in (case.q, case.k, case.v))
    wanted = case.wanted or (False,) * (len(case.tables) + 1)
    tables = [
        t.detach().to(f).requires_grad_(w) if t.is_floating_point() else t
        for t, w in zip(case.tables, wanted, strict=False)
    ]
    sinks = None if case.sinks is None else case.sinks.detach().to(f).requires_grad_(wanted[-1])
    _, p = weights(case, f, keep, tables, sinks, q, k)
    out = p @ v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    extra = [x for x in (sinks, *tables) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(
        out, (q, k, v, *extra), case.dout.to(f), allow_unused=True, materialize_grads=True
    )
    sources = [case.q, case.q, case.k, case.v]
    sources += [x for x, w in zip((case.sinks, *case.tables), (wanted[-1], *wanted), strict=False) if w]
    return [x.detach().to(source.dtype) for x, source in zip((out, *grads), sources, strict=True)]


def sums_of_terms(case, keep=None):
    """The same list with every sum over absolute values, in fp64: what its rounding errors go with."""
    wanted = case.wanted or (False,) * (len(case.tables) + 1)
    double = case.to(torch.float64)
    p, dropped = weights(double, torch.float64, keep)
    q, k, v, dout = (x.abs() for x in (double.q, double.k, double.v, double.dout))
    n = q.shape[1] // k.shape[1]
    wide = lambda x: x.repeat_interleave(n, 1)  # noqa: E731
    group = lambda x: x.unflatten(1, (-1, n)).sum(2)  # noqa: E731
    out = dropped @ wide(v)
    delta = (dout * out).sum(-1, keepdim=True)
    factor = 1.0 if keep is None else keep / (1 - case.dropout)
    ds = p * (factor * (dout @ wide(v).mT) + delta)
    sums = [out, abs(case.scale) * ds @ wide(k), group(abs(case.scale) * ds.mT @ q), group(dropped.mT @ dout)]
    if wanted[-1]:
        sums.append((p.sum(-1, keepdim=True).mul(-1).add(1) * delta).sum((0, 2, 3)))
    if any(wanted[:-1]):
        tables = [t.detach().clone().requires_grad_(w) for t, w in zip(double.tables, wanted, strict=False)]
        bias = evaluated(case.bias, tables, *q.shape[:3], k.shape[2], q.device)
        sums += torch.autograd.grad(bias, [t for t in tables if t.requires_grad], ds)
    return sums


def compare(near, case, got=None, ulps=4):
    """Hold what the kernels give against fp64, allowing what eager mode in fp32 loses."""
    keep = kept(case)
    single = torch.float32
    found = zip(
        launched(case) if got is None else got,
        expected(case, single, keep),
        expected(case.to(torch.float64), torch.float64, keep),
        sums_of_terms(case, keep),
        strict=True,
    )
    for got_, eager, exact, terms in found:
        near(got_, eager, exact, terms, case.q.dtype, ulps)
