"""More statements of random models: views, writes, dtypes, indices, modes, branches."""

from __future__ import annotations

from torch import Tensor

from tests.random_models import BATCH, Refused, Writer


def single(t: Tensor) -> bool:
    return str(t.dtype) == "torch.float32"


def shaped(t: Tensor) -> bool:
    return t.is_floating_point() and t.dim() >= 2


def fixed(w: Writer, a: str) -> list[int]:
    """Dimensions that are not of the batch."""
    return [i for i, n in enumerate(w[a].shape) if n % BATCH]


def viewed(w: Writer, a: str) -> str:
    """A view of a value as an expression, or what may be one."""
    t = w[a]
    i, j = w.draw.randrange(t.dim()), w.draw.randrange(t.dim())
    order = w.draw.sample(range(t.dim()), t.dim())
    kinds = [
        f"{a}.transpose({i}, {j})", f"{a}.transpose({i - t.dim()}, {j})",
        f"{a}.permute({', '.join(map(str, order))})",
        f"{a}.flatten({min(i, j)}, {max(i, j)})", f"{a}.unsqueeze({i})", f"{a}.reshape(-1)",
        f"{a}.reshape(-1, {w.size(a, -1)})", f"{a}.mT", f"{a}.movedim({i}, {j})", f"{a}.squeeze()",
        f"{a}[None].expand(2, {', '.join(['-1'] * t.dim())})", f"{a}.flip({i})", f"{a}.roll(1, {i})",
        f"{a}.contiguous()", f"{a}.clone()", f"{a}.unsqueeze({i}).squeeze({i})", f"{a}[..., None]",
        f"{a}.reshape({', '.join(w.size(a, k) for k in range(t.dim()))})", f"{a}.diagonal(0, {i}, {j})",
        f"{a}.transpose({i}, {j}).contiguous()", f"{a}.transpose({i}, {j}).reshape(-1, {w.size(a, i)})",
        f"{a}.transpose({i}, {j}).transpose({i}, {j})", f"{a}.view(*{a}.shape)",
    ]  # fmt: skip
    for k in fixed(w, a):
        n = t.shape[k]
        at = w.draw.randrange(n)
        every = ", ".join([":"] * k)
        head = f"{every}, " if k else ""
        kinds += [f"{a}[{head}{at}]", f"{a}[{head}::{w.one(2, 3)}]", f"{a}[{head}{at}:]"]
        kinds += [
            f"{a}.select({k}, {at - n})",
            f"{a}[{head}{at}:{at + 1}]",
            f"{a}.narrow({k}, 0, {at + 1})",
            f"{a}[{head}-1:]",
        ]
        if n % 2 == 0:
            kinds += [f"{a}.unflatten({k}, (2, -1))", f"{a}.unflatten({k}, (-1, 2))"]
        if n == 1:
            sizes = ", ".join("3" if m == k else "-1" for m in range(t.dim()))
            kinds += [f"{a}.squeeze({k})", f"{a}.expand({sizes})"]
    return w.draw.choice(kinds)


def views(w: Writer) -> None:
    a = w.pick(shaped)
    for _ in range(w.one(0, 0, 1, 2)):
        a = w.let(viewed(w, a), keep=w.chance(0.2))
        if not w[a].dim():
            raise Refused("no dimension is left")
    a = w.let(viewed(w, a))
    if w.chance(0.3):
        w.let(f"{a} * 2")


def parts(w: Writer) -> None:
    """Several results of one call."""
    a = w.pick(lambda t: shaped(t) and t.shape[-1] % 2 == 0 and t.shape[-1] % BATCH != 0)
    n, dim = w[a].shape[-1], w.one(-1, w[a].dim() - 1)
    names = [w.name("v"), w.name("v")]
    w.run(f"{', '.join(names)} = " + w.one(
        f"{a}.chunk(2, {dim})", f"{a}.split({n // 2}, {dim})", f"{a}.split([1, {n - 1}], {dim})",
        f"{a}.unflatten({dim}, (2, -1)).unbind({w[a].dim() - 1})", f"{a}.tensor_split(2, {dim})",
        f"torch.var_mean({a}, {dim}, keepdim=True)", f"{a}.topk(2, {dim}).values.unbind({dim})",
    ))  # fmt: skip
    for name in names:
        w.see(name)
    if w[names[0]].shape == w[names[1]].shape:
        w.let(w.one("{} * {}.tanh()", "torch.cat([{1}, {0}], -1)", "{} - {}").format(*names))


def joined(w: Writer) -> None:
    a = w.pick(shaped)
    b, dim = w.like(a), w.draw.randrange(w[a].dim())
    w.let(w.one(
        f"torch.cat([{a}, {b}], {dim})", f"torch.stack([{a}, {b}], {dim})", f"F.pad({a}, (1, 2))",
        f"torch.cat([{a}, torch.zeros_like({b})], {dim})", f"{a}.repeat_interleave(2, {dim})",
        f"F.pad({a}, (1, 0), value=0.5)", f"{a}.repeat({', '.join(['1'] * (w[a].dim() - 1) + ['2'])})",
    ))  # fmt: skip


WRITES = (
    "{0}.add_({1})", "{0}.mul_(0.5)", "{0}.relu_()", "{0}.sigmoid_()", "{0}.add_({1}, alpha=0.5)",
    "{0}.neg_()",
    "{0}.mul_({1}.tanh())", "{0}.clamp_(-1, 1)", "{0} += {1}", "{0} *= 2", "{0}.copy_({1}.flip(0))",
    "{0}.sub_(1)",
)  # fmt: skip


def copied(w: Writer, a: str) -> str:
    """A value of its own, to be written to."""
    return w.let(w.one("{} * 1.5", "{}.clone()", "{} + 1", "{}.tanh()").format(a), keep=False)


def in_place(w: Writer) -> None:
    """Writes to a value that views and later statements read."""
    a = w.pick(single)
    v = copied(w, a)
    before = w.let(f"{v} * 2") if w.chance(0.5) else None  # read before it is written
    if w.chance(0.5) and w[v].dim() >= 2:
        view = w.one("{}.transpose(0, 1)", "{}.flatten(0, 1)", "{}[..., :1]", "{}[1:]", "{}.detach()")
        u = w.let(view.format(v))
        w.run(w.one(*WRITES[:-1]).format(w.one(u, v), w.one(u, v) if w.chance(0.3) else "0.3"))
    for _ in range(w.one(1, 1, 2)):
        w.run(w.one(*WRITES).format(v, w.like(a)))
    w.see(v)
    if before is not None and w.chance(0.5):
        w.let(f"{before} + {v}")


def written_part(w: Writer) -> None:
    """Writes to a part of a value."""
    a = w.pick(lambda t: single(t) and t.dim() >= 2 and t.shape[-1] > 1 and t.shape[-1] % BATCH != 0)
    v, b = copied(w, a), w.like(a)
    n = w[v].shape[-1]
    w.run(w.one(
        f"{v}[..., 0] = 0", f"{v}[..., 1:] = {b}[..., :-1]", f"{v}[..., :2].mul_({b}[..., -2:])",
        f"{v}[1:].copy_({b}[:-1])", f"{v}[..., {n - 1}].add_({b}.sum(-1))", f"{v}.view(-1)[:3].zero_()",
        f"{v}[:, 0] = {b}[:, 0] * 2", f"{v}.index_put_((torch.tensor([0]),), {v}.new_tensor(0.5))",
        f"{v}.index_add_(-1, torch.tensor([1, 0, 1]), {b}[..., :1].expand(*{b}.shape[:-1], 3))",
        f"{v}.masked_fill_({b} > 0, 0.25)", f"{v}[{b} > 0.5] = 1.0", f"{v}.transpose(0, -1)[0] = 1",
        f"{v}.select(-1, 0).copy_({v}.select(-1, 1))", f"{v}[..., ::2] = {v}[..., ::2].exp().clamp(max=3)",
        f"{v}.index_fill_(-1, torch.tensor([0, 1]), 0.1)", f"{v}.fill_diagonal_(1)", f"{v}.zero_().add_({b})",
    ))  # fmt: skip
    w.see(v)
    w.let(f"{v} * {a}" if w.chance(0.5) else f"{v}.cos()", keep=w.chance(0.5))


def input_written(w: Writer) -> None:
    """An argument is written to."""
    name = "y" if "y" in w.given else "x"
    w.run(w.one("{0}.mul_(0.5)", "{0}[:, :1].add_(1)", "{0} += 1").format(name))


def buffers(w: Writer) -> None:
    """State that is kept from call to call."""
    a = w.pick(lambda t: single(t) and t.dim() >= 2 and t.shape[-1] % BATCH != 0)
    d = w[a].shape[-1]
    b, mean = w.buffer(f"torch.zeros({d})"), f"{a}.detach().flatten(0, -2).mean(0)"
    line = w.one(
        f"{b}.add_({mean})", f"{b}.mul_(0.9).add_({mean}, alpha=0.1)", f"{b}.copy_({mean})",
        f"{b}.lerp_({mean}, 0.5)",
        f"{b} = {b} * 0.5 + {mean}", f"{b}[0] += 1",
    )  # fmt: skip
    w.run(w.one(line, f"with torch.no_grad():\n    {line}", f"if self.training:\n    {line}"))
    w.let(w.one(f"{a} - {b}", f"{a} * (1 + {b})", f"{a} / ({b}.abs() + 1)"))


def dtypes(w: Writer) -> None:
    a = w.pick(single)
    w.let(w.one(
        f"{a}.to(HALF).to(WIDE)", f"{a}.double().exp().clamp(max=9).to(WIDE)", f"{a}.to({a}.dtype)",
        f"{a}.double()",
        f"({a} > 0).to(WIDE) * {a}", f"{a}.to(HALF)", f"{a}.to(WIDE)", f"{a}.type_as({a})",
        f"({a}.to(HALF) * 2).to(WIDE) + {a}",
    ))  # fmt: skip


def halves(w: Writer) -> None:
    """A few operators in a lower precision, and back."""
    a = w.pick(lambda t: single(t) and t.dim() >= 2 and t.shape[-1] % BATCH != 0)
    d = w[a].shape[-1]
    layer, h = w.layer(f"nn.Linear({d}, 8)"), w.let(f"{a}.to(HALF)", keep=False)
    h = w.let(f"F.linear({h}, {layer}.weight.to(HALF), {layer}.bias.to(HALF))", keep=False)
    if w.chance(0.6):
        p, wide = w.layer("nn.Parameter(torch.randn(8))", "p"), f"{h}.to(WIDE)"
        rms = f"{wide} * torch.rsqrt({wide}.pow(2).mean(-1, keepdim=True) + 1e-5)"
        h = w.let(w.one(f"{p}.to(HALF) * ({rms}).to(HALF)", f"(({rms}) * {p}).to(HALF)"), keep=False)
    last = w.one("F.silu({0}) * {0}", "F.gelu({})", "{}.softmax(-1)", "{} + 1", "F.relu({})").format(h)
    w.let(f"({last}).to(WIDE)")


def autocast(w: Writer) -> None:
    a = w.pick(lambda t: single(t) and t.dim() >= 2 and t.shape[-1] % BATCH != 0)
    layer, name = w.layer(f"nn.Linear({w[a].shape[-1]}, 8)"), w.name("v")
    region = 'with torch.autocast("cpu", torch.bfloat16, enabled=HALF is torch.bfloat16):'
    w.run(f"{region}\n    {name} = F.gelu({layer}({a}))\n    {name} = {name} + {layer}({a})")
    w.let(f"{name}.to(WIDE)")


def no_gradient(w: Writer) -> None:
    a, name = w.pick(single), w.name("v")
    w.run(w.one(
        f"with torch.no_grad():\n    {name} = {a}.tanh() * 2", f"{name} = {a} * {a}.detach().sigmoid()",
        f"{name} = {a}.detach() + 0.5 * {a}",
        f"with torch.no_grad():\n    {name} = {a}.exp()\n{name} = {name} * {a}",
        f"{name} = {a} - {a}.detach()",
    ))  # fmt: skip
    w.see(name)


def indices(w: Writer) -> None:
    a = w.pick(lambda t: shaped(t) and t.shape[-1] > 1 and t.shape[-1] % BATCH != 0)
    w.let(w.one(
        f"{a}[..., torch.tensor([1, 0, 1])]", f"{a}.index_select(-1, torch.tensor([0, 1]))",
        f"{a}.sort(-1).values",
        f"{a}.gather(-1, torch.zeros_like({a}[..., :2], dtype=torch.int64))", f"{a}.cumsum(-1)",
        f"{a}[torch.arange({a}.shape[0])]",
        f"{a} * torch.arange({w.size(a, -1)})", f"{a}.take_along_dim({a}.argsort(-1), -1)",
        f"{a}[..., [0, -1]]",
        f"{a}.scatter(-1, torch.ones_like({a}[..., :1], dtype=torch.int64), 0.5)",
    ))  # fmt: skip


def reductions(w: Writer) -> None:
    a = w.pick(lambda t: t.is_floating_point() and t.numel() > 1)
    dim, keep = w.draw.randrange(w[a].dim()) - w.one(0, w[a].dim()), w.one("True", "False")
    r = w.let(w.one(
        f"{a}.mean({dim}, {keep})", f"{a}.sum({dim}, {keep})", f"{a}.amax({dim}, {keep})", f"{a}.mean()",
        f"{a}.sum()",
        f"{a}.logsumexp({dim}, {keep})", f"{a}.softmax({dim})", f"{a}.log_softmax({dim})",
        f"{a}.var({dim}, keepdim={keep}, correction=0)",
        f"{a}.norm(dim={dim}, keepdim={keep})", f"{a}.max()", f"{a}.square().mean()",
        f"{a}.softmax({dim}) @ {a}.mT",
    ))  # fmt: skip
    if w[r].dim() == 0 and w.chance(0.7):
        w.let(w.one(f"{a} * {r}", f"{a} - {r}", f"{a} / (1 + {r} * {r})"))


def masks(w: Writer) -> None:
    a = w.pick(lambda t: shaped(t) and t.shape[-1] % BATCH != 0)
    b, n = w.like(a), w[a].shape[-1]
    w.let(w.one(
        f"torch.where({a} > 0, {a}, {b} * 0.1)", f"{a}.masked_fill({b} > 0, 0.5)", f"{a} * ({b} < 0.3)",
        f"torch.where(torch.arange({n}) < {n // 2}, {a}, -{b})", f"{a}.tril()",
        f"torch.where(~({a} > 0), 0.0, {a})",
        f"{a}.masked_fill(torch.ones({n}, dtype=torch.bool).logical_not(), 0)", f"{a} * torch.eye({n})[0]",
    ))  # fmt: skip


def branches(w: Writer) -> None:
    """Python decides, by sizes and by the mode."""
    a, name = w.pick(shaped), w.name("v")
    size = w.one("{}.shape[0] % 2 == 0", "{}.shape[-1] > 3", "{}.shape[0] > 3", "{}.dim() == 3").format(a)
    test = w.one(size, size, "self.training")
    if w.chance(0.3):
        w.run(f"{name} = {a}\nfor i in range({w.one(1, 2, 3)}):\n    {name} = torch.sin({name} * (i + 1))")
    else:
        w.run(f"if {test}:\n    {name} = {a}.tanh()\nelse:\n    {name} = {a} * 2")
    w.see(name)


def condition(w: Writer) -> None:
    """The values decide."""
    a = w.pick(single)
    w.let(f"torch.cond({a}.sum() > 0, lambda t: t.sin(), lambda t: t.cos() * 2, ({a},))")


def dropout(w: Writer) -> None:
    a = w.pick(single)
    layer = w.layer(f"nn.Dropout({w.one(0.0, 0.5)})", "d")
    w.let(w.one(f"F.dropout({a}, 0.3, self.training)", f"F.dropout({a}, 0.0, True)", f"{layer}({a})"))


def shared(w: Writer) -> None:
    """A layer called at several places."""
    a = w.pick(lambda t: single(t) and t.dim() >= 2 and t.shape[-1] in (4, 8))
    d = w[a].shape[-1]
    act = w.one("nn.ReLU(inplace=True)", "nn.GELU()", "nn.SiLU()", "nn.Identity()")
    before = w.one("", f"nn.LayerNorm({d}), ")
    layer = w.layer(f"nn.Sequential({before}nn.Linear({d}, {d}), {act})", "s")
    b = w.let(f"{layer}({a})")
    w.let(w.one(f"{layer}({b})", f"{layer}({b} + {a})", f"{a} + {layer}({b}) * 0.5"))


def of_torch(w: Writer) -> None:
    """Larger modules of torch's own."""
    a = w.pick(lambda t: single(t) and t.dim() == 3 and t.shape[-1] in (4, 8) and t.shape[0] == BATCH)
    d = w[a].shape[-1]
    if w.chance(0.5):
        layer = w.layer(f"nn.MultiheadAttention({d}, 2, batch_first=True)", "t")
        w.let(f"{layer}({a}, {a}, {a}, need_weights={w.one(True, False)})[0]")
    else:
        options = f"dropout=0.0, batch_first=True, norm_first={w.one(True, False)}"
        layer = w.layer(f"nn.TransformerEncoderLayer({d}, 2, 16, {options})", "t")
        w.let(f"{layer}({a})")


def scalars(w: Writer) -> None:
    """Values without dimensions."""
    a = w.pick(single)
    p = w.layer("nn.Parameter(torch.tensor(0.5))", "p")
    w.let(w.one(
        f"{a} * {p}", f"{a} + {p}.exp()", f"{p} * 2 - {p}.tanh()", f"{a} * {a}.shape[0] / 8",
        f"{a} / float({a}.dim())",
    ))  # fmt: skip
