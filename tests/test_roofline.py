"""The two constants of a device: measured once, and kept in a file that may be missing or damaged."""

import json

import pytest
import torch

from fxaccel import roofline
from fxaccel.profile import Call, Profile
from fxaccel.roofline import Roofline

CPU = torch.device("cpu")


@pytest.fixture
def file(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fxaccel" / "roofline.json"


@pytest.fixture
def measured(monkeypatch):
    """How often the device was measured."""
    times = []

    def measure(device, dtype):
        times.append(dtype)
        return Roofline(1e9 * len(times), 1e8)

    monkeypatch.setattr(roofline, "measure", measure)
    return times


def test_a_device_is_measured_once_for_each_dtype(file, measured):
    first = roofline.roofline(CPU, torch.float32)
    assert roofline.roofline(CPU, torch.float32) == first
    assert roofline.roofline(CPU, torch.bfloat16) != first
    assert roofline.roofline(CPU, torch.float32) == first
    assert measured == [torch.float32, torch.bfloat16]
    assert len(json.loads(file.read_text())) == 2
    assert [f.name for f in file.parent.iterdir()] == ["roofline.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"cpu": 3}',
        '{"cpu": {"rate": [], "bandwidth": 1}}',
        '{"cpu": {"rate": 1, "bandwidth": -1}}',
    ],
)
def test_a_damaged_file_is_made_anew(file, measured, text):
    file.parent.mkdir()
    file.write_text(text)
    found = roofline.roofline(CPU, torch.float32)
    assert len(measured) == 1
    assert roofline.roofline(CPU, torch.float32) == found
    assert len(measured) == 1


def test_where_nothing_can_be_written_it_is_measured_each_time(monkeypatch, tmp_path, measured):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    roofline.roofline(CPU, torch.float32)
    roofline.roofline(CPU, torch.float32)
    assert len(measured) == 2


def test_what_is_measured_is_what_a_product_and_a_copy_take():
    found = roofline.measure(CPU, torch.float32)
    assert 1e8 < found.rate < 1e14
    assert 1e8 < found.bandwidth < 1e13


def test_a_call_takes_the_longer_of_computing_and_moving():
    calls = {
        0: Call("product", flops=1000, nbytes=10), 1: Call("norm", flops=10, nbytes=1000),
        2: Call("view", nbytes=1000, view=True),
    }  # fmt: skip
    profile = Profile([], calls, {}, {}, 0, 0)
    assert Roofline(1e3, 1e2).seconds(profile) == {0: 1.0, 1: 10.0, 2: 0.0}
