"""Norms on the CPU, one thread: python bench/norm.py prints us and the ratio to eager.

Least time of a thread over interleaved rounds: what another process takes is not counted.
"""

import time

import torch
import torch.nn.functional as F

from fxaccel.kernels import add_rms_norm, layer_norm, rms_norm

EPS, ROUNDS = 1e-6, 9
SHAPES = ((1, 512), (16, 512), (128, 512), (512, 1024), (2048, 1024), (4096, 2048))


def least(candidates, calls):
    """The least time of a call in us, of each."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS + 1):  # the first warms up and is never the least
        for name, run in candidates.items():
            start = time.thread_time()
            for _ in range(calls):
                run()
            best[name] = min(best[name], (time.thread_time() - start) / calls * 1e6)
    return best


def add_eager(x, r, w):
    """The residual add and the norm after it, unfused."""
    h = x + r
    return F.rms_norm(h, w.shape, w, EPS), h


def training(f, *args):
    """Forward and backward of the first output."""
    args = [a.clone().requires_grad_() for a in args]
    seed = torch.randn_like(args[0])

    def step():
        out = f(*args)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, args, seed)

    return step


def main():
    """Every case, forward and training."""
    torch.set_num_threads(1)
    pairs = {
        "rms_norm": (lambda x, w: F.rms_norm(x, w.shape, w, EPS), lambda x, w: rms_norm.op(x, w, EPS), 1),
        "layer_norm": (
            lambda x, w: F.layer_norm(x, w.shape, w, None, EPS),
            lambda x, w: layer_norm.op(x, w, None, EPS),
            1,
        ),
        "add_rms_norm": (add_eager, lambda x, r, w: add_rms_norm.op(x, r, w, EPS), 2),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for n, c in SHAPES:
            calls = max(2, min(500, 2_000_000 // (n * c)))
            for name, (eager, ours, tensors) in pairs.items():
                args = [torch.randn(n, c).to(dtype) for _ in range(tensors)] + [torch.randn(c).to(dtype)]
                with torch.no_grad():
                    forward = least({"eager": lambda: eager(*args), "ours": lambda: ours(*args)}, calls)  # noqa: B023
                both = least({"eager": training(eager, *args), "ours": training(ours, *args)}, calls // 2)
                for what, t in (("forward", forward), ("training", both)):
                    ratio = t["eager"] / t["ours"]
                    case = f"{name:13} {str(dtype)[6:]:9} {[n, c]!s:14} {what:9}"
                    print(
                        f"{case} eager {t['eager']:9.1f} us  ours {t['ours']:9.1f} us  {ratio:5.2f}x",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
