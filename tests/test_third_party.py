"""Passes of other packages are found by their entry points; a broken package is named and hides nothing."""

import os
import subprocess
import sys
import textwrap

import pytest

PASSES = '''
"""A pass from elsewhere."""
import fxaccel


@fxaccel.register
class ClampRelu(fxaccel.Rule):
    """relu(x) becomes clamp(x, 0)."""

    name = "clamp-relu"
    numerics = "bitwise"

    def pattern(self, op, x):
        return op.aten.relu.default(x)

    def rewrite(self, op, m):
        return op.aten.clamp.default(m.x, 0)
'''

USE = """
import torch, fxaccel
from fxaccel.discover import available

class Net(torch.nn.Module):
    def forward(self, x):
        return x.relu()

assert "clamp-relu" in available(), list(available())
fast = fxaccel.accelerate(Net(), passes=["clamp-relu"])
x = torch.randn(3, 4)
assert torch.equal(fast(x), x.relu())
print(len(fast.report()["clamp-relu"].applied), "clamp(" in fast.code)
"""


def install(folder, name, source, entry):
    """A package with an entry point, as an installer would leave it in site-packages."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fxaccel.passes]\n{entry}\n")


# Has imported fxaccel and looked for no pass; each script runs in a fork of it, beside its packages.
SERVER = """
import os, sys, traceback
import torch, fxaccel, fxaccel.passes

for folder in map(str.strip, sys.stdin):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("done", flush=True)
        continue
    os.chdir(folder)
    sys.path.insert(0, folder)
    with open("output", "w") as sys.stdout:
        try:
            exec(open("script.py").read(), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc(file=sys.stdout)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def run():
    """What a script prints in a process whose path has this folder."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as server:

        def output(folder, script):
            (folder / "script.py").write_text(textwrap.dedent(script))
            server.stdin.write(f"{folder}\n")
            server.stdin.flush()
            assert server.stdout.readline() == "done\n"
            return (folder / "output").read_text()

        yield output
        server.stdin.close()


@pytest.mark.parametrize("entry", ["clamp = third_party", "clamp = third_party:ClampRelu"])
def test_a_pass_of_another_package_is_found_and_used_by_name(run, tmp_path, entry):
    install(tmp_path, "third_party", PASSES, entry)
    output = run(tmp_path, USE)
    assert output.strip() == "1 True"


@pytest.mark.parametrize(
    ("source", "entry", "words"),
    [
        ("import nothing_of_this_name\n", "broken = third_party", "ModuleNotFoundError"),
        ("raise ValueError('broken')\n", "broken = third_party", "ValueError: broken"),
        ("", "broken = third_party:NoSuchPass", "AttributeError"),
        ("def f(:\n", "broken = third_party", "SyntaxError"),
    ],
)
def test_a_broken_package_is_an_option_error_that_names_it(run, tmp_path, source, entry, words):
    install(tmp_path, "third_party", source, entry)
    output = run(tmp_path, """
        import fxaccel
        from fxaccel.discover import available
        try:
            available()
        except fxaccel.OptionError as error:
            print(error)
    """)  # fmt: skip
    assert "the entry point 'broken' (third_party" in output
    assert words in output
    assert "hint: uninstall or repair the package" in output


def test_a_package_that_takes_a_name_of_ours_is_refused(run, tmp_path):
    install(tmp_path, "third_party", PASSES.replace("clamp-relu", "fuse-norm"), "taken = third_party")
    output = run(tmp_path, """
        import fxaccel
        from fxaccel.discover import available
        try:
            available()
        except fxaccel.OptionError as error:
            print(error)
    """)  # fmt: skip
    assert "two passes are named 'fuse-norm'" in output
