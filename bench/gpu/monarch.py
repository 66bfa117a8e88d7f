"""Monarch and butterfly layers on a GPU against the dense layer: python bench/gpu/monarch.py

Square layers in bf16, in TFLOP/s of the work that their factors ask for. `dense` is F.linear, `bmm` the two
products by torch.bmm with copies for the permutations between them, `apart` our strided kernels, `fused` both
products in one launch, where it is for that size, `ours` what the operator chooses. B1 of the targets asks
for 1.7 times dense with 4 blocks and 4 times with 16, at [8192, 4096].
"""

import torch
import torch.nn.functional as F
from measure import backward, report

from fxaccel.kernels import _blocks, _butterfly, _monarch, butterfly, monarch

SIZES = ((8192, 4096), (8192, 2048), (1024, 4096), (32, 4096))
BLOCKS = (4, 8, 16)


def random(*shape):
    """Of bf16, with a gradient."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(shape[-1] ** -0.5).requires_grad_()


def bmm(x, right, left, out):
    """Two batched products, and copies for the permutations."""
    h = _blocks.shuffle(torch.bmm(x.view(len(x), len(right), -1).transpose(0, 1), right.mT).transpose(0, 1)
                        .reshape(len(x), -1), left.shape[2])  # fmt: skip
    y = torch.bmm(h.view(len(x), len(left), -1).transpose(0, 1), left.mT).transpose(0, 1)
    return _blocks.shuffle(y.reshape(len(x), -1), len(left))[:, :out]


def run_monarch(rows, n, blocks, t):
    """One size of k = l = blocks and rank t, forward and backward."""
    given = random(rows, n), random(blocks, t * blocks, n // blocks), random(blocks, n // blocks, t * blocks)
    x, right, left = (a.detach() for a in given)
    w = random(n, n)
    case = f"bf16 [{rows}, {n}] blocks {blocks} rank {t}"
    mega = 2 * rows * (right.numel() + left.numel()) / 1e6  # over us: TFLOP/s
    forward = {
        "dense": lambda: F.linear(x, w.detach()),
        "bmm": lambda: bmm(x, right, left, n),
        "apart": lambda: _monarch.launch_save(x, right, left, None, n),
        "ours": lambda: monarch.op(x, right, left, None, n),
    }
    if _monarch.fits(right, left):
        forward["fused"] = lambda: _monarch.launch_fused(x, right, left, None, n)
    report("monarch", f"{case} forward", forward, mega, "TFLOP/s")
    steps = {
        "dense": backward(F.linear, (given[0], w)),
        "bmm": backward(lambda *a: bmm(*a, n), given),
        "ours": backward(lambda *a: monarch.op(*a, None, n), given),
    }
    report("monarch", f"{case} backward", steps, 2 * mega, "TFLOP/s")


def run_butterfly(rows, n):
    """One size, forward and backward, in one launch and multiplied out."""
    x, twiddle, w = random(rows, n), random(1, n.bit_length() - 1, n // 2, 2, 2), random(n, n)
    ways = {
        "dense": lambda x, t: F.linear(x, w),
        "expanded": lambda x, t: butterfly.expanded(x, t, None, n),
        "ours": lambda x, t: butterfly.op(x, t, None, n),
    }
    mega = 2 * rows * twiddle.numel() / 1e6
    plain = x.detach(), twiddle.detach()
    forward = {name: (lambda f=f: f(*plain)) for name, f in ways.items()}
    with torch.no_grad():
        report("butterfly", f"bf16 [{rows}, {n}] forward", forward, mega, "TFLOP/s")
    dense = {"dense": backward(F.linear, (x, w))}
    steps = dense | {k: backward(f, (x, twiddle)) for k, f in ways.items() if k != "dense"}
    report("butterfly", f"bf16 [{rows}, {n}] backward", steps, 2 * mega, "TFLOP/s")


def main():
    """Every case."""
    for rows, n in SIZES:
        for blocks in BLOCKS:
            run_monarch(rows, n, blocks, n // blocks**2)
        run_monarch(rows, n, 64, 1)
    for n in (256, 1024, _butterfly.MAX, 2 * _butterfly.MAX):
        run_butterfly(8192, n)


if __name__ == "__main__":
    main()
