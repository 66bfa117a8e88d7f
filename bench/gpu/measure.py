"""Times candidates on a GPU side by side and appends the result to a CSV file with all that produced it."""

import csv
import datetime
import gc
import pathlib
import statistics
import subprocess

import torch

RESULTS = pathlib.Path(__file__).parent.parent / "results" / "gpu.csv"
COLUMNS = ("bench", "case", "candidate", "us", "p10", "p90", "rate", "unit")
COLUMNS += ("gpu", "torch", "triton", "commit", "date")
WARM, ROUNDS = 10, 50
L2_BYTES = 256 * 2**20  # well over any L2 cache: written between rounds, so that inputs come from memory


def medians(candidates):
    """Median and spread (10th to 90th centile) in us of each callable, called in turns, caches flushed."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times = {name: [] for name in candidates}
    for turn in range(WARM + ROUNDS):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
            if turn >= WARM:
                times[name].append(start.elapsed_time(end) * 1e3)
    cuts = {name: statistics.quantiles(t, n=10) for name, t in times.items()}
    return {name: (statistics.median(t), cuts[name][0], cuts[name][-1]) for name, t in times.items()}


def backward(f, leaves):
    """The backward pass alone, to be called again and again."""
    out = f(*leaves)
    out = out if isinstance(out, (tuple, list)) else (out,)
    seeds = [torch.randn_like(o) for o in out]
    return lambda: torch.autograd.grad(out, leaves, seeds, retain_graph=True)


def peak(step):
    """The most bytes that a second step allocates beside what was there; -1 where it does not fit."""
    try:
        step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    except torch.OutOfMemoryError:
        return -1


def commit():
    """The commit that was measured, or nothing outside a checkout."""
    here = pathlib.Path(__file__).parent
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return told.stdout.strip()


def report(bench, case, candidates, rate, unit):
    """Print a line for each candidate and append it; `rate` over the time in us gives `unit`."""
    import triton

    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(COLUMNS)
        for name, (median, low, high) in medians(candidates).items():
            speed = rate / median
            print(f"{bench:20} {case:44} {name:10} {median:10.1f} us  {speed:8.2f} {unit}", flush=True)
            machine = (torch.cuda.get_device_name(), torch.__version__, triton.__version__)
            row = (f"{median:.2f}", f"{low:.2f}", f"{high:.2f}", f"{speed:.3f}", unit)
            out.writerow((bench, case, name, *row, *machine, commit(), datetime.date.today()))
