"""Attention on a GPU against SDPA's backends, in TFLOP/s: python bench/gpu/attention.py

4 * B * H * S * T * D flop forward, halved for causal, and 2.5 times that backward.
"""

import torch
import torch.nn.functional as F
from measure import report
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxaccel.kernels import attention

TOKENS = 16_384
LENGTHS = (1024, 2048, 4096, 8192, 16_384)
HEADS = ((64, 32, 32), (128, 16, 16), (128, 32, 4), (64, 32, 4))  # D, H, G


def theirs(backend, q, k, v, causal):
    """SDPA on one backend; raises where that one does not take the case."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def candidates(causal):
    """The default choice of SDPA, its backends one by one, and ours."""
    return {
        "default": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        ),
        "flash": lambda *t: theirs(SDPBackend.FLASH_ATTENTION, *t, causal),
        "cudnn": lambda *t: theirs(SDPBackend.CUDNN_ATTENTION, *t, causal),
        "ours": lambda q, k, v: attention.op(q, k, v, None, causal, q.shape[-1] ** -0.5),
    }


def backward(f, args):
    """The backward pass alone, to be called again and again."""
    out = f(*args)
    seed = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, args, seed, retain_graph=True)


def runs(run):
    """Whether this backend takes the case at all."""
    try:
        run()
    except RuntimeError:
        return False
    return True


def main():
    """Every case, forward and backward."""
    for d, h, g in HEADS:
        for s in LENGTHS:
            for causal in (False, True):
                b = TOKENS // s
                args = [
                    torch.randn(b, s, n, d, device="cuda", dtype=torch.bfloat16)
                    .transpose(1, 2)
                    .requires_grad_()
                    for n in (h, g, g)
                ]
                plain = [a.detach() for a in args]
                flops = 4 * b * h * s * s * d / (2 if causal else 1) / 1e6  # over us: TFLOP/s
                case = f"bf16 B{b} H{h} G{g} S{s} D{d}{' causal' if causal else ''}"
                forth = {k: (lambda f=f, plain=plain: f(*plain)) for k, f in candidates(causal).items()}
                forth = {k: f for k, f in forth.items() if runs(f)}
                report("attention", f"{case} forward", forth, flops, "TFLOP/s")
                back = {k: backward(f, args) for k, f in candidates(causal).items() if k in forth}
                back = {k: f for k, f in back.items() if runs(f)}
                report("attention", f"{case} backward", back, 2.5 * flops, "TFLOP/s")


if __name__ == "__main__":
    main()
