"""What the passes for convolutions buy: python bench/convolution.py [inference] [training] [compiled]

inference    models of timm and a U-Net on one image of 160 x 160 (U-Net 128 x 128): as written, in torch's
             channels_last, by the default passes, without fuse-convolution, and with use-channels-last
             besides or in its place
training     forward and backward on 4 images of 96 x 96 (U-Net 64 x 64): as written, in torch's
             channels_last, by the default passes, and by those and use-channels-last
compiled     two of them beside torch.compile and torch.compile with freezing, which take minutes to compile

Times are CPU time of 1 thread, minimum of interleaved rounds, float32, random weights.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import interleaved, save
from torch import Tensor, nn

import fxaccel
from fxaccel.discover import available
from tests.zoo.torchvision_shim import importable

with importable():
    import timm

NAMES = ("resnet50", "efficientnet_b0", "mobilenetv3_large_100", "convnext_tiny", "densenet121")
DEFAULT = [n for n, p in available().items() if p.default]
SIZE = 160


class UNet(nn.Module):
    """A U-Net of four levels of two convolutions with batch norms, upsampled by nearest neighbours."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        wide = [width * 2**i for i in range(4)]
        self.down = nn.ModuleList(_pair(a, b) for a, b in zip([3, *wide], wide, strict=False))
        self.up = nn.ModuleList(_pair(3 * a, a) for a in wide[-2::-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        past = []
        for i, pair in enumerate(self.down):
            x = pair(x if i == 0 else F.max_pool2d(x, 2))
            past.append(x)
        for pair, beside in zip(self.up, past[-2::-1], strict=True):
            x = pair(torch.cat([F.interpolate(x, scale_factor=2), beside], 1))
        return self.head(x)


def _pair(given: int, made: int) -> nn.Sequential:
    norms = [nn.BatchNorm2d(made) for _ in range(2)]
    first, second = nn.Conv2d(given, made, 3, padding=1), nn.Conv2d(made, made, 3, padding=1)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())


def models(names: tuple[str, ...] = (*NAMES, "unet")) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, model and input."""
    for name in names:
        torch.manual_seed(0)
        model = UNet() if name == "unet" else timm.create_model(name)
        size = 128 if name == "unet" else SIZE
        yield name, model.eval(), torch.randn(1, 3, size, size)


def channels_last(model: nn.Module) -> nn.Module:
    """A copy as torch's own tutorial has it."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)


def timed(candidates: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, Any]:
    """Milliseconds of each, and times as fast as the first."""
    for call in candidates.values():
        call()
    times = {k: 1e3 * v["min"] for k, v in interleaved(candidates, rounds=rounds).items()}
    first = next(iter(times.values()))
    return {"ms": times, "times as fast": {k: first / t for k, t in times.items()}}


def told(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Figures by the name of their model, and on the screen."""
    print(name, {k: round(v, 2) for k, v in figures["times as fast"].items()}, flush=True)
    return {name: figures}


@torch.no_grad()
def inference() -> Iterator[dict[str, Any]]:
    """Every model by every way."""
    for name, model, x in models():
        torched, like = channels_last(model), x.contiguous(memory_format=torch.channels_last)
        rest = [n for n in DEFAULT if n != "fuse-convolution"]
        passes = {
            "default passes": None,
            "without fuse-convolution": rest,
            "with use-channels-last": [*DEFAULT, "use-channels-last"],
            "in its place": [*rest, "use-channels-last"],
        }
        ways = {n: fxaccel.accelerate(model, p, example_inputs=(x,)) for n, p in passes.items()}
        calls = {"eager": partial(model, x), "eager in channels_last": partial(torched, like)}
        yield told(name, timed(calls | {n: partial(f, x) for n, f in ways.items()}))


def training() -> Iterator[dict[str, Any]]:
    """Two models by every way; use-channels-last leaves those alone that train batch norms."""
    for name, model, _ in models(("resnet18", "convnext_tiny")):
        model.train()
        x = torch.randn(4, 3, *[64 if name == "unet" else 96] * 2)
        passes = {"default passes": DEFAULT, "and use-channels-last": [*DEFAULT, "use-channels-last"]}
        ways = {
            n: fxaccel.accelerate(copy.deepcopy(model), p, example_inputs=(x,)) for n, p in passes.items()
        }
        torched, like = channels_last(model), x.contiguous(memory_format=torch.channels_last)
        calls = {"eager": partial(_step, model, x), "eager in channels_last": partial(_step, torched, like)}
        figures = timed(calls | {n: partial(_step, f, x) for n, f in ways.items()}, rounds=9)
        figures["sites"] = len(ways["and use-channels-last"].report()["use-channels-last"].applied)
        print(figures["sites"], "sites", end=" ")
        yield told(name, figures)


def _step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().mean().backward()


@torch.no_grad()
def compiled() -> Iterator[dict[str, Any]]:
    """Two models beside torch.compile."""
    for name, model, x in models(("resnet50", "efficientnet_b0")):
        torch._dynamo.reset()
        frozen = {"options": {"freezing": True}}
        ways = {
            "default passes": fxaccel.accelerate(model, example_inputs=(x,)),
            "torch.compile": torch.compile(model, dynamic=False),
            "with freezing": torch.compile(model, dynamic=False, **frozen),
        }
        yield told(name, timed({"eager": partial(model, x)} | {n: partial(f, x) for n, f in ways.items()}))


if __name__ == "__main__":
    parts = {"inference": inference, "training": training, "compiled": compiled}
    for part in sys.argv[1:] or parts:
        figures: dict[str, Any] = {}
        for found in parts[part]():
            figures |= found
            save(f"convolution_{part}_cpu", {part: figures})
