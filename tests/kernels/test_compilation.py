"""Every kernel compiles ahead of time, without a GPU, within each target's limits and without spills."""

import pathlib
import re
import subprocess

import pytest
import torch

from fxaccel.kernels import _flash, _rows

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia")

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(
    not isinstance(_rows.forward_kernel, JITFunction), reason="TRITON_INTERPRET is set"
)

TARGETS = {  # and the shared memory that a program may use there
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
CHIPS = {"sm_80": "ampere", "sm_90": "hopper", "gfx942": "amd"}
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP32_POINTERS = {"mean_ptr", "rstd_ptr", "dw_ptr", "db_ptr", "lse_ptr", "delta_ptr", "dbias_ptr"}
FLOATS = {"eps", "offset", "scale"}
STEPS_OF_ONE = {"bias_n", "bias_m", "bias_b", "bias_h", "N", "S", "T"}  # not multiples of 16


def compiled(kernel, target, dtype, constants, warps, stages=None):
    """The kernel for `target`, as a launch with aligned pointers and even strides specialises it."""
    signature, aligned = {}, {}
    for at, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif pointer:
            signature[name] = "*fp32" if name in FP32_POINTERS else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        if name not in constants and name not in FLOATS | STEPS_OF_ONE:
            aligned[(at,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": warps} | ({} if stages is None else {"num_stages": stages})
    return triton.compile(source, target=target, options=options)


def spills(kernel):
    """What spills to memory, from ptxas -v or the AMD compiler's notes; scalars there spill to vectors."""
    if "ptx" not in kernel.asm:
        return sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])))
    ptx = kernel.asm["ptx"]
    ptxas = pathlib.Path(nvidia.__file__).parent / "bin" / "ptxas"
    name = re.search(r"\.target (sm_\w+)", ptx)[1]
    command = [ptxas, "-v", f"--gpu-name={name}", "-o", "/dev/null", "-"]
    told = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", told)[1])


def check(kernel, target, dtype, constants, config, may_spill=False):
    gpu, memory = TARGETS[target]
    stages = getattr(config, "stages", None)
    made = compiled(kernel, gpu, dtype, constants, config.warps, stages)
    assert made.metadata.shared <= memory
    if not may_spill:
        assert spills(made) == 0


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """One cache for the whole run, so that equal kernels compile once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def rows_forward(target, dtype, columns, centred):
    config = _rows.forward_config(columns)
    kernel = _rows.wide_forward_kernel if config.wide else _rows.forward_kernel
    constants = {"CENTRED": centred, "ROUND_FIRST": not centred}
    constants |= {"ROWS": config.rows, "BLOCK": config.block}
    if not centred:
        constants |= {"b_ptr": None, "mean_ptr": None}
    check(kernel, target, dtype, constants, config)


def rows_backward(target, dtype, columns, centred):
    config = _rows.backward_config(columns, TYPES[dtype].itemsize)
    kernel = _rows.wide_backward_kernel if config.wide else _rows.backward_kernel
    constants = {"ROWS": config.rows, "BLOCK": config.block}
    if not centred:
        constants |= {"db_ptr": None, "mean_ptr": None}
    check(kernel, target, dtype, constants, config)


@pytest.mark.parametrize("kernel", [rows_forward, rows_backward])
@pytest.mark.parametrize("columns", [64, 1024, 4096, 8192, 16384, 65536])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_rows(target, dtype, columns, kernel):
    kernel(target, dtype, columns, True)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [rows_forward, rows_backward])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("columns", [1, 128, 256, 512, 2048, 16384, 32768])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_full(target, dtype, columns, centred, kernel):
    kernel(target, dtype, columns, centred)


KERNELS = {
    "forward": _flash.forward_kernel,
    "keys": _flash.key_gradient_kernel,
    "queries": _flash.query_gradient_kernel,
    "bias": _flash.bias_gradient_kernel,
}


def flash(target, dtype, name, d, biased, causal=True):
    """Attention's kernels, causal by default: these hold the others' loop and one more."""
    amd = target.startswith("gfx")
    config = _flash.choose(name, d, TYPES[dtype].itemsize, biased, CHIPS[target])
    constants = {
        "D": d,
        "E": d,
        "CAUSAL": causal,
        "PRECISION": "ieee" if amd or dtype != "fp32" else "tf32x3",
        "DOT": getattr(tl, str(TYPES[dtype]).removeprefix("torch.")),
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
        "BLOCK_E": max(16, 1 << (d - 1).bit_length()),
    }
    if not biased:
        constants["bias_ptr"] = None
    if name == "bias":
        constants |= {"ROWS": True, "COLS": True}
    check(KERNELS[name], target, dtype, constants, config, may_spill=dtype == "fp32")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_flash(target, d, name):
    flash(target, "bf16", name, d, biased=name == "bias")


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_flash_in_full(target, dtype, d, name, biased, causal):
    if name == "bias" and not biased:
        pytest.skip("no bias, no gradient of it")
    flash(target, dtype, name, d, biased, causal)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_flash_in_fp32(target, d, name):
    flash(target, "fp32", name, d, biased=True)


@pytest.mark.parametrize("target", TARGETS)
def test_delta(target):
    made = compiled(
        _flash.delta_kernel, TARGETS[target][0], "bf16", {"E": 128, "BLOCK_M": 32, "BLOCK_E": 128}, 4
    )
    assert spills(made) == 0
