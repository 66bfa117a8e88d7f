"""What autograd keeps of one forward run and what is computed again: the part of a schedule that runs.

The code of a scheduled program tells a `Run` where it is: `at` before each call, with the function that is to
run before its backward, `drop` and `hide` after a call of which something is not to be kept. All that
autograd saves passes through `pack`, which keeps the tensor, or a note of which result it was: a storage
tells them apart, so views need no bookkeeping. In backward `unpack` returns it, and runs the function that
computes it again where it is not there.

A value that is computed again has a slot, which all who may read it hold: notes that autograd holds, as it
holds saved tensors, and recipes of other values. The slot knows the recipe of its value, and that what it is
computed from. So all of it lives until the last reader is gone, whichever results backward begins at, and
with `retain_graph=True` a second backward finds it there. The value itself is let go earlier, by the
timetable, when backward has come past its last reader, and can be computed once more.

A value that is moved to the host (`move`) has a slot with a copy there. The copy is made when autograd first
saves the value, and stays as long as the slot; on the device there is one only for a part of backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from fxaccel.memory import key
from fxaccel.offload import Host, Layout, Mover
from fxaccel.provenance import locate

Function = Callable[..., None]
"""(run, *given): computes values again and fills slots with them."""


class Timetable(NamedTuple):
    """When values that are not kept come and go; steps are counted along the forward graph.

    fills      step -> the slots that are filled before its backward
    takes      step -> the slots that are read to fill them
    frees      (step, slot): once backward is before `step`, the slot is empty; in the order of backward
    fetches    (step, until, slot): once backward is at `step` or before, but not before `until`, the value
               is on its way back from the host; in the order of backward
    """

    fills: Mapping[int, Sequence[int]]
    takes: Mapping[int, Sequence[int]]
    frees: Sequence[tuple[int, int]]
    fetches: Sequence[tuple[int, int, int]] = ()


class Slot:
    """Holds a value that is computed again, or what computes it; whoever may read it holds the slot."""

    __slots__ = ("__weakref__", "recipes", "value")

    def __init__(self) -> None:
        self.value: Any = None
        self.recipes: list[Recipe] = []

    def free(self) -> None:
        """Let the value go."""
        self.value = None


class Away(Slot):
    """The slot of a value that is moved to the host; `host` is None until somebody is to read it."""

    __slots__ = ("host", "layout", "mover")

    def __init__(self, tensor: Tensor, mover: Mover) -> None:
        super().__init__()
        self.layout, self.mover = Layout.of(tensor), mover
        self.host: Host | None = None

    def leave(self, tensor: Tensor, step: int) -> None:
        """Begin the copy to the host, if the one there is not of what the storage holds now."""
        if self.host is None or self.host.version != tensor._version:
            self.host = self.mover.leave(tensor, step)

    def over(self, layout: Layout) -> Tensor:
        """What lies so in its storage, on the device."""
        assert self.host is not None, "who reads it had it copied"
        return layout.over(self.host.storage())

    def free(self) -> None:
        if self.host is not None:
            self.host.free()


class Recipe:
    """What is computed before the backward of a call.

    needs    slots that it reads;  fills: those that it fills, as long as someone may read them
    """

    __slots__ = ("fills", "function", "given", "index", "needs", "versions")

    def __init__(self, index: int, function: Function, given: tuple[Any, ...], needs: list[Slot],
                 fills: list[weakref.ref[Slot]]) -> None:  # fmt: skip
        self.index, self.function, self.needs, self.fills = index, function, needs, fills
        # without their graph, which leads to who holds this
        self.given = tuple(t.detach() if isinstance(t, Tensor) else t for t in given)
        self.versions = [_version(t) for t in given]

    def forget(self) -> None:
        """All that it fills is there."""
        for ref in self.fills:
            slot = ref()
            if slot is not None:
                slot.recipes.remove(self)


class Step:
    """A call of the graph, with what its backward computes first; lives as long as autograd holds it.

    ends    the slots that are empty once it is done
    """

    __slots__ = ("ends", "index", "recipe")

    def __init__(self, index: int, recipe: Recipe | None = None, ends: Iterable[Slot] = ()) -> None:
        self.index, self.recipe, self.ends = index, recipe, [weakref.ref(slot) for slot in ends]

    def __del__(self) -> None:
        one = self.recipe
        if one is not None and all((s := ref()) is None or s.value is not None for ref in one.fills):
            one.forget()
        for end in self.ends:  # at once: the next call may save nothing, and tell nobody that it is reached
            slot = end()
            if slot is not None and slot.recipes:  # else who still holds it has nothing to make it by
                slot.free()


class Saved:
    """One tensor that autograd saves: itself, or the slot that will hold its storage, and how it lies there.

    part    of a slot that holds what a call saved besides its arguments and results: which of them
    """

    __slots__ = ("layout", "part", "slot", "step", "tensor", "version")
    slot: Slot | None

    def __init__(self, step: Step, tensor: Tensor) -> None:
        # detached: what autograd saves of a call's own result leads to the call, which leads here
        self.step, self.tensor, self.version = step, tensor.detach(), tensor._version
        self.slot, self.part = None, 0
        self.layout: Any = None

    def let_go(self, slot: Slot, part: int = 0) -> None:
        """Keep a note in the place of the tensor."""
        self.slot, self.part, self.layout = slot, part, Layout.of(self.tensor)
        if isinstance(slot, Away):
            slot.leave(self.tensor, self.step.index)
            self.tensor.data = self.tensor.new_empty(0)  # it still says how often its storage is written to
        else:
            del self.tensor

    def check(self) -> None:
        """Raise where the tensor has been written to since it was saved."""
        if self.tensor._version != self.version:
            layout = self.layout or Layout.of(self.tensor)
            raise RuntimeError(_written(layout.dtype, layout.size, self.tensor._version, self.version))


class Run:
    """One forward run of a scheduled program, entered while it computes; backward comes back to it."""

    def __init__(self, table: Timetable) -> None:
        self.table = table
        self.slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()
        self.place = -1  # where backward is
        self.freed = self.fetched = 0  # how many of table.frees and table.fetches have been done
        self.ends: dict[int, list[int]] = {}
        for index, number in table.frees:
            self.ends.setdefault(index, []).append(number)
        self.step = Step(-1)
        self.opened: list[Slot] = []
        self.fresh: list[Saved] = []  # of the present step, not told yet from its arguments and results
        self.known: dict[int, Slot] = {}  # storages of values that are not kept
        self.mover, self.saves = Mover(), True
        self.watched: list[StorageWeakRef] = []  # so that no new storage takes the place of one of them
        self.learning: dict[int, list[bool]] = {}
        self.autocast = ambient()
        self.hooks = saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> None:
        self.saves = torch.is_grad_enabled()
        self.hooks.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.hooks.__exit__(*exc)
        self.fresh, self.watched, self.known, self.opened = [], [], {}, []
        self.mover.left()
        del self.hooks, self.step

    # -- forward ----------------------------------------------------------------------------------

    def at(self, index: int, function: Function | None = None, *given: Any) -> None:
        """The call that comes next, and what is computed before its backward."""
        recipe = None
        if function is not None:
            needs = [self.slot(n) for n in self.table.takes[index]]
            slots = [self.slot(n) for n in self.table.fills[index]]
            recipe = Recipe(index, function, given, needs, [weakref.ref(s) for s in slots])
            for slot in slots:
                slot.recipes.append(recipe)
            self.opened = slots  # until the call has saved what it reads of them
        ends = [self.slots.get(number) for number in self.ends.get(index, ())]
        self.step = Step(index, recipe, [slot for slot in ends if slot is not None])
        self.fresh.clear()
        self.mover.left(index)

    def slot(self, number: int) -> Slot:
        """The slot of this number."""
        slot = self.slots.get(number)
        if slot is None:
            slot = self.slots[number] = Slot()
        return slot

    def fill(self, number: int, value: Any) -> None:
        """Keep what has been computed again, where someone may read it."""
        slot = self.slots.get(number)
        if slot is not None:
            slot.value = value

    def drop(self, number: int, value: Tensor) -> None:
        """Keep nothing of this result of the present call; a slot will hold it when it is made again."""
        self.replace(value, self.slot(number))

    def move(self, number: int, value: Tensor) -> None:
        """Keep this result of the present call in the host's memory."""
        slot = self.slots[number] = Away(value, self.mover)
        if self.saves and any(number in taken for taken in self.table.takes.values()):
            slot.leave(value, self.step.index)  # what is computed again reads it, whatever autograd saves
        self.replace(value, slot)

    def replace(self, value: Tensor, slot: Slot) -> None:
        """Whatever autograd saves of the storage is a note of the slot."""
        storage = value.untyped_storage()
        self.known[storage._cdata] = slot
        self.watched.append(StorageWeakRef(storage))
        for saved in self.fresh:
            if saved.slot is None and key(saved.tensor) == storage._cdata:
                saved.let_go(slot)

    def note(self, *given: Any) -> None:
        """Remember which arguments of the present call learn: `rerun` makes it again as it was made."""
        self.learning[self.step.index] = [isinstance(t, Tensor) and t.requires_grad for t in given]

    def hide(self, number: int, given: tuple[Any, ...], made: Any) -> None:
        """Keep nothing that the present call saved besides its arguments and results."""
        slot = self.slot(number)
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
        if saved.slot is None:
            saved.check()
            return saved.tensor
        if isinstance(saved.slot, Away):
            saved.check()
            return saved.slot.over(saved.layout)
        made = self.find(saved.slot, saved.step.index)
        made = made[saved.part] if isinstance(made, list) else made
        return made if Layout.of(made) == saved.layout else saved.layout.over(made)

    def arrive(self, index: int) -> None:
        """Backward has come to a step: what only later steps read is let go, what is read soon comes back."""
        if index > self.place:  # another backward begins
            self.freed = self.fetched = 0
        self.place, frees, fetches = index, self.table.frees, self.table.fetches
        while self.freed < len(frees) and frees[self.freed][0] > index:
            slot = self.slots.get(frees[self.freed][1])
            if slot is not None:
                slot.free()
            self.freed += 1
        while self.fetched < len(fetches) and fetches[self.fetched][0] >= index:
            _, until, number = fetches[self.fetched]
            slot = self.slots.get(number)
            if isinstance(slot, Away) and slot.host is not None and until <= index:
                slot.host.begin()
            self.fetched += 1

    def need(self, number: int, index: int) -> Any:
        """What a slot of this number holds, computed now if it is empty, before the backward of a step."""
        return self.find(self.slots[number], index)

    def find(self, slot: Slot, index: int) -> Any:
        """What a slot holds, computed now if it is empty, by what comes first before a step."""
        if isinstance(slot, Away):
            return slot.over(slot.layout)
        if slot.value is None:
            one = min((r for r in slot.recipes if r.index >= index), key=lambda r: r.index, default=None)
            if one is None:
                raise RuntimeError(
                    "trying to backward through the graph a second time: what its values are computed from "
                    "was freed; specify retain_graph=True the first time"
                )
            for given, version in zip(one.given, one.versions, strict=True):
                if _version(given) != version:
                    raise RuntimeError(_written(given.dtype, given.shape, given._version, version))
            with ExitStack() as stack:
                stack.enter_context(torch.no_grad())
                for mode in self.autocast:
                    stack.enter_context(torch.autocast(**mode))
                try:
                    one.function(self, *one.given)
                except Exception as error:
                    locate(error)
                    raise
        return slot.value

    def rerun(
        self, index: int, slot: int | None, read: Sequence[int] | None,
        call: Callable[..., Any], given: tuple[Any, ...], *common: Any,
    ) -> Any:  # fmt: skip
        """The result of a call made as in forward, where a kernel may go another way with gradients.

        What autograd saves of it besides its arguments and results (those that are read, of several) goes
        into the slot, if there is one. What it has in common with other calls may be of what is saved: it is
        no argument of the call in the graph.
        """
        saved: list[Tensor] = []
        flags = self.learning[index]
        leaves = [
            t.detach().requires_grad_(learns) if isinstance(t, Tensor) else t
            for t, learns in zip((*given, *common), flags, strict=True)
        ]

        def pack(tensor: Tensor) -> None:
            saved.append(tensor.data)  # which knows nothing of the graph, as `detach` does

        with torch.enable_grad(), saved_tensors_hooks(pack, _never):
            made = call(*leaves)
        if slot is not None:
            results = made if read is None else [made[i] for i in read]
            self.fill(slot, beside(saved, leaves[: len(given)], results))
        return pytree.tree_map_only(Tensor, lambda t: t.data, made)


def _version(given: Any) -> int:
    """How often a tensor has been written to."""
    return given._version if isinstance(given, Tensor) and not given.is_inference() else 0


def _written(dtype: torch.dtype, size: Sequence[int], version: int, expected: int) -> str:
    return (
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"{dtype} {list(size)} is at version {version}; expected version {expected}"
    )


def _never(saved: Any) -> Tensor:
    raise RuntimeError("there is no backward through what is computed again")


def beside(saved: Sequence[Any], given: Any, made: Any) -> list[Any]:
    """Those of the tensors, or `Saved`, that share their storage with no argument or result of the call."""
    shown = {key(t) for t in pytree.tree_leaves((given, made)) if isinstance(t, Tensor)}
    kept = [s for s in saved if isinstance(s, Tensor) or s.slot is None]
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
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def random_state(device: torch.device) -> Tensor:
    """The state of a device's random numbers."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
