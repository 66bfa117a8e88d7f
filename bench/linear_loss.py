"""The last linear and its cross entropy on the CPU, as one operator and as two: python bench/linear_loss.py

A training step: forward, and backward to hidden states and weight, in float32. Time is `time.thread_time()`,
interleaved, on one thread. The peak is what operators allocate at the most, hidden states, weight and labels
left out and gradients counted in; the meter sees into our operator. `process` is by how much a process of its
own grows at the most. torch.compile, which fuses what is around the products, is timed alone.
"""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import grown, interleaved, save
from torch import Tensor

from fxaccel.kernels import linear_cross_entropy
from fxaccel.memory import Meter

SHAPES = ((512, 256, 8_192), (1024, 256, 32_000), (4096, 512, 32_000))  # rows, width, classes
ROUNDS = 9


def eager(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """As models write it."""
    return F.cross_entropy(F.linear(x, w), y)


def ours(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """What fuse-linear-loss makes of it."""
    return linear_cross_entropy.op(x, w, None, y)


def tensors(n: int, d: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels."""
    torch.manual_seed(0)
    x, w = torch.randn(n, d), torch.randn(v, d) * d**-0.5
    return x.requires_grad_(), w.requires_grad_(), torch.randint(0, v, (n,))


def stepped(f: Callable[..., Tensor], given: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    """A training step of a loss."""
    return lambda: torch.autograd.grad(f(*given), given[:2])


def counted(f: Callable[..., Tensor], shape: tuple[int, int, int]) -> int:
    """Bytes that operators hold at the most in a step."""
    step = stepped(f, tensors(*shape))
    kept = linear_cross_entropy.save_op
    linear_cross_entropy.save_op = linear_cross_entropy.compose_save  # for the meter to see inside
    try:
        with Meter() as meter:
            step()
    finally:
        linear_cross_entropy.save_op = kept
    return meter.peak


def grows(name: str, shape: tuple[int, int, int], pipe: Any) -> None:
    """By how many bytes a process grows in a step."""
    torch.set_num_threads(1)
    step = stepped({"eager": eager, "fxaccel": ours}[name], tensors(*shape))
    stepped(ours, tensors(8, shape[1], 8))()  # libraries are loaded
    pipe.send(grown(step))


def process(name: str, shape: tuple[int, int, int]) -> int:
    """The same, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=grows, args=(name, shape, sender))
    child.start()
    found = receiver.recv()
    child.join()
    return int(found)


def measured(shape: tuple[int, int, int]) -> dict[str, Any]:
    """Time and memory of every candidate, and our shares of eager's."""
    given = tensors(*shape)
    torch._dynamo.reset()
    calls = {"eager": eager, "fxaccel": ours, "torch.compile": torch.compile(eager)}
    times = interleaved({name: stepped(f, given) for name, f in calls.items()}, rounds=ROUNDS)
    bytes_ = {"eager": counted(eager, shape), "fxaccel": counted(ours, shape)}
    processes = {name: process(name, shape) for name in bytes_}
    fast = times["fxaccel"]["min"]
    return {
        "seconds": times, "bytes": bytes_, "process bytes": processes,
        "speed": {name: t["min"] / fast for name, t in times.items()},
        "peak": bytes_["fxaccel"] / bytes_["eager"],
        "process peak": processes["fxaccel"] / processes["eager"],
    }  # fmt: skip


def main() -> None:
    """Every shape."""
    figures: dict[str, Any] = {}
    for shape in SHAPES:
        found = figures["float32 {} rows, width {}, {} classes".format(*shape)] = measured(shape)
        speed = "  ".join(f"{name} {ratio:.2f}" for name, ratio in found["speed"].items())
        told = f"peak {found['peak']:.3f}  process {found['process peak']:.3f}"
        print(f"{shape}  time over ours: {speed}  {told}", flush=True)
    save("linear_loss_cpu", figures)


if __name__ == "__main__":
    main()
