"""Attention on the CPU: X4 of the targets, masks that leave scores out, memory, and which way is faster.

X4         forward at S 2048 with a causal mask: torch's attention given the mask as a tensor, as models write
           it, against the operator, which is told that the mask is causal.
sparse     forward and backward of masks that keep few scores, against torch's attention with the mask tensor.
memory     the peak of forward and backward together at four lengths, the gradients included.
crossover  PyTorch's kernel in the inputs' dtype and in fp32, and a written-out block: what the limits in
           kernels/_attention_cpu.py follow from.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fxaccel.kernels import _attention_cpu, attention

HEADS, WIDTH = 4, 64
SCALE = WIDTH**-0.5


def inputs(
    length: int, heads: int = HEADS, batch: int = 1, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v as models make them: heads beside the width."""
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, WIDTH).transpose(1, 2).to(dtype) for _ in range(3)]


def trained(call: Callable[..., Tensor], given: list[Tensor]) -> Callable[[], Any]:
    """Forward and backward."""
    leaves = [x.detach().requires_grad_() for x in given]
    dout = torch.ones_like(given[0])
    return lambda: torch.autograd.grad(call(*leaves), leaves, dout)


def ours(mask: str, tables: list[Tensor]) -> Callable[..., Tensor]:
    """The operator with that mask."""
    return lambda q, k, v: attention.op(q, k, v, tables, mask, "", SCALE)


def theirs(mask: Tensor) -> Callable[..., Tensor]:
    """PyTorch's attention with the mask as a tensor."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)


def causal_tensor() -> dict[str, Any]:
    """X4: seconds of forward at S 2048, the model as written with a bool and with a float mask."""
    given = inputs(2048)
    keep = torch.ones(2048, 2048, dtype=torch.bool).tril()
    added = torch.zeros(2048, 2048).masked_fill(~keep, -torch.inf)
    calls = {
        "bool mask": lambda: theirs(keep)(*given), "float mask": lambda: theirs(added)(*given),
        "fxaccel": lambda: ours("k <= q", [])(*given),
    }  # fmt: skip
    with torch.no_grad():
        taken = interleaved(calls, rounds=15)
    ratios = {name: t["min"] / taken["fxaccel"]["min"] for name, t in taken.items() if name != "fxaccel"}
    return {"shape": f"B 1, H {HEADS}, S = T = 2048, D {WIDTH}, float32", "seconds": taken, "ratios": ratios}


def masks(length: int) -> dict[str, tuple[str, list[Tensor]]]:
    """Name -> mask and tables, for a batch of 2."""
    keep = torch.ones(2, length, dtype=torch.bool)
    keep[0, length // 2 :] = False
    documents = (torch.arange(length) // (length // 8)).expand(2, -1)
    return {
        "bottom right": ("k <= q + T - S", []),
        "window of 128": ("(k <= q) & (q - k < 128)", []),
        "chunks of 128": ("q // 128 == k // 128", []),
        "padding": ("t0[b, k]", [keep]),
        "causal and padding": ("(k <= q) & t0[b, k]", [keep]),
        "causal, 8 documents": ("(k <= q) & (t0[b, q] == t0[b, k])", [documents]),
    }


def sparse(length: int = 2048) -> dict[str, Any]:
    """Seconds of forward, and of forward and backward."""
    from fxaccel.kernels._score import evaluate

    given = inputs(length, batch=2)
    found: dict[str, Any] = {"shape": f"B 2, H {HEADS}, S = T = {length}, D {WIDTH}, float32"}
    for name, (mask, tables) in masks(length).items():
        keep = evaluate(mask, tables, 2, HEADS, length, length)
        with torch.no_grad():
            forward = interleaved(
                {
                    "sdpa": lambda k=keep: theirs(k)(*given),
                    "fxaccel": lambda m=mask, t=tables: ours(m, t)(*given),
                },
                rounds=9,
            )
        both = interleaved(
            {"sdpa": trained(theirs(keep), given), "fxaccel": trained(ours(mask, tables), given)}, rounds=9
        )
        found[name] = {
            "forward": forward, "ratio": forward["sdpa"]["min"] / forward["fxaccel"]["min"],
            "forward and backward": both, "ratio of both": both["sdpa"]["min"] / both["fxaccel"]["min"],
        }  # fmt: skip
        print(name, f"forward {found[name]['ratio']:.2f}x, both {found[name]['ratio of both']:.2f}x of sdpa")
    return found


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it hold at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Any = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.alive[x.untyped_storage()] = x.untyped_storage().nbytes()
        self.most = max(self.most, sum(self.alive.values()))
        return out


def peak(length: int, mask: str, tables: list[Tensor]) -> int:
    """Bytes of forward and backward, below the operator, where a mode sees every tensor."""
    q, k, v = inputs(length)
    rest: tuple[Any, ...] = (SCALE, 0.0, None, 0.0, torch.zeros(0, dtype=torch.int64))
    with Peak() as mode:
        out, lse = _attention_cpu.launch_forward(q, k, v, tables, mask, "", *rest)
        grads = _attention_cpu.launch_backward(
            torch.ones_like(out), q, k, v, tables, mask, "", out, lse, *rest, [False] * (len(tables) + 1)
        )
        del grads
    return mode.most


def memory() -> dict[str, Any]:
    """Bytes at four lengths; linear if they double with the length."""
    found: dict[str, Any] = {"shape": f"B 1, H {HEADS}, D {WIDTH}, float32; bytes of forward and backward"}
    kinds = {
        "causal": ("k <= q", False), "window of 128": ("(k <= q) & (q - k < 128)", False),
        "padding": ("t0[b, k]", True), "causal and padding": ("(k <= q) & t0[b, k]", True),
        "bottom right": ("k <= q + T - S + 1", False),
    }  # fmt: skip
    for name, (mask, table) in kinds.items():
        sizes = {}
        for length in (1024, 2048, 4096, 8192):
            keep = torch.arange(length)[None] < length - 7
            sizes[length] = peak(length, mask, [keep] if table else [])
        found[name] = {"bytes": sizes, "growth": sizes[8192] / sizes[4096]}
        print(name, {n: f"{x / 2**20:.1f} MiB" for n, x in sizes.items()})
    return found


def ways(given: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Forward and backward: PyTorch's kernel in the inputs' dtype and in fp32, written out, torch's math."""
    cpu = _attention_cpu
    call = cpu._Call(*given, [], "", "", SCALE, 0.0, None, 0.0, torch.zeros(0))
    out, lse = cpu._flash_forward(call)

    def wide() -> Any:
        return replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())

    def wide_backward() -> list[Tensor]:
        grads = cpu._flash_backward(wide(), out.float(), out.float(), lse)
        return [g.to(out.dtype) for g in grads]

    def math() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            return F.scaled_dot_product_attention(*given, scale=SCALE)

    found: dict[str, Callable[[], Any]] = {
        "forward": lambda: cpu._flash_forward(call),
        "forward, written out": lambda: cpu._written_forward(call),
        "forward, torch's math": math,
        "backward": lambda: cpu._flash_backward(call, out, out, lse),
        "backward, written out": lambda: cpu._written_backward(call, out, out, lse, []),
    }
    if out.dtype != torch.float32:
        found["forward, in fp32"] = lambda: cpu._flash_forward(wide())[0].to(out.dtype)
        found["backward, in fp32"] = wide_backward
    return found


def crossover() -> dict[str, Any]:
    """Seconds of forward and of backward by the ways there are, B * S = 1024 and H 8."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for length in (16, 64, 128, 256, 512, 1024):
            calls = ways(inputs(length, 8, 1024 // length, dtype))
            taken = {name: t["min"] for name, t in interleaved(calls, rounds=7).items()}
            found[f"{dtype} S {length}"] = taken
            print(dtype, length, {name: f"{t * 1e3:.2f} ms" for name, t in taken.items()})
    return found


def main() -> None:
    """Measure, print and save."""
    torch.set_num_threads(1)
    x4 = causal_tensor()
    print("X4, target 1.9:", {name: round(ratio, 2) for name, ratio in x4["ratios"].items()})
    figures = {"X4": x4, "sparse": sparse(), "memory": memory(), "crossover": crossover()}
    save("attention_cpu", figures)
    print(json.dumps(x4["ratios"]))


if __name__ == "__main__":
    main()
