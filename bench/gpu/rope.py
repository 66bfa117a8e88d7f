"""Rotary embeddings on a GPU against eager and torch.compile, in TB/s: python bench/gpu/rope.py

Forward and backward read and write q and k once; the angles stay in the cache. `copy` is the ceiling.
"""

import torch
from measure import backward, report

from fxaccel.kernels import rope

HEADS, GROUPS = 32, 8


def halves(x):
    """Llama's rotate_half."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def eager(q, k, cos, sin):
    """As models write it."""
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


def ours(q, k, cos, sin):
    """Both in one launch."""
    return rope.op([q, k], cos, sin)


def main():
    """Forward and backward for each length and head size."""
    for d in (64, 128):
        for s in (4096, 32_768):
            q, k = (
                torch.randn(4, s, n, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                for n in (HEADS, GROUPS)
            )
            at = torch.outer(
                torch.arange(s, device="cuda"), 1e4 ** -torch.linspace(0, 1, d // 2, device="cuda")
            )
            cos, sin = (torch.cat([t, t], -1).bfloat16() for t in (at.cos(), at.sin()))
            torch._dynamo.reset()
            f = {"eager": eager, "compile": torch.compile(eager), "ours": ours}
            bytes_ = 2 * (q.nbytes + k.nbytes) / 1e6  # over us: TB/s
            case, target = f"bf16 q {list(q.shape)} k {list(k.shape)}", torch.empty_like(q)
            report(
                "rope",
                f"{case} ceiling",
                {"copy": lambda t=target, q=q: t.copy_(q)},
                2 * q.nbytes / 1e6,
                "TB/s",
            )
            args = (q, k, cos, sin)
            report(
                "rope",
                f"{case} forward",
                {n: (lambda g=g, a=args: g(*a)) for n, g in f.items()},
                bytes_,
                "TB/s",
            )
            leaves = [t.detach().requires_grad_() for t in (q, k)]
            back = {
                n: backward(lambda *qk, g=g, tables=(cos, sin): g(*qk, *tables), leaves) for n, g in f.items()
            }
            report("rope", f"{case} backward", back, bytes_, "TB/s")


if __name__ == "__main__":
    main()
