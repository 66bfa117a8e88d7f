"""What every test starts from: one thread, one seed, one roofline, no clock, `tests.zoo` to be imported."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fxaccel import stopwatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
gc.set_threshold(20_000, 20, 20)  # a worker soon holds a million objects: looking through them adds up
settings.register_profile("one seed", derandomize=True, deadline=None)
settings.load_profile("one seed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_clock(request, monkeypatch):
    """What default passes leave alone for its time would differ from run to run, but where that is asked for.

    Both sides of every site are run all the same.
    """
    if request.node.get_closest_marker("clock") is None:
        monkeypatch.setattr(stopwatch, "ENOUGH", ())
        monkeypatch.setattr(stopwatch.Times, "slower", lambda self, at_most: False)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """The user's cache folder is another one while tests run; plans are weighed by one CPU's constants."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        (home / "fxaccel").mkdir()
        (home / "fxaccel" / "roofline.json").write_text(json.dumps(_constants()))
        yield


def _constants():
    """Of a CPU that takes longer for narrow products, as tests have them, than for copies."""
    speed = {"rate": 30e9, "bandwidth": 10e9, "link": 0.0}
    threads, dtypes = (1, 2), (torch.float32, torch.float64, torch.bfloat16)
    return {f"cpu {n} threads {d} torch {torch.__version__}": speed for n in threads for d in dtypes}
