"""The wheel holds the three folders under their import names and works from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, fxaccel, fxaccel.passes, fxaccel.kernels
from torch import nn
assert {target!r} in fxaccel.__file__, fxaccel.__file__
assert {target!r} in fxaccel.passes.__path__[0] and {target!r} in fxaccel.kernels.__path__[0]
fast = fxaccel.accelerate(nn.Sequential(nn.RMSNorm(8, eps=1e-6)), [fxaccel.passes.FuseNorm])
x = torch.randn(2, 8)
torch.testing.assert_close(fast(x), fast.original()(x))
assert len(fast.report()["fuse-norm"].applied) == 1
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT],
        check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_it_holds_the_folders_under_their_import_names(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("fxaccel/module.py", "fxaccel/py.typed", "fxaccel/canonical/__init__.py",
                 "fxaccel/passes/fuse_norm.py", "fxaccel/kernels/rms_norm.py"):  # fmt: skip
        assert name in names
    assert not [n for n in names if n.startswith(("passes/", "kernels/", "tests/", "bench/"))]


def test_it_works_from_another_folder(wheel, tmp_path):
    target = tmp_path / "installed"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], check=True
    )
    done = subprocess.run(
        [sys.executable, "-c", USE.format(target=str(target))],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_editable_install_sees_the_folders():
    code = "import fxaccel.passes, fxaccel.kernels; print(fxaccel.passes.__path__[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == ROOT / "passes"


def test_import_works_without_triton(tmp_path):
    (tmp_path / "triton.py").write_text("raise ModuleNotFoundError('no triton here')")
    code = "import fxaccel, torch; fxaccel.accelerate(torch.nn.RMSNorm(8, eps=1e-6))(torch.randn(2, 8))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
