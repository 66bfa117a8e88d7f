"""Norms on a GPU against eager and torch.compile, in TB/s of the least traffic: python bench/gpu/norms.py

Forward 2 and backward 3 tensor-sized transfers; with a residual add 4 and 4. `copy` is the ceiling.
"""

import torch
import torch.nn.functional as F
from measure import backward, report

from fxaccel.kernels import add_rms_norm, layer_norm, rms_norm

EPS = 1e-6
TOKENS = 2**25  # elements: 64 MiB in bf16
COLUMNS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536)


def eager_rms(x, w):
    """RMSNorm as models write it."""
    return F.rms_norm(x, x.shape[-1:], w, EPS)


def eager_layer(x, w):
    """Layer norm as models write it."""
    return F.layer_norm(x, x.shape[-1:], w, w, EPS)


def eager_add(x, r, w):
    """The residual add and the norm after it, unfused."""
    h = x + r
    return F.rms_norm(h, h.shape[-1:], w, EPS), h


CASES = {
    "rms_norm": (eager_rms, lambda x, w: rms_norm.op(x, w, EPS), 1, 2, 3),
    "layer_norm": (eager_layer, lambda x, w: layer_norm.op(x, w, w, EPS), 1, 2, 3),
    "add_rms_norm": (eager_add, lambda x, r, w: add_rms_norm.op(x, r, w, EPS), 2, 4, 4),
}


def main():
    """Every case, forward and backward."""
    for name, (eager, ours, tensors, forth, back) in CASES.items():
        for c in COLUMNS:
            shape = (TOKENS // c, c)
            sizes = [shape] * tensors + [(c,)]
            args = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in sizes]
            torch._dynamo.reset()
            f = {"eager": eager, "compile": torch.compile(eager), "ours": ours}
            bytes_ = args[0].nbytes / 1e6  # over us: TB/s
            plain = [a.detach() for a in args]
            case = f"bf16 {list(shape)}"
            target = torch.empty_like(plain[0])
            copy = {"copy": lambda target=target, plain=plain: target.copy_(plain[0])}
            forward = {k: (lambda g=g, plain=plain: g(*plain)) for k, g in f.items()}
            report(name, f"{case} ceiling", copy, 2 * bytes_, "TB/s")
            report(name, f"{case} forward", forward, forth * bytes_, "TB/s")
            report(
                name, f"{case} backward", {k: backward(g, args) for k, g in f.items()}, back * bytes_, "TB/s"
            )


if __name__ == "__main__":
    main()
