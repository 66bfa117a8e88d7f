"""What autograd keeps of one forward run and what is computed again: the part of a schedule that runs.

The code of a scheduled program tells a `Run` where it is: `at` before each call, `drop` after a call whose
result is not to be kept, `again` before a call whose backward has something computed first. All that
autograd saves passes through `pack`, which keeps the tensor, or a note of which result it was: a storage
tells them apart, so views need no bookkeeping. In backward `unpack` returns it, and runs the function that
computes it again where it is not there.

What is kept for such a function hangs on the notes of its step: it lives as long as autograd holds them, as
every saved tensor does, and with `retain_graph=True` a second backward finds it there. What was computed
again is let go by the timetable, when backward has come past its last reader.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from fxaccel.memory import key

Function = Callable[..., None]
"""(run, *given): computes values again and puts them into `run.slots`."""


class Timetable(NamedTuple):
    """When values that are computed again come and go; steps are counted along the forward graph.

    fills    slot -> the steps before whose backward it is computed, the latest first
    frees    (step, slot): once backward is before `step`, the slot is empty; in the order of backward
    """

    fills: Mapping[int, Sequence[int]]
    frees: Sequence[tuple[int, int]]


class Step:
    """A call of the graph, with what its backward computes first."""

    __slots__ = ("__weakref__", "function", "given", "index")

    def __init__(self, index: int, function: Function | None = None, given: tuple[Any, ...] = ()) -> None:
        self.index, self.function, self.given = index, function, given


class Saved:
    """One tensor that autograd saves: itself, or the slot that will hold its storage, and how it lies there.

    part    of a slot that holds what a call saved besides its arguments and results: which of them
    """

    __slots__ = ("layout", "part", "slot", "step", "tensor", "version")

    def __init__(self, step: Step, tensor: Tensor) -> None:
        self.step, self.tensor, self.version = step, tensor, tensor._version
        self.slot, self.part = -1, 0
        self.layout: Any = None

    def let_go(self, slot: int, part: int = 0) -> None:
        """Keep a note in the place of the tensor."""
        t = self.tensor
        self.slot, self.part = slot, part
        self.layout = (t.dtype, t.size(), t.stride(), t.storage_offset())
        del self.tensor


class Run:
    """One forward run of a scheduled program, entered while it computes; backward comes back to it."""

    def __init__(self, table: Timetable) -> None:
        self.table = table
        self.slots: dict[int, Any] = {}
        self.place, self.freed = -1, 0  # where backward is, and how many of table.frees have been done
        self.steps: dict[int, weakref.ref[Step]] = {}
        self.step = Step(-1)
        self.fresh: list[Saved] = []  # of the present step, not told yet from its arguments and results
        self.known: dict[int, int] = {}  # storages of dropped values
        self.watched: list[StorageWeakRef] = []  # so that no new storage takes the place of one of them
        self.learning: dict[int, list[bool]] = {}
        self.autocast = ambient()
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.hooks.__exit__(*exc)
        self.fresh, self.watched, self.known = [], [], {}
        del self.hooks, self.step

    # -- forward ----------------------------------------------------------------------------------

    def at(self, index: int, function: Function | None = None, *given: Any) -> None:
        """The call that comes next, and what is computed before its backward."""
        self.step = Step(index, function, given)
        self.fresh.clear()
        if function is not None:
            self.steps[index] = weakref.ref(self.step)

    def drop(self, slot: int, value: Tensor) -> None:
        """Keep nothing of this result of the present call; `slot` will hold it when it is made again."""
        storage = value.untyped_storage()
        self.known[storage._cdata] = slot
        self.watched.append(StorageWeakRef(storage))
        for saved in self.fresh:
            if saved.slot < 0 and key(saved.tensor) == storage._cdata:
                saved.let_go(slot)

    def note(self, *given: Any) -> None:
        """Remember which arguments of the present call learn: `rerun` makes it again as it was made."""
        self.learning[self.step.index] = [isinstance(t, Tensor) and t.requires_grad for t in given]

    def hide(self, slot: int, given: tuple[Any, ...], made: Any) -> None:
        """Keep nothing that the present call saved besides its arguments and results."""
        for part, saved in enumerate(beside(self.fresh, given, made)):
            saved.let_go(slot, part)

    def pack(self, tensor: Tensor) -> Saved:
        """What autograd keeps in the place of a tensor."""
        saved = Saved(self.step, tensor)
        slot = self.known.get(key(tensor))
        if slot is None:
            self.fresh.append(saved)
        else:
            saved.let_go(slot)
        return saved

    # -- backward ---------------------------------------------------------------------------------

    def unpack(self, saved: Saved) -> Tensor:
        """The tensor that `pack` was given, or one that is equal to it."""
        self.arrive(saved.step.index)
        if saved.slot < 0:
            if saved.tensor._version != saved.version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace "
                    f"operation: {saved.tensor.dtype} {list(saved.tensor.shape)} is at version "
                    f"{saved.tensor._version}; expected version {saved.version}"
                )
            return saved.tensor
        made = self.need(saved.slot, saved.step)
        made = made[saved.part] if isinstance(made, list) else made
        dtype, size, stride, offset = saved.layout
        if made.dtype is dtype and (made.size(), made.stride(), made.storage_offset()) == saved.layout[1:]:
            return made
        whole = made if made.dtype is dtype else made.view(dtype)
        return whole.as_strided(size, stride, offset)

    def arrive(self, index: int) -> None:
        """Backward has come to a step: what only later steps read is let go."""
        if index > self.place:  # another backward begins
            self.freed = 0
        self.place, frees = index, self.table.frees
        while self.freed < len(frees) and frees[self.freed][0] > index:
            self.slots.pop(frees[self.freed][1], None)
            self.freed += 1

    def need(self, slot: int, step: Step | int) -> Any:
        """What a slot holds, computed now if it is empty: by this step or a later one that has not run."""
        made = self.slots.get(slot)
        if made is None:
            index = step if isinstance(step, int) else step.index
            steps = [i for i in self.table.fills[slot] if i >= index]
            found = self.steps[steps[-1]]()
            if found is None or found.function is None:
                raise RuntimeError(
                    "trying to backward through the graph a second time: what its values are computed from "
                    "was freed; specify retain_graph=True the first time"
                )
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                for one in self.autocast:
                    stack.enter_context(torch.autocast(**one))
                found.function(self, *found.given)
            made = self.slots[slot]
        return made

    def rerun(
        self, index: int, slot: int | None, read: Sequence[int] | None, call: Callable[..., Any], *given: Any
    ) -> Any:
        """The result of a call made as in forward, where a kernel may go another way with gradients.

        What autograd saves of it besides its arguments and results (those that are read, of several) goes
        into the slot, if there is one.
        """
        saved: list[Tensor] = []
        flags = self.learning[index]
        leaves = [
            t.detach().requires_grad_(learns) if isinstance(t, Tensor) else t
            for t, learns in zip(given, flags, strict=True)
        ]

        def pack(tensor: Tensor) -> None:
            saved.append(tensor.data)  # which knows nothing of the graph, as `detach` does

        with torch.enable_grad(), saved_tensors_hooks(pack, _never):
            made = call(*leaves)
        if slot is not None:
            self.slots[slot] = beside(saved, leaves, made if read is None else [made[i] for i in read])
        return pytree.tree_map_only(Tensor, lambda t: t.data, made)


def _never(saved: Any) -> Tensor:
    raise RuntimeError("there is no backward through what is computed again")


def beside(saved: Sequence[Any], given: Any, made: Any) -> list[Any]:
    """Those of the tensors, or `Saved`, that share their storage with no argument or result of the call."""
    shown = {key(t) for t in pytree.tree_leaves((given, made)) if isinstance(t, Tensor)}
    kept = [s for s in saved if isinstance(s, Tensor) or s.slot < 0]
    return [s for s in kept if key(s if isinstance(s, Tensor) else s.tensor) not in shown]


def ambient() -> list[dict[str, Any]]:
    """The autocast that is on around a call, as arguments of torch.autocast; off counts too."""
    return [
        {
            "device_type": device, "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device), "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for device in ("cpu", *["cuda"] * torch.cuda.is_available())
    ]  # fmt: skip


@contextmanager
def redrawn(device: torch.device, state: Tensor) -> Iterator[None]:
    """Random numbers of a device from a state on, inside; outside they go on as before."""
    before = random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, before)


def random_state(device: torch.device) -> Tensor:
    """The state of a device's random numbers."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set it."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
