"""Computes by the fastest of several ways for the sizes at hand, found by trying each once.

    run = Fastest("attention", {"fxaccel": op, "SDPA": sdpa}, fits={"SDPA": takes})
    run(q, k, v, ...)           tries both ways, then calls the faster one here and for like sizes
    list(run.lines())           "attention [2, 16, 2048, 64] ... bfloat16, with gradients: SDPA 0.21 ms, ..."

Like are calls of the same dtypes and options whose sizes agree up to the next power of two: a sequence that
grows by one is tried again when it has doubled. The first way is taken untried where trying is impossible or
not wanted: while a graph is traced or recorded, and where deterministic algorithms are asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxaccel.kernels._clock import least

Way = Callable[..., Tensor]
Timer = Callable[[Sequence[Callable[[], Any]]], list[float]]


def measured(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """The least time in ms of each on the current GPU, by turns."""
    return least(runs, torch.device("cuda"))


class Fastest:
    """One function with several implementations.

    ways    name -> function of the same arguments; the first takes all calls
    fits    for other ways, whether they take a call
    """

    def __init__(
        self, name: str, ways: Mapping[str, Way], fits: Mapping[str, Callable[..., bool]],
        timer: Timer = measured,
    ) -> None:  # fmt: skip
        self.name, self.ways, self.fits, self.timer = name, dict(ways), dict(fits), timer
        self.chosen: dict[Any, tuple[str, dict[str, str]]] = {}

    def __call__(self, *args: Any) -> Tensor:
        first = next(iter(self.ways.values()))
        if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
            return first(*args)
        key = _key(args)
        if key not in self.chosen:
            if _recorded(args[0]):
                return first(*args)
            self.chosen[key] = self.tried(args)
        name = self.chosen[key][0]
        fits = self.fits.get(name)
        return self.ways[name](*args) if fits is None or fits(*args) else first(*args)

    def tried(self, args: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
        """The fastest way, and for each what it took or why it was not tried."""
        said = {n: "does not fit" for n, fits in self.fits.items() if not fits(*args)}
        runs = {n: _trial(way, args) for n, way in self.ways.items() if n not in said}
        if len(runs) == 1:
            return next(iter(runs)), said
        device = args[0].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for name, run in list(runs.items())[1:]:
                try:
                    run()
                except RuntimeError as error:  # out of memory, no back end for these sizes
                    said[name] = f"raises {type(error).__name__}"
                    del runs[name]
            times = dict(zip(runs, self.timer(list(runs.values())), strict=True))
        return min(times, key=lambda n: times[n]), {n: f"{t:.3g} ms" for n, t in times.items()} | said

    def lines(self) -> Iterator[str]:
        """What was chosen, a line for each kind of call."""
        for key, (name, said) in self.chosen.items():
            found = "; ".join(f"{n} {why}" for n, why in said.items() if n != name)
            yield f"{self.name} {_text(key)}: {' '.join((name, said.get(name, ''))).strip()}; {found}"


def _recorded(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _key(args: Sequence[Any]) -> Any:
    """What calls have in common that are alike."""
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(args))
    return gradients, tuple(_like(a) for a in args)


def _like(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, tuple(_power(n) for n in arg.shape)
    return tuple(map(_like, arg)) if isinstance(arg, (list, tuple)) else arg


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else n


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _trial(way: Way, args: Sequence[Any]) -> Callable[[], Any]:
    """The call, and its gradients where they are wanted, on leaves of its own."""
    own = {id(t): t.detach().requires_grad_(t.requires_grad) for t in _tensors(args)}

    def swapped(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return own[id(arg)]
        return [swapped(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

    given = [swapped(a) for a in args]
    leaves = [t for t in own.values() if t.requires_grad]

    def run() -> Any:
        out = way(*given)
        if out.requires_grad:
            return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)
        return out

    return run


def _text(key: Any) -> str:
    gradients, args = key
    tensors = [a for a in args if isinstance(a, tuple) and a and isinstance(a[0], torch.dtype)]
    sizes = " ".join(str(list(shape)) for _, shape in tensors)
    options = [str(a) for a in args if isinstance(a, (str, float, int)) and a not in ("", 0)]
    kind = str(tensors[0][0]).removeprefix("torch.")
    return ", ".join([f"{sizes} {kind}", *options, *(["with gradients"] if gradients else [])])
