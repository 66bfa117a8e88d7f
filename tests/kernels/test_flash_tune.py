"""Which blocks attention's kernels take: tables, and what was measured and kept, with a timer that lies."""

import json
import re

import pytest
import torch

from fxaccel.kernels import _flash, _flash_blocks, _flash_tune
from fxaccel.kernels._flash_blocks import Config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fxaccel" / "attention.json"


def chosen(kernel="forward", dtype=torch.float16, width=16, features=("causal",)):
    return _flash_blocks.choose(kernel, dtype, width, features, CPU)


def tuned(monkeypatch, best, **features):
    """Tune with a timer for which `best` is the fastest; whatever is run is noted, not run."""
    monkeypatch.setattr(_flash_tune, "candidates", lambda kernel: [Config(16, 16, 4, 1), best])
    seen = []
    for name in ("forward", "key_gradient", "query_gradient"):
        monkeypatch.setattr(_flash, name, lambda *args: seen.append(args[-1]))
    monkeypatch.setattr(_flash, "score_arguments", lambda *args: {})

    def timer(run):
        run()
        if seen[-1].m == 16:
            raise _flash_tune.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return 1.0 if seen[-1] == best else 2.0

    q = torch.randn(1, 1, 20, 16, dtype=torch.float16)
    return _flash_tune.tune(q, q, q, timer=timer, **features)


def test_tuned_blocks_are_kept_and_used(monkeypatch, file):
    best = Config(32, 64, 2, 2)
    before = chosen()
    assert before != best
    found = tuned(monkeypatch, best, mask="k <= q")
    assert found == {"forward": best, "keys": best, "queries": best}
    assert chosen() == chosen("keys") == chosen("queries") == best
    assert chosen(features=()) == before
    assert chosen(width=100) != best
    assert chosen(dtype=torch.bfloat16) == before
    assert [*file.parent.iterdir()] == [file]
    assert all(
        re.match(r"cpu \| triton \S+ \| \w+ \| float16 \| 64 \| causal$", x)
        for x in json.loads(file.read_text())
    )


def test_tuning_adds_to_what_is_known(monkeypatch):
    tuned(monkeypatch, Config(32, 64, 2, 2), mask="k <= q")
    tuned(monkeypatch, Config(64, 64, 2, 2), backward=False, softcap=3.0)
    tuned(monkeypatch, Config(64, 32, 2, 2), backward=False, mask="k <= q")
    assert chosen(features=("softcap",)) == Config(64, 64, 2, 2)
    assert chosen() == Config(64, 32, 2, 2)
    assert chosen("keys") == Config(32, 64, 2, 2)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"a": 3}', '{"a": [1, 2]}', '{"a": [48, 64, 4, 1]}', '{"a": [64, 64, 3, 1]}', "\0\xff"],
)
def test_a_damaged_file_is_not_used_and_warned_of_once(text, file):
    before = chosen()
    file.parent.mkdir()
    file.write_text(text)
    with pytest.warns(UserWarning, match="is not a file of tuned blocks"):
        assert chosen() == before
    assert chosen() == before


def test_the_file_is_read_once_for_each_state(monkeypatch, file):
    tuned(monkeypatch, Config(32, 64, 2, 2), mask="k <= q")
    chosen()
    reads = _flash_blocks._read.cache_info().misses
    chosen()
    chosen("keys")
    assert _flash_blocks._read.cache_info().misses == reads
    file.write_text("{}")
    assert chosen() != Config(32, 64, 2, 2)


def test_nothing_is_tuned_unasked(monkeypatch, file):
    monkeypatch.setattr(_flash_tune, "tune", lambda *a, **kw: pytest.fail("tuned"))
    chosen()
    assert not file.exists()


@pytest.mark.parametrize("chip", _flash_blocks.TABLES)
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "bias", "relative"])
def test_every_table_has_every_kernel(kernel, chip):
    for itemsize in (2, 4):
        for width in (1, 64, 65, 128, 129, 256):
            for features in ((), ("causal",), ("rest", "dropout")):
                config = _flash_blocks.default(kernel, itemsize, width, features, chip)
                assert kernel != "relative" or config.m == config.n


def test_candidates_are_blocks():
    for kernel in ("forward", "keys", "queries"):
        made = _flash_tune.candidates(kernel)
        assert len(made) > 20
        assert [_flash_blocks._checked(c) for c in made] == made
