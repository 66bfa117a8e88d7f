"""The wheel holds the three folders under their import names and works where the repository is not."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USE = """
import sys, torch, fxaccel, fxaccel.passes, fxaccel.kernels
from torch import nn
assert {target!r} in fxaccel.__file__, fxaccel.__file__
assert {target!r} in fxaccel.passes.__path__[0] and {target!r} in fxaccel.kernels.__path__[0]
fast = fxaccel.accelerate(nn.Sequential(nn.RMSNorm(8, eps=1e-6)), [fxaccel.passes.FuseNorm])
x = torch.randn(2, 8)
torch.testing.assert_close(fast(x), fast.original()(x))
assert len(fast.report()["fuse-norm"].applied) == 1
assert "fxaccel.rms_norm" in fast.report().html()
files = [getattr(m, "__file__", "") or "" for m in sys.modules.values()]
assert not [f for f in files if f.startswith({folders!r})], files
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
                 "fxaccel/pipeline/simulator.py", "fxaccel/page/page.css", "fxaccel/page/page.js",
                 "fxaccel/passes/fuse_norm.py", "fxaccel/kernels/rms_norm.py"):  # fmt: skip
        assert name in names
    assert not [n for n in names if n.startswith(("passes/", "kernels/", "tests/", "bench/"))]


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """A virtual environment with the wheel alone; it sees the dependencies as folders on its path."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel],
        check=True, capture_output=True,
    )  # fmt: skip
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # Folders named in a .pth file are searched; their own .pth files, the editable install's, are not read.
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    return folder, site


def run(folder, *command):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [folder / "env" / "bin" / command[0], *command[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_works_in_an_environment_of_its_own_from_another_folder(elsewhere):
    folder, site = elsewhere
    ours = tuple(str(ROOT / name) + os.sep for name in ("fxaccel", "passes", "kernels"))
    done = run(folder, "python", "-c", USE.format(target=str(site), folders=ours))
    assert done.returncode == 0, done.stderr


def test_its_command_works_there(elsewhere):
    done = run(elsewhere[0], "fxaccel", "passes")
    assert done.returncode == 0, done.stderr
    assert "fuse-norm" in done.stdout
    assert "fuse-attention" in done.stdout


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
