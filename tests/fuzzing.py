"""What the fuzzer asks of a random model: after all exact passes it computes what it did, or we refuse."""

from __future__ import annotations

import copy
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxaccel
from fxaccel import driver
from fxaccel.errors import CaptureError, OptionError
from fxaccel.evaluate import UNSTEADY, Unsteady
from tests.helpers import in_pieces
from tests.random_models import Sample, written

ALWAYS = (
    "fuse-attention", "fuse-norm", "fuse-rope", "fuse-glu", "fuse-linear-loss{least=0.001KiB}",
    "layer-norm-to-rms-norm{even_if_slower=true}", "merge-linears{even_if_slower=true}",
    "fuse-activation{even_if_slower=true}", "use-channels-last",
)  # fmt: skip
INFERENCE = ("fold-batch-norm", "pack-weights", "fuse-convolution")
TRAINING = ("split-attention", "checkpoint{budget=0.9}", "partition{stages=2}")
UNFIT = (  # refusals of a whole pass, in words of its own
    "it serves ", "of stage ", "the budget ", "the step has ", "the step cannot be run without data",
    "no output of the step has a gradient",
)  # fmt: skip
DRAWS = 4


class Wrong(AssertionError):
    """A model that is not what it was, with the text of the model."""


def passes_of(sample: Sample) -> list[str]:
    """All exact passes that serve the mode; those that plan a training step in a few."""
    draw = random.Random(f"passes {sample.seed}")
    if not sample.grad:
        return [*ALWAYS, *INFERENCE]
    return [*ALWAYS, *(p for p in TRAINING if draw.random() < 0.3)]


def observed(model: nn.Module, sample: Sample, inputs: Sequence[Any]) -> dict[str, Any]:
    """All that a call shows: results, gradients, buffers and inputs afterwards."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) if exclusive(t) else t for t in inputs]
    torch.manual_seed(5)
    model.zero_grad()
    with torch.set_grad_enabled(sample.grad):
        out, spec = pytree.tree_flatten(model(*leaves))
        seen: dict[str, Any] = {f"output {i}": t for i, t in enumerate(out)}
        flowing = [t for t in out if t.requires_grad]
        if flowing:
            torch.stack([weighted(t) for t in flowing]).sum().backward()
    seen |= {f"requires_grad of output {i}": t.requires_grad for i, t in enumerate(out)}
    seen |= {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    seen |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    seen |= {f"input {i} afterwards": t.detach().clone() for i, t in enumerate(leaves)}
    seen |= {f"gradient of input {i}": t.grad for i, t in enumerate(leaves) if t.is_leaf}
    return {"structure": spec, **{n: t.detach() if isinstance(t, Tensor) else t for n, t in seen.items()}}


def weighted(t: Tensor) -> Tensor:
    """A sum of all elements, each with a weight of its own."""
    return (t * torch.arange(t.numel()).view(t.shape).add(1).cos().to(t)).sum().double()


def exclusive(t: Tensor) -> bool:
    """Whether a copy of the tensor has its strides: those that overlap are given as they are."""
    return t.clone().stride() == t.stride()


def in_float64(sample: Sample, model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What the program shows where all it computes is float64."""
    exact = sample.module(exact=True)
    exact.load_state_dict(model.state_dict())
    leaves = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    for leaf, t in zip(leaves, inputs, strict=True):
        leaf.requires_grad_(t.requires_grad)
    return observed(exact.double(), sample, leaves)


def differs(got: dict[str, Any], want: dict[str, Any], exact: Any, eps: float) -> str:
    """The first of all that is seen that is not the model's."""
    if list(got) != list(want):
        return f"has {list(got)} where the model has {list(want)}"
    found = Found(exact, eps)
    for name, theirs in want.items():
        ours = got[name]
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            if ours != theirs:
                return f"{name} is {ours} where the model has {theirs}"
        elif (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"{name} is {ours.dtype}{list(ours.shape)}, not {theirs.dtype}{list(theirs.shape)}"
        elif why := found.apart(name, ours, theirs):
            return why
    return ""


class Found:
    """The program in float64, and how far from it values may be: four times as far as the model's own.

    Where that is by chance very near, what an error of one eps in every operator does is added.
    """

    def __init__(self, exact: Any, eps: float) -> None:
        self.exact, self.eps, self.reference = exact, eps, exact(None)
        gradients = [largest(t) for n, t in self.reference.items() if "gradient of" in n and t is not None]
        self.steepest = max(gradients, default=0.0)

    @cached_property
    def moved(self) -> list[dict[str, Any]]:
        return [self.exact(seed) for seed in range(1, DRAWS + 1)]

    def apart(self, name: str, ours: Tensor, theirs: Tensor) -> str:
        if not theirs.is_floating_point():
            return "" if torch.equal(ours, theirs) else f"{name} differs"
        reference = self.reference[name]
        error, own = far(ours, reference), far(theirs, reference)
        # A gradient that is none, of terms that cancel, is off by what others are.
        size = self.steepest if "gradient of" in name else largest(reference)
        allowed = 4 * own + 4 * self.eps * size
        if error <= allowed:
            return ""
        allowed += 4 * max(far(m[name], reference) for m in self.moved) * self.eps / UNSTEADY
        if error <= allowed:
            return ""
        return f"{name} is off by {error:.3g}, the model by {own:.3g}, allowed are {allowed:.3g}"


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() and t.is_floating_point() else 0.0


def far(t: Tensor, reference: Tensor) -> float:
    """The largest distance; infinite where one of the two is no number."""
    if not t.numel():
        return 0.0
    found = float((t.double() - reference).abs().max())
    return found if found == found else float("inf")


def fuzz(sample: Sample, passes: Sequence[Any] | None = None, *, proofs: bool = True) -> Counter[str]:
    """Check one model; how many sites each pass has. Raises Wrong with the program that shows the fault.

    proofs    whether sites are proved, as they are for users; without, a wrong rule is found by its results
    """
    passes = passes_of(sample) if passes is None else list(passes)
    try:
        return checked(sample, passes, proofs)
    except Exception as error:
        raise Wrong(f"{type(error).__name__}: {error}\npasses = {passes}\n{sample}") from error


def checked(sample: Sample, passes: list[Any], proofs: bool) -> Counter[str]:
    model, inputs = sample.module(), sample.inputs(sample.batches[0])
    before, given = state(model), [t.clone() for t in inputs]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not proofs:
            patch.setattr(driver, "prove", lambda *a: type("Believed", (), {"key": ""}))
        with torch.set_grad_enabled(sample.grad):
            try:
                fast = fxaccel.accelerate(copy.deepcopy(model), passes, example_inputs=inputs, check=False)
            except (CaptureError, OptionError) as error:
                return Counter(["refused" if error.message else "refused without a word"])
        assert state(model) == before, "the model was changed"
        assert all(torch.equal(a, b) for a, b in zip(inputs, given, strict=True)), "the inputs were changed"
        eps = torch.finfo(torch.bfloat16 if "HALF" in sample.text.split("class")[1] else torch.float32).eps
        for batch in sample.batches:
            inputs = sample.inputs(batch)
            exact = reference(sample, copy.deepcopy(model), inputs)
            want = observed(model, sample, inputs)
            got = observed(fast, sample, inputs)
            why = differs(got, want, exact, eps)
            assert not why, f"of {batch} rows {why}"
    return counted(fast)


def reference(sample: Sample, model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """What the model shows in float64; with a seed, where every operator is off by 2**-30."""

    def run(seed: int | None) -> dict[str, Any]:
        if seed is None:
            return in_float64(sample, model, inputs)
        with Unsteady(seed):
            return in_float64(sample, model, inputs)

    return run


def state(model: nn.Module) -> dict[str, bytes]:
    return {n: t.detach().numpy().tobytes() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def counted(fast: Any) -> Counter[str]:
    found = Counter[str]()
    for one in fast.report().captures:
        for record in one.passes:
            found[record.name] += len(record.applied)
            assert not record.error or record.error.startswith(UNFIT), f"{record.name}: {record.error}"
    found["pieces"] += in_pieces(fast)
    return found


def fuzzed(seeds: Iterable[int], *sizes: int) -> Counter[str]:
    """In how many models of these seeds each pass has sites. Every other one is rewritten without proofs.

    sizes    the fewest and the most families of statements of a model, as `written` has them
    """
    total = Counter[str]()
    for seed in seeds:
        found = fuzz(written(seed, *sizes), proofs=seed % 2 == 0)
        total.update(name for name, sites in found.items() if sites)
    return total
