"""Attention on a GPU beside its peers, in TFLOP/s: python bench/gpu/attention.py [A1 A2 ...]

A1  30 shapes of training, causal and not              SDPA as it chooses, and each of its backends
A2  forward, heads of 128, 8k and 16k                  the same
A3  causal backward, heads of 128, 1k to 4k            the same
A4  8 query heads a key head, window of 1024, D 64     SDPA with the window as a mask, flex_attention
A5  ALiBi, relative bias, documents, padding           flex_attention, SDPA with the tensor written out
A6  heads of 192 and 128, causal, 8k to 32k            as A1

4 * B * H * pairs * (D + E) / 2 flop forward, `pairs` those that the mask keeps, and 2.5 times that backward.
A peer that cannot take a case is named with its reason and left out.
"""

import sys
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from measure import backward, report
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fxaccel.kernels import attention

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TOKENS = 16_384


@dataclass
class Case:
    """An attention, in our words and in those of the peers."""

    b: int
    h: int
    g: int
    s: int
    d: int
    e: int = 0
    mask: str = ""
    bias: str = ""
    tables: list = field(default_factory=list)
    keeps: object = None  # flex_attention's mask_mod
    adds: object = None  # flex_attention's score_mod
    tensor: object = None  # what SDPA takes in place of both: called when it is needed
    share: float = 1.0  # of all pairs that the mask keeps
    name: str = ""

    def inputs(self):
        """q, k, v as a projection leaves them, ready for gradients."""
        sizes = ((self.h, self.d), (self.g, self.d), (self.g, self.e or self.d))
        return [
            torch.randn(self.b, self.s, n, d, device="cuda", dtype=torch.bfloat16)
            .transpose(1, 2)
            .requires_grad_()
            for n, d in sizes
        ]

    @property
    def flops(self):
        """Forward, divided by 1e6: over us it is TFLOP/s."""
        return 2 * self.b * self.h * self.s**2 * (self.d + (self.e or self.d)) * self.share / 1e6

    def __str__(self):
        width = f"{self.d}" if self.e in (0, self.d) else f"{self.d}/{self.e}"
        return f"bf16 B{self.b} H{self.h} G{self.g} S{self.s} D{width} {self.name}".strip()


def sdpa(case, backend, q, k, v):
    """SDPA, on one backend where one is given."""
    mask = case.tensor() if case.tensor else None
    causal = case.mask == "k <= q" and mask is None
    call = partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )
    if backend is None:
        return call

    def on_backend(q, k, v):
        with sdpa_kernel(backend):
            return call(q, k, v)

    return on_backend


def flex(case):
    """flex_attention, compiled; the block mask is made once, as its users do."""
    b = case.b if case.tables else None
    blocks = None
    if case.keeps:
        blocks = create_block_mask(case.keeps, b, None, case.s, case.s, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(
        q, k, v, score_mod=case.adds, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]
    )


def ours(case):
    """Our operator; lists of blocks are made in each call."""
    scale = case.d**-0.5
    return lambda q, k, v: attention.op(q, k, v, case.tables, case.mask, case.bias, scale)


def chosen(case):
    """What an accelerated model calls: ours or SDPA, whichever is measured to be faster."""
    choice, scale = attention.fastest(), case.d**-0.5

    def call(q, k, v):
        known = len(choice.chosen)
        out = choice(q, k, v, case.tables, case.mask, case.bias, scale)
        if len(choice.chosen) > known:
            print(*choice.lines(), sep="\n", flush=True)
        return out

    return call


def candidates(case, inputs, with_flex):
    """What runs this case: SDPA, its backends, flex_attention where asked for, ours, and what is chosen."""
    makers = {"default": partial(sdpa, case, None, *inputs)}
    makers |= {name: partial(sdpa, case, backend, *inputs) for name, backend in BACKENDS.items()}
    if with_flex:
        makers["flex"] = partial(flex, case)
    makers["ours"], makers["chosen"] = partial(ours, case), partial(chosen, case)
    return makers


def taken(case, direction, makers):
    """The candidates that can do it; the others are named."""
    found = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
            found[name] = run
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            if name in ("ours", "chosen"):
                raise
            print(
                f"{case} {direction}: {name} cannot: {str(error).strip().splitlines()[0][:120]}", flush=True
            )
            torch.cuda.empty_cache()
    return found


def run(bench, case, forward=True, gradients=True, with_flex=False):
    """One case beside its peers, forward and backward."""
    torch._dynamo.reset()
    inputs = case.inputs()
    plain = [x.detach() for x in inputs]
    makers = candidates(case, plain, with_flex)
    if forward:
        forth = {n: (lambda m=m: partial(m(), *plain)) for n, m in makers.items()}
        report("attention " + bench, f"{case} forward", taken(case, "forward", forth), case.flops, "TFLOP/s")
    if gradients:
        back = {n: (lambda m=m: backward(m(), inputs)) for n, m in makers.items()}
        runs = taken(case, "backward", back)
        report("attention " + bench, f"{case} backward", runs, 2.5 * case.flops, "TFLOP/s")


def causal(**sizes):
    """A causal case; half of the pairs, as the records count them."""
    return Case(mask="k <= q", share=0.5, name="causal", **sizes)


def a1():
    """Training shapes as a rewritten model emits them."""
    for d, h, g in ((64, 32, 32), (128, 16, 16), (128, 32, 4)):
        for s in (1024, 2048, 4096, 8192, 16_384):
            sizes = {"b": TOKENS // s, "h": h, "g": g, "s": s, "d": d}
            run("A1", Case(**sizes))
            run("A1", causal(**sizes))


def a2():
    """The forward kernel alone, long."""
    for s in (8192, 16_384):
        for h, g in ((16, 16), (32, 8)):
            run("A2", Case(TOKENS // s, h, g, s, 128), gradients=False)


def a3():
    """The causal backward kernels alone."""
    for s in (1024, 2048, 4096):
        run("A3", causal(b=TOKENS // s, h=16, g=16, s=s, d=128), forward=False)


def a4():
    """Grouped heads and a window."""
    for s in (4096, 8192, 16_384):
        window = 1024

        def keeps(b, h, q, k):
            return (k <= q) & (q - k < 1024)

        def tensor(s=s):
            q, k = (torch.arange(s, device="cuda").view(shape) for shape in ((-1, 1), (1, -1)))
            return (k <= q) & (q - k < 1024)

        pairs = window * (window + 1) / 2 + (s - window) * window
        case = Case(
            TOKENS // s, 32, 4, s, 64, mask=f"(k <= q) & (q - k < {window})", keeps=keeps, tensor=tensor,
            share=pairs / s**2, name=f"window {window}",
        )  # fmt: skip
        run("A4", case, with_flex=True)


def biased(s):
    """Cases whose mask or bias a model writes as a tensor."""
    b, h = TOKENS // s, 16
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    q, k = (torch.arange(s, device="cuda").view(shape) for shape in ((-1, 1), (1, -1)))
    slopes = 2.0 ** -torch.linspace(0.5, 8, h, device="cuda")
    relative = torch.randn(h, 2 * s - 1, **bf16)
    documents = (torch.arange(s, device="cuda") // (s // 8)).expand(b, s).contiguous()
    there = (torch.arange(s, device="cuda") < s - s // 4).expand(b, s).contiguous()
    past = {"keeps": lambda b, h, q, k: k <= q, "share": 0.5, "mask": "k <= q"}
    sizes = {"b": b, "h": h, "g": h, "s": s, "d": 128}
    yield Case(
        **sizes, **past, name="ALiBi", bias="t0[h] * (k - q)", tables=[slopes],
        adds=lambda score, b, h, q, k: score + slopes[h] * (k - q),
        tensor=lambda: (slopes[:, None, None] * (k - q)).masked_fill(k > q, -torch.inf).bfloat16()[None],
    )  # fmt: skip
    yield Case(
        **sizes, name="relative", bias="t0[h, k - q + S - 1]", tables=[relative],
        adds=lambda score, b, h, q, k: score + relative[h, k - q + s - 1],
        tensor=lambda: relative[:, k - q + s - 1][None],
    )  # fmt: skip
    yield Case(
        **sizes, name="documents", mask="(k <= q) & (t0[b, q] == t0[b, k])", tables=[documents], share=1 / 16,
        keeps=lambda b, h, q, k: (k <= q) & (documents[b, q] == documents[b, k]),
        tensor=lambda: ((k <= q) & (documents[:, :, None] == documents[:, None, :]))[:, None],
    )  # fmt: skip
    yield Case(
        **sizes, name="padding", mask="t0[b, k]", tables=[there], share=0.75,
        keeps=lambda b, h, q, k: there[b, k], tensor=lambda: there[:, None, None, :],
    )  # fmt: skip


def a5():
    """Masks and biases that models write as tensors."""
    for s in (2048, 8192):
        for case in biased(s):
            run("A5", case, with_flex=True)


def a6():
    """Heads of two sizes, long."""
    for s in (8192, 16_384, 32_768):
        run("A6", causal(b=max(1, TOKENS // s), h=16, g=16, s=s, d=192, e=128))


BENCHES = {"A1": a1, "A2": a2, "A3": a3, "A4": a4, "A5": a5, "A6": a6}


def main():
    """The benches named on the command line, or all of them."""
    for name in sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()
