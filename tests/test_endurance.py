"""Many captures and calls leave nothing behind; threads, several models, fork, spawn, Ctrl-C."""

import copy
import gc
import linecache
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxaccel
from tests.helpers import captures

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x, gain=1.0):
        return self.down(self.norm(nn.functional.gelu(self.up(x)))) * gain


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# -- what a process holds ----------------------------------------------------------------------------


def operators():
    return len(torch._C._dispatch_get_all_op_names())


def collect():
    """What tensors hold in C++ is let go by one collection, and found to be garbage by the next."""
    for _ in range(3):
        gc.collect()


def held():
    """Counts of what a process holds, but for memory."""
    collect()
    kinds = [type(o) for o in gc.get_objects()]
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "operators": operators(),
        "sources": len(linecache.cache),
        "environments of sizes": sum(k is ShapeEnv for k in kinds),
        "modules": len(sys.modules),
        "tensors": sum(issubclass(k, torch.Tensor) for k in kinds),
        "graphs": sum(issubclass(k, torch.fx.Graph) for k in kinds),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
        "filters": len(warnings.filters),
    }


def resident():
    collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def nothing_grows(step, warm, times, bytes_each):
    """After so many steps to warm up, as many as `times` add nothing but at most `bytes_each` of memory."""
    gc.collect()
    gc.freeze()  # what other tests have left is neither looked through nor counted
    try:
        for i in range(warm):
            step(i)
        before, memory = held(), resident()
        for i in range(warm, warm + times):
            step(i)
        after, more = held(), resident() - memory
    finally:
        gc.unfreeze()
    grown = {k: (before[k], after[k]) for k in before if after[k] > before[k] and k != "temporary files"}
    assert not grown
    assert more <= 8 * 2**20 + times * bytes_each, f"{more / 2**20:.3g} MiB"


SIZES = [pytest.param(False, id="some"), pytest.param(True, id="many", marks=pytest.mark.slow)]


@linux
@pytest.mark.parametrize("many", SIZES)
def test_captures_that_are_dropped_leave_nothing(many):
    """Of one module, whose captures are dropped for others."""
    model, x = Net(), torch.randn(4, 8)
    fast = fxaccel.accelerate(model, max_captures=2)

    def step(i):
        close(fast(x, gain=1.0 + i), model(x, gain=1.0 + i))

    nothing_grows(step, 100 if many else 3, 1000 if many else 8, 2**12)
    assert captures(fast) == 2


@linux
@pytest.mark.parametrize("many", SIZES)
def test_models_that_are_dropped_leave_nothing(many):
    model, x = Net(), torch.randn(4, 8)

    def step(i):
        close(fxaccel.accelerate(model)(x), model(x))

    nothing_grows(step, 100 if many else 3, 1000 if many else 8, 2**12)


@linux
@pytest.mark.parametrize("many", SIZES)
def test_calls_leave_nothing(many):
    """Of all sizes, with gradients and without; what a kernel learns of a size is bounded."""
    fast = fxaccel.accelerate(Net(), ["fuse-norm", "pack-weights"] if many else None)

    def step(i):
        with torch.set_grad_enabled(bool(i % 2)):
            y = fast(torch.randn(2 + i % 50, 8))
        if i % 2:
            y.sum().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing_grows(step, 200, 10_000 if many else 500, 0)
    assert captures(fast) == 2


# -- threads and several models ----------------------------------------------------------------------


def test_threads_that_capture_at_once_share_what_they_capture():
    model = Net()
    fast, other = fxaccel.accelerate(model), fxaccel.accelerate(copy.deepcopy(model))
    start = threading.Barrier(4)

    def work(k):
        start.wait()
        for i in range(6):
            x = torch.randn(2 + k + i, 8)
            close((fast if (k + i) % 2 else other)(x, gain=1.0 + i % 2), model(x, gain=1.0 + i % 2))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert captures(fast) == captures(other) == 2


def test_a_thread_calls_while_another_captures():
    model, x = Net(), torch.randn(4, 8)
    fast, done = fxaccel.accelerate(model), threading.Event()
    fast(x)

    def calls():
        while not done.is_set():
            close(fast(x), model(x))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(calls)
        for gain in (2.0, 3.0):
            close(fast(x, gain=gain), model(x, gain=gain))
        done.set()
        running.result()


def test_two_models_share_parameters_or_nothing():
    model, x = Net(), torch.randn(4, 8)
    one, two, apart = (fxaccel.accelerate(m) for m in (model, model, copy.deepcopy(model)))
    want = model(x).detach()
    for fast in (one, two, apart):
        close(fast(x), want)
    with torch.no_grad():
        model.down.weight.zero_()
    close(one(x), model(x))
    close(two(x), model(x))
    close(apart(x), want)
    one.double()
    close(two(x.double()), one(x.double()))  # over the same parameters
    close(apart(x), want)


# -- processes ---------------------------------------------------------------------------------------


def child(fast, x, queue):
    torch.set_num_threads(1)
    queue.put((fast(x).detach().numpy(), fast(x, gain=2.0).detach().numpy(), captures(fast)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_calls_and_captures(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    model, x = Net(), torch.randn(4, 8)
    fast = fxaccel.accelerate(model, example_inputs=(x,))
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=child, args=(fast, x, queue))
    process.start()
    plain, doubled, count = queue.get(timeout=300)
    process.join(60)
    assert process.exitcode == 0
    close(torch.from_numpy(plain), model(x).detach())
    close(torch.from_numpy(doubled), model(x, gain=2.0).detach())
    assert count == 2
    assert captures(fast) == 1


def test_a_pickle_holds_the_model_and_its_settings_and_captures_anew():
    model, x = Net(), torch.randn(4, 8)
    fast = fxaccel.accelerate(model, ["fuse-norm"], example_inputs=(x,))
    again = pickle.loads(pickle.dumps(fast))
    assert captures(again) == 0
    close(again(x), model(x))
    assert [p.name for p in again.report().captures[0].passes] == ["fuse-norm"]


# -- Ctrl-C ------------------------------------------------------------------------------------------


def world(model):
    """What an interrupted capture must leave as it was."""
    modules = {n: sorted(m.__dict__) for n, m in model.named_modules()}
    state = {n: (id(v), v._version, v.clone()) for n, v in model.state_dict(keep_vars=True).items()}
    return {
        "modules": modules, "state": {n: s[:2] for n, s in state.items()},
        "values": {n: s[2].tolist() for n, s in state.items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "stacks": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "threads": torch.get_num_threads(), "environment": dict(os.environ), "filters": len(warnings.filters),
        "levels": [logging.getLogger(n).level for n in ("torch", "torch._dynamo")],
        "own files": sorted(p for p in os.listdir(tempfile.gettempdir()) if "fxaccel" in p),
        "handler": signal.getsignal(signal.SIGINT),
    }  # fmt: skip


def interrupted(seconds, work):
    """Whether `work` was interrupted by the signal of Ctrl-C, sent after so many seconds."""
    timer = threading.Timer(seconds, signal.raise_signal, (signal.SIGINT,))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of tests may ignore it
    timer.start()
    try:
        work()
        timer.cancel()
        timer.join()
        time.sleep(0)  # a signal that came at the end is handled here
    except KeyboardInterrupt:
        timer.join()
        return True
    finally:
        signal.signal(signal.SIGINT, before)
    return False


@pytest.mark.parametrize("many", SIZES)
def test_an_interrupt_leaves_nothing_behind(many):
    model, x = Net(), torch.randn(4, 8)
    fxaccel.accelerate(model)(x)  # imports
    start = time.perf_counter()
    fxaccel.accelerate(model)(x)
    whole, count = time.perf_counter() - start, 100 if many else 12
    found = 0
    for i in range(count):
        fast = fxaccel.accelerate(model)
        before = world(model)
        found += interrupted(whole * (i + 0.5) / count, lambda fast=fast: fast(x))
        after = world(model)
        assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {}
        close(fast(x), model(x))  # the module whose capture was interrupted
        assert captures(fast) == 1
        assert fast.state_dict().keys() == model.state_dict().keys()
    assert found >= count // 3


STAGES = [
    "fxaccel.session.capture", "fxaccel.session.canonicalize", "fxaccel.manager.run", "fxaccel.session.emit",
    "fxaccel.session.compare", "fxaccel.proof.compare", "torch.export.export",
]  # fmt: skip


@pytest.mark.parametrize("stage", [s for s in STAGES if s != "fxaccel.proof.compare"])
@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_in_every_stage(monkeypatch, stage, late):
    model, x = Net(), torch.randn(4, 8)
    home, _, name = stage.rpartition(".")
    real = getattr(sys.modules[home], name)

    def stopped(*args, **kwargs):
        if late:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    fast = fxaccel.accelerate(model, ["fuse-norm", "layer-norm-to-rms-norm{even_if_slower=true,fold=true}"])
    before = world(model)
    with monkeypatch.context() as patch:
        patch.setattr(stage, stopped)
        with pytest.raises(KeyboardInterrupt):
            fast(x)
    assert world(model) == before
    assert list(dict(fast.named_parameters())) == list(dict(model.named_parameters()))
    close(fast(x), model(x))
    assert captures(fast) == 1
