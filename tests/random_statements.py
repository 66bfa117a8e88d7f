"""Statements of random models: each family takes a Writer and writes a few lines over values of its pool."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import random_views as views
from tests.random_models import BATCH, Refused, Writer

ACTIVATIONS = (
    "F.relu({})", "F.gelu({})", 'F.gelu({}, approximate="tanh")', "F.silu({})", "torch.tanh({})",
    "torch.sigmoid({})", "F.mish({})", "F.hardswish({})", "{0} * torch.sigmoid(1.702 * {0})",
    "F.relu({}).square()", "F.leaky_relu({}, 0.1)", "F.softplus({})", "{0} * torch.sigmoid({0})",
    "0.5 * {0} * (1 + torch.erf({0} * 2 ** -0.5))",
)  # fmt: skip
WORDS = 11  # of the vocabulary


def single(t: Tensor) -> bool:
    return t.dtype is torch.float32


def rows(t: Tensor) -> bool:
    """Values in float32 with a last dimension of some size, which is not the batch."""
    return single(t) and t.dim() >= 2 and t.shape[-1] > 1 and t.shape[-1] % BATCH != 0


def stream(t: Tensor) -> bool:
    """[B, S, D] with an even D."""
    return (
        rows(t) and t.dim() == 3 and t.shape[0] == BATCH and t.shape[-1] % 4 == 0 and t.shape[1] % BATCH > 0
    )


def act(w: Writer, name: str) -> str:
    return w.one(*ACTIVATIONS).format(name)


def linear(w: Writer, a: str, out: int | None = None, bias: bool | None = None) -> str:
    """A linear of `a` as an expression: a layer of its own, one that is there, or a tied weight."""
    width = w[a].shape[-1]
    out = out or w.one(4, 8, 8, 16, width)
    bias = w.chance(0.6) if bias is None else bias
    layer = w.layer(f"nn.Linear({width}, {out}, bias={bias})")
    kind = w.draw.random()
    if kind < 0.1 and width == out:
        return f"{layer}({layer}({a}))"  # called twice
    if kind < 0.2:
        return f"F.linear({a}, {layer}.weight, {layer}.bias)"
    if kind < 0.25:
        return f"({a} @ {layer}.weight.t())"
    if kind < 0.3 and width == out:
        return f"F.linear({a}, {layer}.weight.t())"
    if kind < 0.35:
        other = w.layer(f"nn.Linear({width}, {out}, bias=False)")
        w.declare(f"{other}.weight = {layer}.weight")
        return f"({layer}({a}) - {other}({a}))"
    return f"{layer}({a})"


def project(w: Writer) -> None:
    a = w.pick(rows)
    w.let(linear(w, a) if w.chance(0.5) else act(w, w.let(linear(w, a), keep=w.chance(0.2))))


def parallel(w: Writer) -> None:
    """Linears of one value."""
    a = w.pick(rows)
    names = [w.let(linear(w, a, out=w.one(4, 8)), keep=False) for _ in range(w.one(2, 3))]
    for name in names[1:]:
        w.pool.append(name)
    w.let(act(w, names[0]))


def wide(w: Writer) -> None:
    """A weight that is large enough to be laid out ahead."""
    a = w.pick(rows)
    out = 2**15 // w[a].shape[-1]
    w.let(f"{w.layer(f'nn.Linear({w[a].shape[-1]}, {out})')}({a}).unflatten(-1, (8, -1)).mean(-1)")


def activation(w: Writer) -> None:
    a = w.pick(single)
    if w.chance(0.4) and w[a].dim() and w[a].shape[-1] % BATCH:
        a = w.let(f"{a} + {w.layer(f'nn.Parameter(torch.randn({w[a].shape[-1]}))', 'p')}", keep=False)
    w.let(act(w, a))


def arithmetic(w: Writer) -> None:
    a = w.pick()
    b = w.like(a)
    w.let(w.one(
        f"{a} + {b}", f"{a} * {b}", f"{a} - {b} * 2", f"{a} / 4", f"{a} / (1 + {b} * {b})",
        f"torch.maximum({a}, -{b})",
        f"{b} - {a}", f"torch.addcmul({a}, {b}, {b}, value=0.5)", f"{a}.lerp({b}, 0.25)", f"{a} * 0.5 + {b}",
        f"torch.exp(-{a}.abs())", f"{a}.clamp(-1, 1)", f"torch.cat([{a}, {b}], -1)",
        f"torch.stack([{a}, {b}], 1)",
        f"torch.add({a}, {b}, alpha=0.3)", f"{a}.pow(2)", f"({a} * {a} + 1).sqrt()", f"{a}.sin() * {b}.cos()",
        f"{a}.detach() * {b}", f"1 / (2 + {a}.tanh())",
    ))  # fmt: skip


def norm(w: Writer) -> None:
    """RMSNorm and LayerNorm in some spellings, often behind a residual add; and what only looks like one."""
    a = w.pick(rows)
    if w.chance(0.5):
        a = w.let(f"{a} + {w.like(a)}", keep=w.chance(0.7))
    d, eps = w[a].shape[-1], w.one("1e-6", "1e-5", "0.1")
    weight, bias = (w.layer(f"nn.Parameter(torch.randn({d}))", "p") for _ in range(2))
    square = w.one("{0}.pow(2)", "{0}.square()", "({0} * {0})", "{0} ** 2").format(a)
    scaled = w.one("{0} * {1}", "{1} * {0}", "{0} * (1 + {1})", "{0}", "{0} * {1} + {2}")
    rms = w.one(
        f"({a} * torch.rsqrt(({square}).mean(-1, keepdim=True) + {eps}))",
        f"({a} / torch.sqrt(({square}).mean(-1, True) + {eps}))",
        f"({a} * (({square}).sum(-1, keepdim=True) / {d} + {eps}).rsqrt())",
        f"({a}.to(WIDE) * torch.rsqrt({a}.to(WIDE).pow(2).mean(-1, keepdim=True) + {eps})).to({a}.dtype)",
        f"(F.normalize({a}, dim=-1) * {d} ** 0.5)",
        f"({a} * torch.rsqrt(({square}).mean(-2, keepdim=True) + {eps}))",  # over another dimension
        f"({a} / (({square}).mean(-1, True).sqrt() + {eps}))",  # eps at another place
    )
    mean, variance = f"{a}.mean(-1, True)", f"{a}.var(-1, unbiased=False, keepdim=True)"
    away = w.let(f"{a} - {mean}", keep=False) if w.chance(0.3) else a
    w.let(w.one(
        scaled.format(rms, weight, bias),
        scaled.format(rms, weight, bias),
        f"F.rms_norm({a}, ({d},), {weight}, {eps})",
        f"{w.layer(f'nn.RMSNorm({d}, eps={eps})')}({a})",
        f"{w.layer(f'nn.LayerNorm({d}, eps={eps})')}({a})",
        f"{w.layer(f'nn.LayerNorm({d}, eps={eps}, bias=False)')}({a})",
        f"F.layer_norm({a}, ({d},), {weight}, {bias}, {eps})",
        f"F.layer_norm({a}, ({d},))",
        scaled.format(f"({away} * torch.rsqrt({away}.pow(2).mean(-1, keepdim=True) + {eps}))", weight, bias),
        scaled.format(f"(({a} - {mean}) / ({variance} + {eps}).sqrt())", weight, bias),
        scaled.format(f"(({a} - {mean}) / ({a}.std(-1, keepdim=True) + {eps}))", weight, bias),
    ))  # fmt: skip


def residual_stream(w: Writer) -> None:
    """A stream that only LayerNorms read, whose means can be taken out."""
    a = w.pick(rows)
    d = w.one(4, 8)
    h = w.let(linear(w, a, d), keep=False)
    for _ in range(w.one(1, 1, 2)):
        inner = w.let(f"{w.layer(f'nn.LayerNorm({d})')}({h})", keep=False)
        inner = w.let(act(w, w.let(linear(w, inner, 8), keep=False)), keep=False)
        h = w.let(f"{h} + {linear(w, inner, d)}", keep=False)
    w.let(f"{w.layer(f'nn.LayerNorm({d})')}({h})")


def heads_of(w: Writer, a: str, heads: int, depth: int) -> str:
    """A projection of a stream, [B, heads, S, depth]."""
    p = linear(w, a, heads * depth)
    return w.let(w.one(
        f"{p}.unflatten(-1, ({heads}, {depth})).transpose(1, 2)",
        f"{p}.view({a}.shape[0], -1, {heads}, {depth}).transpose(1, 2)",
        f"{p}.reshape(*{a}.shape[:-1], {heads}, {depth}).permute(0, 2, 1, 3)",
    ), keep=False)  # fmt: skip


def packed_heads(w: Writer, a: str, heads: int, depth: int) -> list[str]:
    """Queries, keys and values of one projection."""
    p = w.let(linear(w, a, 3 * heads * depth), keep=False)
    parts = w.one(
        f"[t.unflatten(-1, ({heads}, {depth})).transpose(1, 2) for t in {p}.chunk(3, -1)]",
        f"{p}.unflatten(-1, (3, {heads}, {depth})).permute(2, 0, 3, 1, 4).unbind(0)",
        f"[t.view(*t.shape[:2], {heads}, {depth}).transpose(1, 2) for t in {p}.split({heads * depth}, -1)]",
    )
    names = [w.name("v") for _ in range(3)]
    w.run(f"{', '.join(names)} = {parts}")
    return names


def turned(w: Writer, q: str) -> str:
    """Queries or keys turned by their positions, as an expression."""
    s, d = w[q].shape[-2:]
    if s % BATCH == 0 or d % 4:
        raise Refused("no such positions")
    angle = f"torch.arange({s})[:, None] / 10.0 ** (torch.arange({d // 2}) / {d})"
    kind = w.one("halves", "halves", "pairs", "complex")
    if kind == "complex":
        table = w.buffer(f"torch.stack([({angle}).cos(), ({angle}).sin()], -1)")
        pairs = f"torch.view_as_complex({q}.reshape(*{q}.shape[:-1], -1, 2))"
        turned = f"{pairs} * torch.view_as_complex({table})"
        return f"torch.view_as_real({turned}).flatten(-2)"
    halves = kind == "halves"
    twice = f"torch.cat([{angle}, {angle}], -1)" if halves else f"({angle}).repeat_interleave(2, -1)"
    cos, sin = w.buffer(f"({twice}).cos()"), w.buffer(f"({twice}).sin()")
    if halves:
        other = f"torch.cat([-{q}[..., {d // 2}:], {q}[..., :{d // 2}]], -1)"
    else:
        other = f"torch.stack([-{q}[..., 1::2], {q}[..., ::2]], -1).flatten(-2)"
    return f"{q} * {cos} + {other} * {sin}"


def rope(w: Writer) -> None:
    a = w.pick(stream)
    q, k = (heads_of(w, a, 2, 4) for _ in range(2))
    q, k = w.let(turned(w, q), keep=False), w.let(turned(w, k), keep=False)
    w.let(f"({q} * {k}).sum(-1)" if w.chance(0.5) else f"{q} - {k}")


def mask_of(w: Writer, s: str, t: str) -> str:
    """What is done to scores [B, H, S, T], as the text of a function of them."""
    ones = f"torch.ones({s}, {t}, dtype=torch.bool)"
    kinds = [
        "{}", "{}", f"{{}}.masked_fill(~{ones}.tril(), float('-inf'))",
        f"{{}} + torch.full(({s}, {t}), -1e9).triu(1)",
        f"torch.where({ones}.tril(), {{}}, torch.finfo({{}}.dtype).min)",
        f"{{}}.masked_fill({ones}.tril(-1), -1e4)",
        "5 * torch.tanh({} / 5)",
    ]  # fmt: skip
    if w.chance(0.3) and t.isdigit():
        seen = w.input("m", f"torch.rand(batch, 1, 1, {t}) > 0.3")
        kinds += [f"{{}}.masked_fill(~{seen}, -1e4)"] * 6
        kinds += [f"{{}} + (1.0 - {seen}.to(WIDE)) * -1e4"] * 6
    return w.draw.choice(kinds)


def attention(w: Writer) -> None:
    """Attention written out, or torch's own call, and what only looks like it."""
    a = w.pick(stream)
    heads, depth = w.one((2, 4), (2, 4), (1, 8), (2, 2))
    s = str(w[a].shape[1]) if w.chance(0.5) else f"{a}.shape[1]"
    if w.chance(0.3):
        q, k, v = packed_heads(w, a, heads, depth)
    else:
        other = w.like(a)
        q, k, v = (heads_of(w, n, heads, depth) for n in (a, other, other))
    if w.chance(0.25) and depth % 4 == 0:
        q, k = w.let(turned(w, q), keep=False), w.let(turned(w, k), keep=False)
    if w.chance(0.2):
        k, v = (w.let(f"{n}[:, :1].expand(-1, {heads}, -1, -1)", keep=False) for n in (k, v))
    if w.chance(0.25):
        causal = w.one(True, False)
        out = w.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={causal})", keep=False)
    else:
        scale = w.one(f"/ {depth} ** 0.5", f"* {depth**-0.5}", "", "* 0.3")
        turn = w.one("transpose(-1, -2)", "transpose(-1, -2)", "mT", "permute(0, 1, 3, 2)")
        dims = w.draw.choices(["-1", "3", "-2"], [8, 2, 1])[0]
        scores = w.let(w.one(
            f"({q} @ {k}.{turn}) {scale}", f"torch.matmul({q} {scale}, {k}.{turn})",
            f'torch.einsum("bhsd,bhtd->bhst", {q}, {k}) {scale}',
        ), keep=False)  # fmt: skip
        scores = w.let(mask_of(w, s, s).format(scores, scores), keep=False)
        p = w.let(f"{scores}.softmax({dims})", keep=w.chance(0.1))
        p = f"F.dropout({p}, 0.0, self.training)" if w.chance(0.3) else p
        out = w.let(f"{p} @ {v}", keep=False)
    out = f"{out}.transpose(1, 2).{w.one('flatten(2)', f'reshape({a}.shape[0], -1, {heads * depth})')}"
    w.let(linear(w, w.let(out, keep=False)) if w.chance(0.5) else out)


def gated(w: Writer) -> None:
    a = w.pick(rows)
    if w.chance(0.2):
        w.let(f"F.glu({linear(w, a, 8)}, -1)")
        return
    if w.chance(0.4):
        p = w.let(linear(w, a, 16), keep=False)
        gate, up = f"{p}[..., :8]", f"{p}[..., 8:]"
        if w.chance(0.5):
            gate, up = w.name("v"), w.name("v")
            w.run(f"{gate}, {up} = {p}.chunk(2, -1)")
    else:
        gate, up = (w.let(linear(w, a, 8), keep=False) for _ in range(2))
    gate = w.one(*ACTIVATIONS).format(gate) if w.chance(0.9) else gate
    product = f"({gate}) * {up}" if w.chance(0.7) else f"{up} * ({gate})"
    w.let(linear(w, w.let(product, keep=w.chance(0.2))) if w.chance(0.5) else product)


def loss(w: Writer) -> None:
    """The last linear and its cross entropy, in some spellings."""
    a = w.pick(lambda t: stream(t) and t.shape[1] > 1)
    s = w[a].shape[1]
    y = w.input("labels", f"torch.randint(0, {WORDS}, (batch, {s}))")
    z = w.let(linear(w, a, WORDS), keep=w.chance(0.1))
    if w.chance(0.4):
        z, y = f"{z}[:, :-1]", f"{y}[:, 1:]"
    flat, labels = f"{z}.reshape(-1, {WORDS})", f"{y}.reshape(-1)"
    w.let(w.one(
        f"F.cross_entropy({flat}, {labels})",
        f"F.cross_entropy({flat}, {labels}, ignore_index=3)",
        f"F.cross_entropy({flat}, {labels}, label_smoothing=0.1)",
        f'F.cross_entropy({flat}.to(WIDE), {labels}, reduction="sum")',
        f"F.cross_entropy({z}.transpose(1, 2), {y})",
        f"F.nll_loss(F.log_softmax({flat}, -1), {labels})",
        f"({flat}.logsumexp(-1) - {flat}.gather(-1, {labels}[:, None])[:, 0]).mean()",
        f'F.cross_entropy({flat}, {labels}, reduction="none")',
    ))  # fmt: skip


def embedding(w: Writer) -> None:
    """Words of a table, whose weight may be that of a linear too."""
    s, d = w["x"].shape[1], w.one(4, 8)
    ids = w.input("ids", f"torch.randint(0, {WORDS}, (batch, {s}))")
    table = w.layer(f"nn.Embedding({WORDS}, {d})", "e")
    e = w.let(f"{table}({ids})")
    if w.chance(0.5):
        head = w.layer(f"nn.Linear({d}, {WORDS}, bias=False)")
        w.declare(f"{head}.weight = {table}.weight")
        w.let(f"{head}({act(w, e)})")


def convolution(w: Writer) -> None:
    """Convolutions with batch norms and activations."""
    a = w.pick(stream)
    two = w.chance(0.7)
    if two:
        x = w.let(f"{a}.unflatten(-1, (2, -1)).permute(0, 2, 1, 3)", keep=False)
    else:
        x = w.let(f"{a}.transpose(1, 2)", keep=False)
    n = 2 if two else 1
    for _ in range(w.one(1, 2)):
        c, out = w[x].shape[1], w.one(4, 8)
        conv = w.layer(f"nn.Conv{n}d({c}, {out}, 3, padding=1, bias={w.chance(0.5)})", "c")
        y = w.let(f"{conv}({x})", keep=False)
        if w.chance(0.6):
            y = w.let(f"{w.layer(f'nn.BatchNorm{n}d({out})')}({y})", keep=False)
        elif w.chance(0.3):
            y = w.let(f"{w.layer(f'nn.GroupNorm(2, {out})')}({y})", keep=False)
        if w.chance(0.3) and c == out:
            y = w.let(f"{y} + {x}", keep=False)
        x = w.let(act(w, y), keep=False)
    if two and w.chance(0.3) and w[x].shape[2] > 1:
        x = w.let(w.one(f"F.max_pool2d({x}, 2)", f"F.avg_pool2d({x}, 2)"), keep=False)
    w.let(f"{x}.permute(0, 2, 1, 3).flatten(2)" if two else f"{x}.transpose(1, 2)")


def batch_norm(w: Writer) -> None:
    """A linear and a batch norm."""
    a = w.pick(stream)
    y = w.let(f"{linear(w, a, 8, w.chance(0.5))}.flatten(0, 1)", keep=False)
    y = w.let(f"{w.layer('nn.BatchNorm1d(8)')}({y})", keep=False)
    w.let(f"F.relu({y}).view(*{a}.shape[:-1], 8)")


# How often each family is written, as weights.
FAMILIES = {
    project: 6, parallel: 4, wide: 2, activation: 5, arithmetic: 6, norm: 10, residual_stream: 4, rope: 4,
    attention: 10, gated: 5, loss: 5, embedding: 3, convolution: 6, batch_norm: 3,
    views.views: 10, views.parts: 5, views.joined: 3, views.in_place: 8, views.written_part: 6,
    views.buffers: 3,
    views.dtypes: 4, views.halves: 3, views.autocast: 1, views.no_gradient: 3, views.indices: 4,
    views.reductions: 5,
    views.masks: 4, views.branches: 3, views.condition: 1, views.dropout: 4, views.shared: 3,
    views.of_torch: 2,
    views.input_written: 1, views.scalars: 2,
}  # fmt: skip
