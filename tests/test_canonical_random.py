"""The canonical form of random compositions: the same values, gradients, types, and nothing left to do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.canonical_checks import check
from tests.spellings import Written

# Each takes the module and two tensors of one shape [..., 6] and gives two of one shape again.
MOVES = [
    lambda m, x, y: (x + y, y),
    lambda m, x, y: (y * x, x),
    lambda m, x, y: (x - y * 2, x.neg()),
    lambda m, x, y: (x / 4, y / 3),
    lambda m, x, y: (x * x, -y),
    lambda m, x, y: (x * torch.sigmoid(x), y),
    lambda m, x, y: (x.tanh(), y / (1 + y * y).sqrt()),
    lambda m, x, y: (F.linear(x, m.w), y @ m.w),
    lambda m, x, y: (x @ m.w.t() + m.b, y),
    lambda m, x, y: (F.linear(x.reshape(-1, 6), m.w, m.b).view(x.shape), y),
    lambda m, x, y: (x.transpose(0, -2), y.transpose(0, -2)),
    lambda m, x, y: (x.unsqueeze(1).squeeze(1), y.contiguous()),
    lambda m, x, y: (x.flatten(0, -2).reshape(x.shape), y.clone()),
    lambda m, x, y: (torch.cat([p := x.chunk(2, -1)[1], -x[..., :3]], -1) + p.sum(), y),
    lambda m, x, y: (x.softmax(-1), y.exp() / y.exp().sum(-1, True)),
    lambda m, x, y: (F.rms_norm(x, (6,), m.b, 1e-3), y * (y.square().mean(-1, True) + 1e-3).rsqrt()),
    lambda m, x, y: ((x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt(), y),
    lambda m, x, y: (((x * 0.5) @ y.mT).softmax(-1) @ (y * 2), x),
    lambda m, x, y: (x.masked_fill(~(y > 0), 0.0), y.masked_fill(x < y, 1.0)),
    lambda m, x, y: ((x * 1).relu_(), (y + 0).add_(x)),
    lambda m, x, y: (x.double().float(), y.detach()),
    lambda m, x, y: (F.dropout(x, 0.5, True), F.dropout(y, 0.0, True)),
    lambda m, x, y: (x.expand(2, *x.shape).sum(0), y.expand_as(x) + x),
    lambda m, x, y: ((z := x * 2).view(-1)[:3].zero_().sum() + z, y),
]


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, len(MOVES) - 1), min_size=1, max_size=6))
def test_random_compositions(moves: list[int]):
    def function(m, x, y):
        x, y = x * m.b, y + m.b  # the last size is 6, whatever follows
        for i in moves:
            x, y = MOVES[i](m, x, y)
        return x, y

    torch.manual_seed(0)
    module = Written(function, {"w": (6, 6), "b": (6,)})
    check(module, [torch.randn(2, 5, 6), torch.randn(2, 5, 6)], tolerance=1e-6)
