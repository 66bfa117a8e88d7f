"""Small training steps for the tests of partition, in float64: what is not the order of a sum shows."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.passes import Partition

W = 8


class Chain(nn.Module):
    """Linears of uneven cost in a row."""

    def __init__(self, widths=(8, 16, 64, 64, 64, 32, 8, 8)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Residual(nn.Module):
    """Blocks with a batch norm and a dropout around a stream."""

    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(W, W), nn.BatchNorm1d(W), nn.ReLU(), nn.Dropout(0.3), nn.Linear(W, W))
            for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class UNet(nn.Module):
    """Each level on the way down is read again on the way up."""

    def __init__(self, levels=3):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(W, W) for _ in range(levels))
        self.middle = nn.Linear(W, W)
        self.up = nn.ModuleList(nn.Linear(2 * W, W) for _ in range(levels))

    def forward(self, x):
        skips = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            skips.append(x)
        x = self.middle(x)
        for layer in self.up:
            x = torch.tanh(layer(torch.cat([x, skips.pop()], -1)))
        return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(W, W) for _ in range(4))
        self.norm, self.drop = nn.LayerNorm(W), nn.Dropout(0.1)

    def forward(self, x, mask, other=None):
        y = self.norm(x)
        other = y if other is None else other
        y = F.scaled_dot_product_attention(self.q(y), self.k(other), self.v(other), mask)
        return x + self.drop(self.out(y))


class Tied(nn.Module):
    """A language model: masks and a table of rotations that all layers read, the embedding is the head."""

    def __init__(self, layers=4, words=20):
        super().__init__()
        self.embed = nn.Embedding(words, W)
        self.layers = nn.ModuleList(Attention() for _ in range(layers))
        self.head = nn.Linear(W, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", 0.5 ** torch.arange(W), persistent=False)

    def forward(self, ids, keep, labels):
        size = ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril() & keep[:, None].bool()
        turns = torch.cos(torch.arange(size, device=ids.device)[:, None] * self.frequencies)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x * turns, mask)
        logits = self.head(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Two(nn.Module):
    """An encoder and a decoder that reads what it says in each layer; results from several places."""

    def __init__(self, layers=2):
        super().__init__()
        self.encoder = nn.ModuleList(Attention() for _ in range(layers))
        self.decoder = nn.ModuleList(Attention() for _ in range(2 * layers))

    def forward(self, x, y):
        for layer in self.encoder:
            x = layer(x, None)
        first = x.mean()
        for own, cross in zip(self.decoder[::2], self.decoder[1::2], strict=True):
            y = cross(own(y, None), None, x)
        return {"loss": y.square().mean(), "first": first, "encoded": x, "none": None}


class Again(nn.Module):
    """One linear is read twice, near by, in a row of others."""

    def __init__(self, layers=8, twice=(2, 4)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(layers))
        self.layers[twice[1]] = self.layers[twice[0]]

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Regions(nn.Module):
    """A teacher without gradients beside the student, and a part under autocast."""

    def __init__(self):
        super().__init__()
        self.first, self.teacher, self.student, self.last = (nn.Linear(W, W) for _ in range(4))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        with torch.no_grad():
            wanted = torch.tanh(torch.tanh(self.teacher(x)) * 2)
        return self.last(torch.tanh(self.student(x)) - wanted)


class Counter(nn.Module):
    """A buffer that is written to at the start and read at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Linear(W, W) for _ in range(3))
        self.register_buffer("mean", torch.zeros(W))

    def forward(self, x):
        x = torch.tanh(self.first(x))
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.last(torch.tanh(self.middle(x)) - self.mean)


class Stepped(nn.Module):
    """What is read of a counter before it moves on scales all layers."""

    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(layers))
        self.register_buffer("count", torch.tensor(2))

    def forward(self, x):
        scale = 1.0 / (self.count + 1)
        self.count.add_(1)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return x


def _floats(*sizes):
    return tuple(torch.randn(*s, dtype=torch.float64) for s in sizes)


def _words():
    keep = torch.ones(3, 7, dtype=torch.int64)
    keep[0, 5:] = 0
    return torch.randint(0, 20, (3, 7)), keep, torch.randint(0, 20, (3, 7))


MODELS = {
    "chain": (Chain, lambda: _floats((6, 8)), 3),
    "residual": (Residual, lambda: _floats((6, W)), 3),
    "unet": (UNet, lambda: _floats((6, W)), 4),
    "tied": (Tied, _words, 3),
    "two": (Two, lambda: _floats((3, 5, W), (3, 4, W)), 4),
    "again": (Again, lambda: _floats((6, W)), 2),
    "regions": (Regions, lambda: _floats((6, W)), 2),
    "stepped": (Stepped, lambda: _floats((6, W)), 3),
    "counter": (Counter, lambda: _floats((6, W)), 2),
}


def made(name):
    """The model, arguments of a call, and a count of stages."""
    cls, inputs, stages = MODELS[name]
    torch.manual_seed(0)
    return cls().double().train(), inputs(), stages


def cut(model, args, check=True, **options):
    fast = fxaccel.accelerate(model, [Partition(**options)], check=check, strict=True)
    fast(*args)
    return fast


def seen(model, args):
    """Results, gradients and buffers of a step, and the random number that comes next."""
    for parameter in model.parameters():
        parameter.grad = None
    kept = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(5)
    results = [t for t in torch.utils._pytree.tree_leaves(model(*args)) if isinstance(t, torch.Tensor)]
    sum(t.square().sum() for t in results if t.requires_grad).backward()
    forward = [*results, *(b.clone() for b in model.buffers()), torch.rand(1)]
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    return [t.detach() for t in forward], {n: p.grad for n, p in model.named_parameters()}


def agree(got, want):
    """Forward bit for bit, gradients up to the order of a sum."""
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        if gradient is None:
            assert got[1][name] is None
        else:
            torch.testing.assert_close(got[1][name], gradient, rtol=1e-12, atol=1e-14)
