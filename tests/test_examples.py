"""examples/: each runs by itself from top to bottom, and asserts what it shows; the README lists them all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py"))
GROUPS = [  # those that import the same heavy packages run in one process
    ["generate", "trainer", "lora"],
    ["accelerate_library", "lightning_module", "torchao_quantized"],
    ["compiled", "exported", "safetensors_weights"],
    ["ddp"],
    ["fsdp"],
]
RUN = """
import runpy, sys
from tests.zoo.torchvision_shim import importable
with importable():  # transformers and Lightning look for torchvision
    for name in sys.argv[1:]:
        print("==", name, flush=True)
        runpy.run_path(f"examples/{name}.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.slow] * (g == ["fsdp"])) for g in GROUPS], ids="-".join
)
def test_the_examples_run(group):
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *group], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.split(r"^== \w+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(said) == len(group)
    assert all(said), "an example ends with a line of what it found"


def test_every_example_is_run_is_short_and_is_in_the_readme():
    assert sorted(name for group in GROUPS for name in group) == EXAMPLES
    readme = (ROOT / "README.md").read_text()
    for name in EXAMPLES:
        text = (ROOT / "examples" / f"{name}.py").read_text()
        assert len(text.splitlines()) < 65
        assert f"python examples/{name}.py" in text
        assert f"`examples/{name}.py`" in readme
