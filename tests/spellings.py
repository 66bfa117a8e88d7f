"""Idioms in many spellings: functions of one module and inputs that mean the same, and near ones that do not.

An idiom names its parameters with their shapes, its inputs with theirs, the spellings (`same`), the near
spellings (`other`), and the operators that its canonical form consists of. Every function takes the module
that holds the parameters, then the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = Callable[..., Any]
B, S, E, H, D, M = 2, 5, 12, 3, 4, 16  # batch, sequence, width, heads, width of a head, width of the MLP
EPS = 1e-6


@dataclass
class Idiom:
    """One meaning; `ops` are the operators its canonical form must show."""

    name: str
    ops: tuple[str, ...]
    state: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((B, S, E),)
    same: list[Function] = field(default_factory=list)
    other: list[Function] = field(default_factory=list)


class Written(nn.Module):
    """A function as a module with the parameters of its idiom."""

    def __init__(
        self, function: Function, state: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        for name, shape in state.items():
            value = torch.randn(shape, generator=generator) / 2 + (0.5 if len(shape) == 1 else 0.0)
            setattr(self, name, nn.Parameter(value.to(dtype)))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


IDIOMS: list[Idiom] = []


def idiom(name: str, ops: str, *inputs: tuple[int, ...], **state: tuple[int, ...]) -> Idiom:
    made = Idiom(name, tuple(ops.split()), state, inputs or ((B, S, E),))
    IDIOMS.append(made)
    return made


# -- activations -----------------------------------------------------------------------------------

silu = idiom("silu", "silu")
silu.same += [
    lambda m, x: F.silu(x),
    lambda m, x: x * torch.sigmoid(x),
    lambda m, x: torch.sigmoid(x).mul(x),
    lambda m, x: x / (1 + torch.exp(-x)),
    lambda m, x: x * (1 / (1 + (-x).exp())),
    lambda m, x: x * torch.special.expit(x),
    lambda m, x: F.silu(x.clone(), inplace=True),
    lambda m, x: x.clone().mul_(x.sigmoid()),
]
silu.other += [
    lambda m, x: x * torch.sigmoid(1.702 * x),
    lambda m, x: x * torch.tanh(x),
    lambda m, x: x / (1 + torch.exp(x)),
    lambda m, x: x / (2 + torch.exp(-x)),
    lambda m, x: x * torch.sigmoid(x.flip(-1)),
]

gelu = idiom("gelu", "gelu")
gelu.same += [
    lambda m, x: F.gelu(x),
    lambda m, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    lambda m, x: 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865476)),
    lambda m, x: x * (0.5 * (1.0 + torch.special.erf(x / 2**0.5))),
    lambda m, x: x * (0.5 + 0.5 * torch.erf(x * math.sqrt(0.5))),
    lambda m, x: x * (1.0 + torch.erf(x / torch.sqrt(torch.tensor(2.0)))) / 2,
]
gelu.other += [
    lambda m, x: x * (1.0 + torch.erf(x / math.sqrt(2.0))),
    lambda m, x: 0.5 * x * (1.0 + torch.erf(x)),
    lambda m, x: 0.5 * x * (1.0 - torch.erf(x / math.sqrt(2.0))),
    lambda m, x: F.gelu(x, approximate="tanh"),
]

gelu_tanh = idiom("gelu, tanh", "gelu")
K = math.sqrt(2 / math.pi)
gelu_tanh.same += [
    lambda m, x: F.gelu(x, approximate="tanh"),
    lambda m, x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * torch.pow(x, 3.0)))),
    lambda m, x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * x * x * x))),
    lambda m, x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))),
    lambda m, x: x * 0.5 * (1 + torch.tanh(x * 0.7978845608028654 * (1.0 + 0.044715 * x.square()))),
    lambda m, x: (torch.tanh((x**3 * 0.044715 + x) * K) + 1) * x * 0.5,
]
gelu_tanh.other += [
    lambda m, x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
    lambda m, x: 0.5 * x * (1 + torch.tanh(K * (x + 0.0447 * x**3))),
    lambda m, x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * x**2))),
    lambda m, x: F.gelu(x),
]

# -- softmax ---------------------------------------------------------------------------------------

softmax = idiom("softmax", "softmax")
softmax.same += [
    lambda m, x: x.softmax(-1),
    lambda m, x: F.softmax(x, dim=2),
    lambda m, x: torch.softmax(x, -1, dtype=torch.float32),
    lambda m, x: x.exp() / x.exp().sum(-1, keepdim=True),
    lambda m, x: _shifted(x) / _shifted(x).sum(-1, keepdim=True),
    lambda m, x: (e := torch.exp(x - x.max(-1, keepdim=True)[0])) * (1 / e.sum(-1, keepdim=True)),
    lambda m, x: (e := torch.exp(x - x.max(-1, keepdim=True)[0].detach())) / e.sum((-1,), keepdim=True),
    lambda m, x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
    lambda m, x: F.log_softmax(x, -1).exp(),
]
softmax.other += [
    lambda m, x: x.softmax(-2),
    lambda m, x: x.exp() / x.exp().sum(-2, keepdim=True),
    lambda m, x: x.exp() / x.sum(-1, keepdim=True),
    lambda m, x: (x - x.amax(-2, keepdim=True)).softmax(-1),
    lambda m, x: x.log_softmax(-1),
    lambda m, x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1),
]


def _shifted(x: Tensor) -> Tensor:
    return torch.exp(x - x.amax(-1, keepdim=True))


log_softmax = idiom("log softmax", "log_softmax")
log_softmax.same += [
    lambda m, x: F.log_softmax(x, -1),
    lambda m, x: torch.log(torch.softmax(x, -1)),
    lambda m, x: x - x.logsumexp(-1, keepdim=True),
    lambda m, x: x - torch.log(torch.exp(x).sum(-1, keepdim=True)),
    lambda m, x: (y := x - x.amax(-1, keepdim=True)) - y.exp().sum(-1, keepdim=True).log(),
]
log_softmax.other += [lambda m, x: x - x.logsumexp(1, keepdim=True), lambda m, x: torch.log(torch.sigmoid(x))]

# -- norms -----------------------------------------------------------------------------------------

rms_norm = idiom("rms norm", "rms_norm", w=(E,))
rms_norm.same += [
    lambda m, x: F.rms_norm(x, (E,), m.w, EPS),
    lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    lambda m, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * m.w,
    lambda m, x: (x.float() * torch.rsqrt(x.float().square().mean(-1, True) + EPS)).type_as(x) * m.w,
    lambda m, x: x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS) * m.w,
    lambda m, x: x * (torch.mean(x**2, -1, keepdim=True) + EPS).pow(-0.5) * m.w,
    lambda m, x: x * (1 / (x.pow(2).sum(-1, keepdim=True) / E + EPS).sqrt()) * m.w,
    lambda m, x: (m.w * x) * torch.rsqrt(x.pow(2).mean(2, keepdim=True).add(EPS)),
    lambda m, x: x * (m.w * torch.rsqrt(EPS + x.pow(2).mean(-1, keepdim=True))),
    lambda m, x: F.rms_norm(x, (E,), None, EPS).mul(m.w),
]
rms_norm.other += [
    lambda m, x: m.w * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS)),  # eps outside of the root
    lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + EPS)),
    lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
    lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (E - 1) + EPS)),
    lambda m, x: (1 + m.w) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    lambda m, x: m.w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS)),
    lambda m, x: F.rms_norm(x, (E,), m.w),
]

layer_norm = idiom("layer norm", "layer_norm", w=(E,), b=(E,))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)


@layer_norm.same.append
def _layer_norm_by_squares(m: Any, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * m.w + m.b


@layer_norm.same.append
def _layer_norm_by_var_mean(m: Any, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
    return m.b + m.w * ((x - mean) * torch.rsqrt(variance + EPS))


layer_norm.same += [
    lambda m, x: F.layer_norm(x, (E,), m.w, m.b, EPS),
    lambda m, x: F.layer_norm(x, (E,), eps=EPS) * m.w + m.b,
    lambda m, x: (x - x.mean(-1, keepdim=True)) / (_moments(x)[1] + EPS).sqrt() * m.w + m.b,
    lambda m, x: (x - _moments(x)[0]) * (_moments(x)[1] + EPS) ** -0.5 * m.w + m.b,
    lambda m, x: torch.addcmul(m.b.expand_as(x), (x - _moments(x)[0]) * (_moments(x)[1] + EPS).rsqrt(), m.w),
    lambda m, x: m.w * (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt() + m.b,
    lambda m, x: (
        (x - x.mean(-1, True)) * torch.rsqrt((x * x).mean(-1, True) - x.mean(-1, True) ** 2 + EPS) * m.w + m.b
    ),
    lambda m, x: torch.native_layer_norm(x, (E,), m.w, m.b, EPS)[0],
]
layer_norm.other += [
    lambda m, x: (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + EPS).sqrt() * m.w + m.b,  # unbiased
    lambda m, x: (x - x.mean(-1, True)) / (_moments(x)[1].sqrt() + EPS) * m.w + m.b,
    lambda m, x: (x - x.mean(-2, True)) / (_moments(x)[1] + EPS).sqrt() * m.w + m.b,
    lambda m, x: x / (_moments(x)[1] + EPS).sqrt() * m.w + m.b,
    lambda m, x: (x - x.mean(-1, True)) / (_moments(x)[1] + EPS).sqrt() * (m.w + m.b),
    lambda m, x: F.layer_norm(x, (E,), m.b, m.w, EPS),
]

mean = idiom("mean over the sequence", "mean")
mean.same += [
    lambda m, x: x.mean(1),
    lambda m, x: x.mean(dim=[-2]),
    lambda m, x: x.sum(1) / x.shape[1],
    lambda m, x: x.transpose(1, 2).mean(-1),
]
mean.other += [lambda m, x: x.mean(-1), lambda m, x: x.sum(1) / x.shape[0], lambda m, x: x.sum(1) / 5]

# -- linear ----------------------------------------------------------------------------------------

linear = idiom("linear", "linear", w=(M, E), b=(M,))
linear.same += [
    lambda m, x: F.linear(x, m.w, m.b),
    lambda m, x: x @ m.w.t() + m.b,
    lambda m, x: m.b + torch.matmul(x, m.w.mT),
    lambda m, x: torch.einsum("bse,me->bsm", x, m.w) + m.b,
    lambda m, x: torch.einsum("me,...e->...m", m.w, x) + m.b,
    lambda m, x: torch.addmm(m.b, x.view(-1, E), m.w.t()).view(x.shape[0], x.shape[1], M),
    lambda m, x: torch.addmm(m.b, x.reshape(-1, E), m.w.T).reshape(*x.shape[:-1], -1),
    lambda m, x: torch.mm(x.flatten(0, 1), m.w.transpose(0, 1)).unflatten(0, x.shape[:2]) + m.b,
    lambda m, x: torch.bmm(x, m.w.t().unsqueeze(0).expand(x.shape[0], -1, -1)) + m.b,
    lambda m, x: torch.baddbmm(m.b, x, m.w.t().expand(x.shape[0], E, M)),
]
linear.other += [
    lambda m, x: F.linear(x, m.w),
    lambda m, x: F.linear(x, m.w, m.b * 2),
    lambda m, x: torch.addmm(m.b, x.view(-1, E), m.w.t(), alpha=2).view(x.shape[0], x.shape[1], M),
    lambda m, x: torch.addmm(m.b, x.view(-1, E), m.w.t(), beta=0).view(x.shape[0], x.shape[1], M),
    lambda m, x: F.linear(x.flip(-1), m.w, m.b),
]

conv1d = idiom("linear of a transposed weight", "permute linear", w=(E, M), b=(M,))
conv1d.same += [
    lambda m, x: torch.addmm(m.b, x.view(-1, x.size(-1)), m.w).view((*x.size()[:-1], M)),
    lambda m, x: x @ m.w + m.b,
    lambda m, x: torch.einsum("bse,em->bsm", x, m.w) + m.b,
    lambda m, x: F.linear(x, m.w.t(), m.b),
]
conv1d.other += [lambda m, x: x @ m.w - m.b, lambda m, x: x @ m.w.reshape(M, E).t() + m.b]

# -- gated units, residuals ------------------------------------------------------------------------

swiglu = idiom("SwiGLU", "linear linear silu mul linear", g=(M, E), u=(M, E), d=(E, M))
swiglu.same += [
    lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * F.linear(x, m.u), m.d),
    lambda m, x: (F.linear(x, m.u) * F.silu(x @ m.g.t())) @ m.d.t(),
    lambda m, x: F.linear((a := F.linear(x, m.g)) * torch.sigmoid(a) * F.linear(x, m.u), m.d),
    lambda m, x: F.linear(F.linear(x, m.u) * (a := F.linear(x, m.g)) / (1 + torch.exp(-a)), m.d),
    lambda m, x: F.linear(F.dropout(F.silu(F.linear(x, m.g)), 0.5, False) * F.linear(x, m.u), m.d),
]
swiglu.other += [
    lambda m, x: F.linear(F.silu(F.linear(x, m.u)) * F.linear(x, m.g), m.d),  # gate and up changed places
    lambda m, x: F.linear(F.silu(F.linear(x, m.g)) + F.linear(x, m.u), m.d),
    lambda m, x: F.linear(F.silu(F.linear(x, m.g) * F.linear(x, m.u)), m.d),
    lambda m, x: F.linear(F.dropout(F.silu(F.linear(x, m.g)), 0.5, True) * F.linear(x, m.u), m.d),
]

geglu = idiom("GeGLU, packed", "linear split gelu mul", w=(2 * M, E))
geglu.same += [
    lambda m, x: (p := F.linear(x, m.w).chunk(2, -1))[0] * F.gelu(p[1]),
    lambda m, x: F.gelu((y := x @ m.w.t())[..., M:]) * y[..., :M],
    lambda m, x: (p := F.linear(x, m.w).split(M, dim=-1))[0] * F.gelu(p[1]),
    lambda m, x: (p := torch.tensor_split(F.linear(x, m.w), 2, 2))[0] * F.gelu(p[1]),
    lambda m, x: (y := F.linear(x, m.w)).narrow(-1, 0, M) * F.gelu(y.narrow(2, M, M)),
    lambda m, x: (p := torch.split(F.linear(x, m.w), [M, M], 2))[0] * F.gelu(p[1]),
]
geglu.other += [
    lambda m, x: (p := F.linear(x, m.w).chunk(2, -1))[1] * F.gelu(p[0]),
    lambda m, x: (y := F.linear(x, m.w))[..., ::2] * F.gelu(y[..., 1::2]),
    lambda m, x: (p := F.linear(x, m.w).chunk(2, -1))[0] * F.gelu(p[0]),
]

residual = idiom("residual", "linear relu linear add", w=(M, E), v=(E, M))
residual.same += [
    lambda m, x: x + F.linear(F.relu(F.linear(x, m.w)), m.v),
    lambda m, x: F.linear(F.relu(x @ m.w.t()), m.v) + x,
    lambda m, x: F.linear(F.relu_(F.linear(x, m.w)), m.v).add_(x),
    lambda m, x: torch.add(x.contiguous(), F.dropout(F.linear(F.linear(x, m.w).relu(), m.v), 0.0, True)),
    lambda m, x: x - -F.linear(F.relu(F.linear(x, m.w)), m.v),
]
residual.other += [
    lambda m, x: torch.add(x, F.linear(F.relu(F.linear(x, m.w)), m.v), alpha=2),
    lambda m, x: x - F.linear(F.relu(F.linear(x, m.w)), m.v),
    lambda m, x: F.linear(x + F.relu(F.linear(x, m.w)) @ m.v.t(), torch.eye(E)),
]


def rows(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """GPT-2's Conv1D."""
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view((*x.size()[:-1], w.shape[1]))


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(K * (x + 0.044715 * torch.pow(x, 3.0))))


# Of one batch, its rows are a squeeze, which what comes behind is not to meet.
single = idiom(
    "MLP of a single batch", "permute linear gelu linear add",
    (1, S, E), w=(E, M), b=(M,), v=(M, E), c=(E,),
)  # fmt: skip
single.same += [
    lambda m, x: x + F.linear(F.gelu(F.linear(x, m.w.t(), m.b), approximate="tanh"), m.v.t(), m.c),
    lambda m, x: rows(new_gelu(rows(x, m.w, m.b)), m.v, m.c) + x,
    lambda m, x: x + (new_gelu(x.squeeze(0) @ m.w + m.b) @ m.v + m.c).unsqueeze(0),
    lambda m, x: rows(new_gelu(rows(x.view(1, -1, 3, 4).reshape(1, -1, E), m.w, m.b)), m.v, m.c) + x,
]
single.other += [
    lambda m, x: rows(new_gelu(rows(x, m.w, m.b)), m.v, m.c) - x,
    lambda m, x: x[0] + rows(new_gelu(rows(x, m.w, m.b)), m.v, m.c)[0],
]


# -- small things ----------------------------------------------------------------------------------

glu = idiom("glu", "split sigmoid mul", w=(12,))
glu.same += [
    lambda m, x: F.glu(x * m.w, -1),
    lambda m, x: (p := (x * m.w).chunk(2, 2))[0] * torch.sigmoid(p[1]),
    lambda m, x: (y := x * m.w)[..., :6] * (1 / (1 + torch.exp(-y[..., 6:]))),
]
glu.other += [
    lambda m, x: (p := (x * m.w).chunk(2, 2))[1] * torch.sigmoid(p[0]),
    lambda m, x: (p := (x * m.w).chunk(2, 2))[0] * torch.tanh(p[1]),
]

signs = idiom("signs and numbers", "sub neg", (B, S), (B, S))
signs.same += [
    lambda m, x, y: ((x - y) * 2, -y),
    lambda m, x, y: ((x + -y) * 2, y * -1),
    lambda m, x, y: (torch.rsub(y, x).mul(2.0), y.neg().neg().neg()),
    lambda m, x, y: (2 * torch.sub(x, y, alpha=1), y / -1),
    lambda m, x, y: ((-y + x) * torch.tensor(2.0), y.neg() + 0),
]
signs.other += [
    lambda m, x, y: ((y - x) * 2, -y),
    lambda m, x, y: (torch.sub(x, y, alpha=2), -y),
    lambda m, x, y: (x - y * 2, -y),
]

masks = idiom("masks", "ge where", (B, S, S), (S,), (S,))
masks.same += [
    lambda m, x, i, j: torch.where((i[:, None] * 3).long() >= (j * 3).long(), x, 0.0),
    lambda m, x, i, j: x.masked_fill((i * 3).long()[:, None] < (j * 3).long(), 0),
    lambda m, x, i, j: x.masked_fill(~((j * 3).long()[None] <= (i * 3).long().unsqueeze(-1)), 0.0),
    lambda m, x, i, j: torch.where(_at_least(i, j) & torch.ones_like(_at_least(i, j)), x, torch.zeros(())),
    lambda m, x, i, j: x.masked_fill((_at_least(i, j) == False).expand(x.shape[0], -1, -1), 0.0),  # noqa: E712
    lambda m, x, i, j: x.masked_fill(torch.logical_not(_at_least(i, j).unsqueeze(0) != 0), 0.0),
]
masks.other += [
    lambda m, x, i, j: torch.where((i[:, None] * 3).long() > (j * 3).long(), x, 0.0),
    lambda m, x, i, j: torch.where((i * 3).long() >= (j * 3).long()[:, None], x, 0.0),
    lambda m, x, i, j: torch.where(_at_least(i, j), 0.0, x),
    lambda m, x, i, j: torch.where(_at_least(i, j), x, 1.0),
]


def _at_least(i: Tensor, j: Tensor) -> Tensor:
    return (i * 3).long()[:, None].ge((j * 3).long())


additive = idiom("an added mask", "where add", (B, S, S), (S,), (S,))
additive.same += [
    lambda m, x, i, j: x + torch.where(_at_least(i, j), torch.zeros(()), -9.0),
    lambda m, x, i, j: (
        x + torch.where(_at_least(i, j)[None].expand(x.shape[0], -1, -1), torch.zeros(()), -9.0)
    ),
    lambda m, x, i, j: torch.where(~_at_least(i, j).expand_as(x), -9, torch.full((), 0.0)).add(x),
]
additive.other += [
    lambda m, x, i, j: x + torch.where(_at_least(i, j), -9.0, torch.zeros(())),
    lambda m, x, i, j: x + torch.where(_at_least(j, i), torch.zeros(()), -9.0),
]

counts = idiom("counting", "arange add mean", (B, S))
counts.same += [
    lambda m, x: x.mean() * (torch.arange(x.shape[1]) + 3),
    lambda m, x: x.mean((0, 1)) * (torch.arange(0, x.shape[1], 1) + 1 + 2),
    lambda m, x: x.sum() / (x.shape[0] * x.shape[1]) * torch.arange(0, x.shape[1]).add(3),
]
counts.other += [
    lambda m, x: x.mean() * torch.arange(3, 3 + x.shape[1]),
    lambda m, x: x.mean() * (torch.arange(1, x.shape[1] + 1) + 3),
]
