"""What the processes of a pipeline tell each other beside their tensors, so that none waits for one that failed.

A process that fails says so in the store that all share, then closes its connections: the others, which wait
for its tensors, end with an error of their own, look into the store, and raise what stands there. While a
step runs each process says every second that it is there. One that says nothing for some seconds while
another's connections break is gone; one whose own stage takes longer than the time-out hangs, says so, and
is interrupted, or ended where nothing interrupts it.
"""  # noqa: E501

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from fxaccel.errors import FxaccelError, StageError

PERIOD = 1.0  # seconds between two signs of life
GRACE = 5.0  # seconds without one after which a process is gone
PATIENCE = 15.0  # seconds that a stage has to end in after an interrupt
LOOK = 0.0005  # seconds between two looks into the store
AWAY = b"between two steps"
GONE = 70  # exit status of a process whose stage hangs


class Overdue(BaseException):
    """Raised in the thread of a stage that hangs."""


class Watch:
    """The part of one process.

    store      of all processes of the pipeline, for it alone
    stages     rank -> the numbers of its stages
    timeout    seconds that a step may take
    doing      the stage that this process computes, and what of it; None where it waits
    """

    def __init__(self, store: Store, rank: int, stages: list[list[int]], timeout: float) -> None:
        self.store, self.rank, self.stages, self.timeout = store, rank, stages, timeout
        self.doing: tuple[int, str] | None = None
        self.overdue = False
        self.failed: str | None = None

    @contextmanager
    def computing(self, stage: int, what: str) -> Iterator[None]:
        """Inside, this process computes; where it raises, it is the stage that has failed."""
        self.doing = stage, what
        yield  # not in a finally: what has failed is looked up afterwards
        self.doing = None

    @contextmanager
    def step(self, close: Callable[[], None]) -> Iterator[None]:
        """One step of the pipeline; `close` ends the connections. Raises StageError where any stage fails."""
        if self.failed is not None:
            raise StageError(f"the pipeline has ended: {self.failed}", "make it anew from a checkpoint")
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(ended, threading.get_ident()), daemon=True)
        beat.start()
        try:
            yield
            self.tell(f"alive {self.rank}", AWAY.decode())
        except BaseException as error:
            user = isinstance(error, KeyboardInterrupt) and not self.overdue
            self.failed = self._reason(error)
            close()
            if user:
                raise
            raise StageError(self.failed) from (None if self.overdue else error)
        finally:
            ended.set()
            beat.join()

    # -- messages ---------------------------------------------------------------------------------

    def tell(self, key: str, text: str) -> None:
        """Say something to all."""
        self.store.set(key, text)

    def ask(self, key: str) -> str:
        """What has been said, or will be within the time-out; raises TimeoutError."""
        start = time.monotonic()
        while not self.store.check([key]):
            if self.store.check(["failed"]) or time.monotonic() - start > self.timeout:
                raise TimeoutError(f"nobody says {key}")
            time.sleep(LOOK)
        return self.store.get(key).decode()

    # -- failures ---------------------------------------------------------------------------------

    def _name(self, stage: int) -> str:
        return f"stage {stage} (rank {self.rank})"

    def _reason(self, error: BaseException) -> str:
        """Why the step has failed, as the first that knew said it."""
        own = None
        if self.doing is not None and self.overdue:
            own = self._hangs(*self.doing)
        elif self.doing is not None:
            cause = error.__cause__ or error
            own = f"{self._name(self.doing[0])} raised {type(cause).__name__} in {self.doing[1]}: {cause}"
        elif not _is_broken_connection(error):
            said = error.message if isinstance(error, FxaccelError) else f"{type(error).__name__} {error}"
            own = f"{self._name(self.stages[self.rank][0])}: {said}"
        try:
            return self._first(own) if own is not None else self._others(error)
        except Exception as lost:  # the store itself, which one of the processes holds
            return own or f"the process that holds the store of the pipeline is gone: {lost}"

    def _first(self, own: str) -> str:
        return self.store.compare_set("failed", "", own).decode()

    def _others(self, error: BaseException) -> str:
        """What another process has said, or which of them says nothing any more."""
        before, start = self._signs(), time.monotonic()
        while time.monotonic() - start < GRACE:
            if self.store.check(["failed"]):
                return self.store.get("failed").decode()
            self.tell(f"left {self.rank}", "")
            time.sleep(PERIOD / 10)
        now, others = self._signs(), [r for r in range(len(self.stages)) if r != self.rank]
        missing = [r for r in others if not self.store.check([f"left {r}"]) and now[r] == before[r]]
        within = [r for r in missing if now[r] != AWAY] or missing or others
        names = ", ".join(f"stage {' and '.join(map(str, self.stages[r]))} (rank {r})" for r in within)
        return self._first(f"{names} does not answer any more: {error}")

    def _signs(self) -> list[bytes]:
        keys = [f"alive {r}" for r in range(len(self.stages))]
        return [self.store.get(k) if self.store.check([k]) else b"" for k in keys]

    # -- beside the step --------------------------------------------------------------------------

    def _beat(self, ended: threading.Event, thread: int) -> None:
        """Say that this process is there; interrupt its stage when the step takes too long."""
        start, count = time.monotonic(), 0
        while not ended.wait(PERIOD):
            count += 1
            try:
                self.tell(f"alive {self.rank}", f"{start} {count}")
            except RuntimeError:
                return  # the store is gone, and with it who held it: the step ends by that
            if time.monotonic() - start > self.timeout and self.doing is not None:
                self._interrupt(ended, thread, self._hangs(*self.doing))
                return

    def _hangs(self, stage: int, what: str) -> str:
        return f"{self._name(stage)} has not ended {what} within {self.timeout:g} s"

    def _interrupt(self, ended: threading.Event, thread: int, why: str) -> None:
        self.overdue = True
        self._first(why)
        main = threading.main_thread().ident == thread
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.pthread_kill(thread, signal.SIGINT)  # ends a sleep or a wait as well
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Overdue))
        if not ended.wait(PATIENCE):
            sys.stderr.write(f"fxaccel: {why}; its process is ended\n")
            sys.stderr.flush()
            os._exit(GONE)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether another process is to blame: what `Watch.ask` raises, and torch where a peer is gone."""
    if isinstance(error, (TimeoutError, DistError)):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
