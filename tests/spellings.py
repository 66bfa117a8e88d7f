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

    def __init__(self, function: Function, state: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
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
    lambda m, x: (x - x.mean(-1, True)) * torch.rsqrt((x * x).mean(-1, True) - x.mean(-1, True) ** 2 + EPS) * m.w + m.b,
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
    lambda m, x: torch.addmm(m.b, x.view(-1, x.size(-1)), m.w).view(x.size()[:-1] + (M,)),
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

# -- attention -------------------------------------------------------------------------------------

PROJECTIONS = {"q": (E, E), "k": (E, E), "v": (E, E)}
SCALE = D**-0.5
attention = idiom("attention", "linear reshape permute matmul mul softmax matmul", **PROJECTIONS)


def _heads(m: Any, x: Tensor) -> list[Tensor]:
    """q, k, v of shape [B, H, S, D]."""
    return [F.linear(x, w).view(*x.shape[:2], H, D).transpose(1, 2) for w in (m.q, m.k, m.v)]


def _flat_heads(m: Any, x: Tensor) -> list[Tensor]:
    """q, k, v of shape [B * H, S, D]."""
    return [t.reshape(-1, x.shape[1], D) for t in _heads(m, x)]


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], E)


def _attend(weights: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Attention whose weights are a function of q and k."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = _heads(m, x)
        return _merge(weights(q, k) @ v)

    return run


@attention.same.append
def _einsum_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(*x.shape[:2], H, D) for w in (m.q, m.k, m.v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], E)


@attention.same.append
def _bmm_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    y = torch.bmm(torch.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), -1), v)
    return _merge(y.view(x.shape[0], H, x.shape[1], D))


@attention.same.append
def _baddbmm_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    nothing = torch.empty(q.shape[0], x.shape[1], x.shape[1])
    weights = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE).softmax(-1)
    return _merge(torch.bmm(weights, v).view(x.shape[0], H, x.shape[1], D))


attention.same += [
    _attend(lambda q, k: (q @ k.transpose(-1, -2) * SCALE).softmax(-1)),
    _attend(lambda q, k: (q @ k.transpose(2, 3) / math.sqrt(D)).softmax(dim=-1)),
    _attend(lambda q, k: ((q * SCALE) @ k.mT).softmax(-1)),
    _attend(lambda q, k: (q @ (k * SCALE).permute(0, 1, 3, 2)).softmax(-1)),
    _attend(lambda q, k: ((q / D**0.25) @ (k / D**0.25).transpose(-2, -1)).softmax(-1)),
    _attend(lambda q, k: ((q @ k.swapaxes(2, 3)) / torch.sqrt(torch.tensor(float(D)))).softmax(-1)),
    _attend(lambda q, k: F.dropout(F.softmax(q @ k.movedim(-1, -2) * SCALE, -1, dtype=torch.float32).to(q.dtype), 0.1, False)),
    _attend(lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k).div(D**0.5).softmax(-1)),
    _attend(lambda q, k: torch.einsum("...qd,...kd->...qk", q * SCALE, k).softmax(-1)),
    _attend(lambda q, k: (s := torch.exp(q @ k.mT * SCALE)) / s.sum(-1, keepdim=True)),
]
attention.other += [
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-2)),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(1)),
    _attend(lambda q, k: (k @ q.mT * SCALE).softmax(-1)),  # q and k changed places
    _attend(lambda q, k: (q @ k.reshape(*k.shape[:2], D, -1) * SCALE).softmax(-1)),  # not a transpose
    _attend(lambda q, k: (q @ k.flip(1).mT * SCALE).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * D).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-1) * SCALE),
    _attend(lambda q, k: F.dropout((q @ k.mT * SCALE).softmax(-1), 0.5, True)),
    _attend(lambda q, k: (q @ k.mT * SCALE).sigmoid()),
]

causal = idiom("causal attention", "matmul mul where softmax matmul", **PROJECTIONS)


def _lower(x: Tensor) -> Tensor:
    n = x.shape[-2]
    return torch.ones(n, n, dtype=torch.bool).tril()


causal.same += [
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q), float("-inf")).softmax(-1)),
    _attend(lambda q, k: torch.where(_lower(q), q @ k.mT * SCALE, float("-inf")).softmax(-1)),
    _attend(lambda q, k: torch.where(_lower(q), q @ k.mT / D**0.5, torch.tensor(float("-inf"))).softmax(-1)),
    _attend(lambda q, k: ((q * SCALE) @ k.mT).masked_fill(_lower(q) == 0, -math.inf).softmax(-1)),
    _attend(lambda q, k: ((q * SCALE) @ k.mT).masked_fill(torch.logical_not(_lower(q))[None, None], -math.inf).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT).mul_(SCALE).masked_fill_(~_lower(q), -math.inf).softmax(-1)),
]
causal.other += [
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(_lower(q), float("-inf")).softmax(-2)),
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q).T, float("-inf")).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~_lower(q), -1.0).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).masked_fill(~torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(1), -math.inf).softmax(-1)),
    _attend(lambda q, k: (q @ k.mT * SCALE).softmax(-1).masked_fill(~_lower(q), 0.0)),
]

biased = idiom("attention with a bias", "matmul mul add softmax matmul", (B, S, E), (S, S), **PROJECTIONS)


def _attend_biased(weights: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    def run(m: Any, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = _heads(m, x)
        return _merge(weights(q, k, bias) @ v)

    return run


@biased.same.append
def _baddbmm_biased(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = _flat_heads(m, x)
    y = torch.baddbmm(bias, q, k.mT, beta=1, alpha=SCALE).softmax(-1).bmm(v)
    return _merge(y.view(x.shape[0], H, x.shape[1], D))


@biased.same.append
def _opt_attention(m: Any, x: Tensor, bias: Tensor) -> Tensor:
    """As OPT and BART had it: the mask is added to scores that are viewed as 4-d and flattened again."""
    q, k, v = _flat_heads(m, x)
    n = x.shape[1]
    scores = torch.bmm(q * SCALE, k.transpose(1, 2)).view(x.shape[0], H, n, n) + bias[None, None]
    y = torch.bmm(F.softmax(scores.view(-1, n, n), dim=-1), v)
    return _merge(y.view(x.shape[0], H, n, D))


biased.same += [
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a).softmax(-1)),
    _attend_biased(lambda q, k, a: (a + q @ k.mT / D**0.5).softmax(-1)),
    _attend_biased(lambda q, k, a: torch.add(a, q @ k.mT, alpha=SCALE).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a.expand(q.shape[0], H, -1, -1)).softmax(-1)),
]
biased.other += [
    _attend_biased(lambda q, k, a: ((q @ k.mT + a) * SCALE).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE - a).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE + a.t()).softmax(-1)),
    _attend_biased(lambda q, k, a: (q @ k.mT * SCALE * a).softmax(-1)),
]

grouped = idiom("grouped heads", "unsqueeze expand reshape matmul", (B, 2 * H, S, D), (B, H, S, D), k=(1,))
grouped.same += [
    lambda m, q, k: q @ k.repeat_interleave(2, dim=1).mT,
    lambda m, q, k: q @ torch.repeat_interleave(k, 2, 1).transpose(2, 3),
    lambda m, q, k: q @ k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(*q.shape[:2], k.shape[2], k.shape[3]).mT,
    lambda m, q, k: q @ k.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2).mT,
]
grouped.other += [
    lambda m, q, k: q @ k.repeat(1, 2, 1, 1).mT,  # heads in another order
    lambda m, q, k: q @ k[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2).mT,
]



def _slice(y: Tensor, i: int) -> Tensor:
    return y[..., i * E : (i + 1) * E]


packed = idiom("packed projections, heads split and merged", "linear split reshape permute", w=(3 * E, E))
packed.same += [
    lambda m, x: [t.view(*x.shape[:2], H, D).transpose(1, 2) for t in F.linear(x, m.w).split(E, -1)],
    lambda m, x: [t.unflatten(-1, (H, D)).movedim(2, 1) for t in F.linear(x, m.w).chunk(3, dim=2)],
    lambda m, x: [_slice(y, i).reshape(*x.shape[:2], H, D).permute(0, 2, 1, 3) for y in [x @ m.w.t()] for i in range(3)],
]
packed.other += [
    lambda m, x: [t.view(*x.shape[:2], D, H).permute(0, 3, 1, 2) for t in F.linear(x, m.w).split(E, -1)],
    lambda m, x: [t.view(*x.shape[:2], H, D).transpose(1, 2) for t in reversed(F.linear(x, m.w).split(E, -1))],
    lambda m, x: [t.reshape(x.shape[0], H, x.shape[1], D) for t in F.linear(x, m.w).split(E, -1)],
]

stacked = idiom("packed projections, stacked", "linear reshape permute unbind", w=(3 * E, E))
stacked.same += [
    lambda m, x: list(F.linear(x, m.w).view(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)),
    lambda m, x: [(y := F.linear(x, m.w).reshape(*x.shape[:2], 3, H, D).permute(2, 0, 3, 1, 4))[0], y[1], y[2]],
    lambda m, x: [y[i] for y in [F.linear(x, m.w).unflatten(-1, (3, H, D)).movedim((2, 3), (0, 2))] for i in range(3)],
]
stacked.other += [
    lambda m, x: list(F.linear(x, m.w).view(*x.shape[:2], H, 3, D).permute(3, 0, 2, 1, 4).unbind(0)),
]

views = idiom("views", "mul permute reshape", (B, S, 6), w=(6,))
views.same += [
    lambda m, x: (x * m.w).transpose(0, 1).reshape(-1, 6),
    lambda m, x: (x * m.w).permute(1, 0, 2).contiguous().view(x.shape[0] * x.shape[1], 6),
    lambda m, x: (x * m.w).permute(2, 1, 0).permute(1, 2, 0).flatten(0, 1),
    lambda m, x: (x * m.w).swapdims(0, 1).unsqueeze(0).reshape(-1, 6),
    lambda m, x: (x * m.w).transpose(0, 1).clone().reshape(1, -1, 3, 2).flatten(2).squeeze(0),
    lambda m, x: torch.einsum("bse->sbe", x * m.w)[..., :].reshape(-1, 2, 3).reshape(-1, x.shape[2]),
]
views.other += [
    lambda m, x: (x * m.w).reshape(-1, 6),
    lambda m, x: (x * m.w).transpose(0, 1).reshape(-1, 3),
    lambda m, x: (x * m.w).transpose(1, 2).reshape(-1, 6),
]

rotary = idiom("rotary", "split neg cat mul mul add", (B, H, S, 8), (S, 8), (S, 8))
rotary.same += [
    lambda m, x, c, s: x * c + torch.cat((-x[..., 4:], x[..., :4]), -1) * s,
    lambda m, x, c, s: torch.cat([-(p := x.chunk(2, -1))[1], p[0]], dim=3) * s + x * c,
    lambda m, x, c, s: c[None, None] * x + s.unsqueeze(0) * torch.concat((x.split(4, -1)[1].neg(), x.split(4, -1)[0]), -1),
]
rotary.other += [
    lambda m, x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s,
    lambda m, x, c, s: x * s + torch.cat((-x[..., 4:], x[..., :4]), -1) * c,
    lambda m, x, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s,
]
