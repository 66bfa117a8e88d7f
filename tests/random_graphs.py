"""Training steps to run under schedules of activation memory: of any module, and of random graphs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxaccel
from fxaccel.emit import emit
from fxaccel.memory import Meter
from fxaccel.profile import profile
from fxaccel.replay import Draft, lazily, write
from fxaccel.schedule import Schedule
from tests.helpers import Method, session


class Outcome(NamedTuple):
    """What is left of a training step: to be equal with a schedule and without, bit for bit."""

    outputs: list[Tensor]
    grads: list[Tensor | None]
    buffers: list[Tensor]
    drawn: Tensor


class Captured:
    """The captured training step of a module, with its profile, to be run under any schedule."""

    def __init__(self, model: nn.Module, *args: Any, passes: Any = ()) -> None:
        self.model, self.args = model, args
        self.fast = fxaccel.accelerate(model, passes, example_inputs=args, check=False)
        self.program = session(self.fast).all[0].program
        self.profile = profile(self.program)
        self.number = {value.name: i for i, value in enumerate(self.profile.values)}

    def emitted(self, schedule: Schedule | None = None) -> Callable[..., list[Any]]:
        code = emit(replace(self.program, schedule=schedule, _facts=self.program._facts))
        return code.bind(self.fast, "<step>")["forward"]

    def droppable(self) -> set[int]:
        """Values that can be computed again."""
        return {i for i, v in enumerate(self.profile.values) if self.profile.calls[v.made].again}

    def draft(self, *names: str) -> Draft:
        """These values, or all that can be, are dropped, with whatever is not needed on the way to them."""
        free = {i for i in self.droppable() if not self.profile.values[i].needed}
        chosen = {self.number[name] for name in names} if names else self.droppable()
        return lazily(self.profile, free | chosen)

    def scheduled(self, *names: str) -> Callable[..., list[Any]]:
        return self.emitted(write(self.profile, self.draft(*names)))

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Inside, one training step from a state that is the same each time; nothing is left of it."""
        kept = [b.clone() for b in self.model.buffers()]
        self.model.zero_grad()
        torch.manual_seed(7)
        yield
        self.model.zero_grad()
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), kept, strict=True):
                buffer.copy_(before)

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...] | None = None) -> Outcome:
        """A training step, on arguments of its own."""
        args = tuple(_fresh(a) for a in (self.args if args is None else args))
        with self.fresh():
            outputs = listed(forward(*args))
            loss(outputs).backward()
            learn = [t for t in (*self.model.parameters(), *args) if isinstance(t, Tensor)]
            grads = [None if t.grad is None else t.grad.clone() for t in learn]
            buffers = [b.clone() for b in self.model.buffers()]
            return Outcome([t.detach() for t in outputs], grads, buffers, torch.rand(3))

    def peak(self, schedule: Schedule | None = None) -> int:
        """The most bytes that a step takes, measured."""
        forward = self.emitted(schedule)
        with self.fresh(), Meter() as meter:
            loss(listed(forward(*self.args))).backward()
        return meter.peak


def _fresh(arg: Any) -> Any:
    return arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg


def listed(outputs: Any) -> list[Tensor]:
    """The tensors that learn among what a module, or its code, returns."""
    flat = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


def loss(outputs: list[Tensor]) -> Tensor:
    """The output that is one number, or one made of them all."""
    single = [t for t in outputs if t.numel() == 1]
    return single[0] if single else torch.stack([t.square().sum() for t in outputs]).sum()


def identical(got: Outcome, want: Outcome) -> None:
    """Equal bit for bit."""
    for name, ours, theirs in zip(Outcome._fields, got, want, strict=True):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert (a is None) == (b is None), f"{name}[{i}]"
            assert a is None or torch.equal(a, b), f"{name}[{i}]: {(a - b).abs().max()} apart"


def equal(ours, theirs):
    """Lists of tensors, equal bit for bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def grads(model):
    """The gradients of a module, which has none afterwards."""
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def gone_back_one_by_one(step, ours, wanted, order):
    """Backward from each result by itself gives equal gradients, whether from ours or from those wanted."""
    weights = list(step.model.parameters())
    for i in order:
        found = [
            torch.autograd.grad(out[i].sum(), weights, retain_graph=i != order[-1], allow_unused=True)
            for out in (ours, wanted)
        ]
        assert [a is None for a in found[0]] == [b is None for b in found[1]]
        equal([a for a in found[0] if a is not None], [b for b in found[1] if b is not None])


def alive_after(step, forward):
    """Bytes that live after forward; backward leaves gradients alone, and nothing without these."""
    with Meter() as meter:
        out = forward(*step.args)
        alive = meter.live
        loss(out).backward()
        del out
        assert meter.live == sum(p.nbytes for p in step.model.parameters())
    step.model.zero_grad()
    assert meter.live == 0
    return alive


# -- modules ------------------------------------------------------------------------------------------


def chain(learns=False):
    """Three layers with activations that keep their results."""
    model = Method(lambda m, x: m.l2(m.l1(m.l0(x).tanh()).sigmoid()).exp(), **linears(8, 16, 16, 4))
    return Captured(model, torch.randn(6, 8, requires_grad=learns))


def branches(m, x):
    """Three results that share what is below, each with layers of its own."""
    h = m.l0(x).tanh().exp()
    first = m.l1(h).sigmoid()
    second = m.l2(h).tanh()
    return first * 2, second.exp(), m.l3(h.cos()).tanh()


def three():
    """The step of `branches`."""
    layers = {"l0": nn.Linear(8, 16), **{f"l{i}": nn.Linear(16, 4) for i in (1, 2, 3)}}
    return Captured(Method(branches, **layers), torch.randn(6, 8))


def linears(*sizes):
    return {f"l{i}": nn.Linear(a, b) for i, (a, b) in enumerate(pairwise(sizes))}


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.again, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.out(self.again(self.act(self.norm(self.conv(x))))).tanh()


class Attention(nn.Module):
    """Written out, as fuse-attention rewrites it, or as PyTorch's own call."""

    def __init__(self, written=False, p=0.0):
        super().__init__()
        self.qkv, self.out, self.written, self.p = nn.Linear(32, 96), nn.Linear(32, 32), written, p

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.written:
            y = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.p, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def autocast_inside(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = F.gelu(m.l0(x))
        y = m.l1(y).float().tanh()
    return m.l2(y)


def split(m, x):
    a, b, c = m.l0(x).tanh().split([4, 8, 4], -1)
    return m.l1(torch.cat([a * c, b.exp(), a.sigmoid(), c], -1).cos())


def chunk(m, x):
    a, b = m.l0(x).chunk(2, -1)
    return m.l1(torch.cat([F.silu(a) * b, a], -1))


def native(m, x):
    var, mean = torch.var_mean(m.l0(x).tanh(), -1, keepdim=True)
    values, where = m.l0(x).sort(-1)
    largest, at = values.exp().max(0, keepdim=True)
    return (values.tanh() * var.sqrt() + mean).gather(-1, where.flip(-1)).exp() * largest + at


def shared(m, x):
    h = m.l0(x).tanh()
    return m.l1(h).sigmoid() * h + m.l1(h.cos()).exp() + h.softmax(-1)


def tied(m, x):
    h = m.l0(x).tanh()
    return F.linear(F.linear(h, m.l0.weight.t()).sigmoid(), m.l0.weight).exp()


def in_place(m, x):
    h = m.l0(x).relu_().add_(1).tanh()
    h = (h * 2)[..., :8].sigmoid_()
    return torch.cat([h, h.exp()], -1).mul_(m.l0(x)).cos()


def written_views(m, x):
    h = m.l0(x) * 1
    h[..., :8].mul_(m.l0(x)[..., 8:].tanh())  # nothing reads the result by this name
    return m.l1(h.tanh())


def views(m, x):
    h = m.l0(x).tanh()
    corner = h[2:, 3:9].t() @ h[:-2].cos()  # a matrix product saves views as they lie
    h = h.t().unflatten(0, (2, -1)).permute(2, 0, 1).exp().flatten(1)
    return m.l1(h.sin()).view(-1, 4).sigmoid().expand(3, -1, 4) * corner.sum()


def frozen():
    model = Method(lambda m, x: m.l2(m.l1(m.l0(x).tanh()).tanh()).exp(), **linears(8, 16, 16, 4))
    model.l0.requires_grad_(False)
    model.l1.bias.requires_grad_(False)
    return model


def block():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, activation="gelu")
    return Method(lambda m, x: m.layer(x), layer=layer)


CASES = {
    "dropout": lambda: (Method(lambda m, x: m.l1(F.dropout(m.l0(x).tanh(), 0.4)), **linears(8, 16, 4)), 8),
    "conv": lambda: (ConvNet(), torch.randn(2, 3, 6, 6)),
    "autocast inside": lambda: (Method(autocast_inside, **linears(8, 16, 16, 4)), 8),
    "attention": lambda: (Attention(), torch.randn(2, 6, 32)),
    "attention with dropout": lambda: (Attention(p=0.25), torch.randn(2, 6, 32)),
    "transformer block": lambda: (block(), torch.randn(2, 6, 32)),
    "split": lambda: (Method(split, l0=nn.Linear(8, 16), l1=nn.Linear(20, 4)), 8),
    "chunk": lambda: (Method(chunk, **linears(8, 16, 4)), 8),
    "native results": lambda: (Method(native, **linears(8, 16)), 8),
    "shared values": lambda: (Method(shared, **linears(8, 16, 16)), 8),
    "tied parameters": lambda: (Method(tied, **linears(8, 16)), 8),
    "in place": lambda: (Method(in_place, **linears(8, 16)), 8),
    "written views": lambda: (Method(written_views, **linears(8, 16, 4)), 8),
    "views": lambda: (Method(views, **linears(8, 16, 4)), 8),
    "frozen parameters": lambda: (frozen(), 8),
}


# -- random graphs ---------------------------------------------------------------------------------

BATCH, LENGTH, WIDTH = B, S, D = 4, 6, 16
LINEARS = 3


def _split(m: RandomGraph, i: int, a: Tensor, b: Tensor) -> Tensor:
    left, right = a.split([4, 12], -1)
    return torch.cat([right.tanh(), left * b[..., :4]], -1)


def _chunk(m: RandomGraph, i: int, a: Tensor, b: Tensor) -> Tensor:
    p, q, r, s = a.chunk(4, -1)  # p and q have two readers
    return torch.cat([p * q, F.gelu(r), s + p, q], -1)


def _heads(m: RandomGraph, i: int, a: Tensor, b: Tensor) -> Tensor:
    q, k, v = (t.view(*t.shape[:-1], 2, 8).transpose(1, 2) for t in (m.linears[i](a), a * 0.5, b + a))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _view_written(m: RandomGraph, i: int, a: Tensor, b: Tensor) -> Tensor:
    y = a * 2
    y[..., :4].zero_()
    return y + b


def _moments(m: RandomGraph, i: int, a: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(a, -1, keepdim=True)
    return (a - mean) * (var + 1).rsqrt()


# Each takes the module, the number of a layer and two values [B, S, D], and makes one of that shape.
MOVES: list[Callable[[RandomGraph, int, Tensor, Tensor], Tensor]] = [
    lambda m, i, a, b: a + b,
    lambda m, i, a, b: a + m.linears[i](b),
    lambda m, i, a, b: m.linears[i](a),
    lambda m, i, a, b: m.linears[i](m.norms[i](a)),
    lambda m, i, a, b: m.norms[i](a + b),
    lambda m, i, a, b: F.gelu(a) * b.tanh(),
    lambda m, i, a, b: a.tanh(),
    lambda m, i, a, b: F.gelu(a, approximate="tanh"),
    lambda m, i, a, b: a.softmax(-1) + b,
    lambda m, i, a, b: F.dropout(a, 0.25, m.training),
    lambda m, i, a, b: F.dropout(m.linears[i](a), 0.5, m.training) + b,
    lambda m, i, a, b: m.linears[i](a).relu_(),
    lambda m, i, a, b: (a * b.tanh()).add_(b),
    lambda m, i, a, b: (a + b).add_(a, alpha=0.5).relu_(),
    lambda m, i, a, b: a.sigmoid() * (a.transpose(-1, -2) @ b.tanh()).mean(1, keepdim=True),
    lambda m, i, a, b: m.linears[i](a.transpose(0, 1)).transpose(0, 1),
    lambda m, i, a, b: a.reshape(-1, D).cos().view(a.shape) - b,
    lambda m, i, a, b: a.sort(-1).values * 0.5 + b.amax(-1, keepdim=True),
    _split,
    _chunk,
    _heads,
    _view_written,
    _moments,
]


class RandomGraph(nn.Module):
    """Random moves over a pool of values; each may have any number of readers. Gives one number."""

    def __init__(self, seed: int, least: int = 5, most: int = 14) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linears = nn.ModuleList(nn.Linear(D, D) for _ in range(LINEARS))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(LINEARS))
        draw = random.Random(seed)
        self.moves = [
            (draw.randrange(len(MOVES)), draw.randrange(LINEARS), draw.random(), draw.random() ** 2)
            for _ in range(draw.randint(least, most))
        ]

    def forward(self, x: Tensor) -> Tensor:
        pool = [self.linears[0](x)]
        for move, layer, one, other in self.moves:  # the first is mostly a late value, the second any
            a, b = pool[-1 - int(one**3 * len(pool))], pool[int(other * len(pool))]
            pool.append(MOVES[move](self, layer, a, b))
        read = [y.mean() for y in pool[:-1]]  # so that backward comes to every call
        return torch.stack([*read, pool[-1].square().mean()]).sum()


def random_drafts(step: Captured, seed: int, count: int) -> list[Draft]:
    """Drafts that drop random values, few to all, with whatever is not needed on the way to them."""
    draw, can, values = random.Random(seed), sorted(step.droppable()), step.profile.values
    drafts = []
    for _ in range(count):
        share = draw.random()
        drafts.append(lazily(step.profile, {i for i in can if not values[i].needed or draw.random() < share}))
    return drafts
