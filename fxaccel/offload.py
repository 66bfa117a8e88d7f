"""Storages that lie in the host's memory while their device needs its own for something else.

    host = mover.leave(tensor, step)   forward: the copy out begins
    mover.left(step)                   some calls on: the device's memory of it may be used again
    host.begin()                       backward: the copy back begins
    host.storage()                     it is there for what reads it now
    host.free()                        the device's memory is given back; the host's copy stays

On a GPU copies run on a stream of their own, beside what computes, from and to pinned memory. Streams wait
for each other by events, and the processor for none of them. Memory is given back when the stream that it
was allocated on has waited for the copy: `Tensor.record_stream` would be shorter, but gives it back when the
processor finds that the copy is done, which with the processor far ahead of the GPU is too late for the
calls that were to have it. Other devices copy at once.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 16  # nodes of forward, about a block's, that a copy out may take before what computes waits for it


class Layout(NamedTuple):
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    conj: bool
    neg: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        t = tensor
        return cls(t.dtype, int(t.storage_offset()), t.size(), t.stride(), t.is_conj(), t.is_neg())

    def over(self, storage: Tensor) -> Tensor:
        """The tensor of this layout in the storage that another one has."""
        made = torch.empty(0, dtype=self.dtype, device=storage.device)
        made = made.set_(storage.untyped_storage(), self.offset, self.size, self.stride)
        made = made.conj() if self.conj else made
        return torch._neg_view(made) if self.neg else made


class Host:
    """The bytes of one tensor's storage, copied at once."""

    copy: Tensor

    def __init__(self, tensor: Tensor) -> None:
        self.device, self.version = tensor.device, tensor._version
        self.back: Tensor | None = None
        whole = torch.empty(0, dtype=torch.uint8, device=self.device)
        self.leave(whole.set_(tensor.untyped_storage()))

    def leave(self, whole: Tensor) -> None:
        """Begin the copy of all bytes."""
        self.copy = whole.to("cpu", copy=True)

    def left(self) -> None:
        """Let the memory go that was copied from."""

    def begin(self) -> None:
        """Begin the copy back, unless there is one."""
        if self.back is None:
            self.back = self.copy.to(self.device, copy=True)

    def storage(self) -> Tensor:
        """All bytes on the device, for what runs there now."""
        self.begin()
        assert self.back is not None, "it has begun"
        return self.back

    def free(self) -> None:
        """Let the copy on the device go."""
        self.back = None


class Pinned(Host):
    """The same beside what a GPU computes. Torch rounds pinned memory up to a power of two, and keeps it.

    side       the stream that copies
    stream     the one that computed the tensor
    home       the one whose memory the copy back has, and which reads it
    out, in_   events: the copies are done
    """

    def __init__(self, tensor: Tensor, side: torch.cuda.Stream) -> None:
        self.side = side
        self.leaving: Tensor | None = None
        super().__init__(tensor)

    def leave(self, whole: Tensor) -> None:
        self.stream = torch.cuda.current_stream(self.device)
        self.copy = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=True)
        self.side.wait_stream(self.stream)  # which is to make what is copied
        with torch.cuda.stream(self.side):
            self.copy.copy_(whole, non_blocking=True)
            self.out = self.side.record_event()
        self.leaving = whole

    def left(self) -> None:
        if self.leaving is not None:
            self.stream.wait_event(self.out)
            self.leaving = None

    def begin(self) -> None:
        if self.back is None:
            self.home = torch.cuda.current_stream(self.device)
            back = torch.empty(self.copy.shape, dtype=torch.uint8, device=self.device)
            self.side.wait_stream(self.home)  # which may still read what the memory held before
            with torch.cuda.stream(self.side):
                back.copy_(self.copy, non_blocking=True)
                self.in_ = self.side.record_event()
            self.back = back

    def storage(self) -> Tensor:
        back = super().storage()
        now = torch.cuda.current_stream(self.device)
        now.wait_event(self.in_)
        if now != self.home:
            back.record_stream(now)
        return back

    def free(self) -> None:
        if self.back is not None:
            self.home.wait_event(self.in_)  # nobody may have read it
            self.back = None

    def __del__(self) -> None:
        self.left()
        self.free()


class Mover:
    """Moves the storages of one run, with one stream a device.

    under_way    copies out that nothing has waited for, with the step that each began at
    """

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.under_way: deque[tuple[int, Host]] = deque()

    def leave(self, tensor: Tensor, step: int) -> Host:
        """A tensor's storage, from now on its way to the host."""
        host = self.host(tensor)
        self.under_way.append((step, host))
        return host

    def left(self, step: int | None = None) -> None:
        """Wait for the copies that began long before a step of forward, or for all."""
        while self.under_way and (step is None or self.under_way[0][0] + STEPS <= step):
            self.under_way.popleft()[1].left()

    def host(self, tensor: Tensor) -> Host:
        """The kind of copy that the tensor's device takes."""
        device = tensor.device
        if device.type != "cuda":
            return Host(tensor)
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)
        return Pinned(tensor, self.streams[device])
