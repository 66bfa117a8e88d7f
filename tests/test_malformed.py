"""Saved files that are damaged at any place, and command lines of any words: errors of ours, no others."""

from __future__ import annotations

import random
import struct
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import fxaccel
from fxaccel.cli import app
from fxaccel.errors import ArtifactError
from tests.test_cli import MODEL

X = torch.ones(2, 3)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a small saved model, what it computes, and where to write a damaged one."""
    torch.manual_seed(0)
    fast = fxaccel.accelerate(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), example_inputs=(X,))
    path = tmp_path_factory.mktemp("malformed") / "m.fxa"
    fast.save(path)
    return path.read_bytes(), fast(X).detach(), path.with_name("damaged.fxa")


def refused_or_equal(saved, data: bytes) -> bool:
    """Whether it is refused; what is loaded computes what was saved."""
    _, want, path = saved
    path.write_bytes(data)
    try:
        fast = fxaccel.load(path)
    except ArtifactError as error:
        return bool(error.message)
    torch.testing.assert_close(fast(X), want)
    return False


def flipped(data: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= mask
    return bytes(changed)


def every_byte(saved, step: int, masks: tuple[int, ...]) -> None:
    data = saved[0]
    (length,) = struct.unpack("<Q", data[:8])
    places = {*range(8), *range(8, len(data), step), *range(8 + length - 8, 8 + length + 8), len(data) - 1}
    kept = [(p, m) for p in sorted(places) for m in masks if not refused_or_equal(saved, flipped(data, p, m))]
    assert kept == [], f"{len(kept)} damaged files were taken: {kept[:5]}"


def test_a_flipped_byte_is_refused(saved):
    every_byte(saved, 11, (0xFF, 1 << random.Random(0).randrange(8)))


def test_a_truncated_file_is_refused(saved):
    data = saved[0]
    for keep in {*range(20), *range(20, len(data), 23), len(data) - 40, len(data) - 1}:
        assert refused_or_equal(saved, data[:keep]), keep


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_every_byte_is_checked(saved, bit):
    every_byte(saved, 1, (1 << bit,))


@pytest.mark.slow
def test_every_length_is_checked(saved):
    data = saved[0]
    assert all(refused_or_equal(saved, data[:keep]) for keep in range(len(data)))


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_any_length_takes_no_memory(saved, length):
    assert refused_or_equal(saved, struct.pack("<Q", length) + saved[0][8:])


def test_more_or_other_bytes_are_refused(saved):
    data = saved[0]
    (length,) = struct.unpack("<Q", data[:8])
    deep = b'{"a":' * 50_000
    nested = data[:8] + deep[: length - 1] + data[8 + min(length - 1, len(deep)) :]
    for other in (data + b"\0", data + data, data[1:], b"\0" * len(data), data[::-1], nested):
        assert refused_or_equal(saved, other)


# -- command lines ---------------------------------------------------------------------------------

WORDS = [
    "cli_models:build", "cli_models:bare", "cli_models:plain", "cli_models:number", "cli_models", ":",
    "a:b:c",
    "cli_models:build.__class__", "", " ", ".", "..", "/", "absent.fxa", "cli_models.py", "binary.bin",
    "folder",
    "-p", "--pass", "-i", "--input", "--load", "--allow", "--json", "--train", "--debug", "--raw",
    "--out",
    "--budget", "--stages", "--why-not", "--html", "fuse-norm", "fuse-norm{", "fuse-norm}",
    "fuse-norm{where=}",
    "fuse-norm{where=[}", "fuse-norm{=}", "quantize{group=-1}", "quantize{group=1e99}",
    "checkpoint{budget=-1}",
    "checkpoint{budget=nan}", "partition{stages=0}", "partition{stages=99999999999}", "{}",
    "x=float32[2,3,16]",
    "float32[2,3,16]", "float32[-1]", "float32[99999999999999,99999999999]", "float32[]", "int64[2,2]",
    "bool[0]",
    "x=float32[2,3,16", "float4[2]", "device[2]", "bitwise", "approximate", "wild", "-1", "0", "nan",
    "1e400", "ü",
    "\u202e", "\x00", "\n", "🦊", "--", "---", "-x", "--no-such", "9" * 400,
]  # fmt: skip
COMMANDS = ["passes", "diff", "explain", "verify", "bisect", "bench", "plan", "absent"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODEL)
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)


def ends_well(words: list[str]) -> None:
    """Exit code 0, 1 or 2, and no other error than ours."""
    done = CliRunner().invoke(app, words)
    unforeseen = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not unforeseen, f"fxaccel {words}: {type(done.exception).__name__}: {done.exception}"
    assert done.exit_code in (0, 1, 2), (words, done.exit_code)
    if "--debug" not in words:
        assert "Traceback" not in done.output, words


NAMES = [
    "", "folder", "binary.bin", "\x00", "a:b:c", ":", "🦊:x", "..", "..:x", "cli_models:absent",
    "cli_models:number", "os:getpid", "json:nothing.x", "torch.nn:Linear",
]  # fmt: skip
WRONG = [
    *[[command, "-p"] for command in COMMANDS],
    *[[command, word] for command in ("diff", "verify") for word in NAMES],
    *[["diff", "cli_models:bare", "-i", word] for word in WORDS if "[" in word],
    *[["diff", "cli_models:build", "-p", word] for word in WORDS if "{" in word],
    *[["diff", "cli_models:build", "--load", word] for word in ("", "folder", "binary.bin", "\x00")],
    ["plan", "cli_models:build", "--stages", "-1"], ["plan", "cli_models:build", "--stages", "1e9"],
    ["plan", "cli_models:build", "--budget", "nan"], ["plan", "cli_models:build", "--budget", "-1GiB"],
    ["bench", "cli_models:bare"], ["bisect", "cli_models:build", "--check", "nothing:here"],
    ["explain", "cli_models:build", "--why-not", "", ""],
]  # fmt: skip


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("words", WRONG, ids=lambda words: ascii(" ".join(words))[:60])
def test_a_wrong_command_line_is_an_error_of_ours(words):
    ends_well(words)


LINES = st.builds(lambda command, words: [command, *words], st.sampled_from(COMMANDS), st.lists(
    st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=4
))  # fmt: skip


@pytest.mark.usefixtures("folder")
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(LINES)
def test_any_words_at_all(words):
    ends_well(words)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
@settings(max_examples=2_000, suppress_health_check=list(HealthCheck))
@given(LINES)
def test_many_words(words):
    ends_well(words)
