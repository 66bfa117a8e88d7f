"""Every kernel compiles ahead of time, without a GPU, within each target's limits and without spills."""

import pathlib
import re
import subprocess

import pytest
import torch

from fxaccel.kernels import _attention_rows, _flash, _flash_blocks, _rows
from tests.helpers import thinned

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

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
FP32_POINTERS = {"mean_ptr", "rstd_ptr", "dw_ptr", "db_ptr"}
FLOATS = {"eps", "offset"}
STEPS_OF_ONE = {"N"}  # not a multiple of 16


def compiled(kernel, target, dtype, constants, warps, stages=None, fp32=FP32_POINTERS):
    """The kernel for `target`, as a launch with aligned pointers and even strides specialises it."""
    signature, aligned = {}, {}
    for at, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        if name in constants:
            signature[name] = "constexpr"
        elif pointer:
            signature[name] = "*fp32" if name in fp32 else f"*{dtype}"
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


def check(kernel, target, dtype, constants, config, may_spill=False, fp32=FP32_POINTERS):
    gpu, memory = TARGETS[target]
    stages = getattr(config, "stages", None)
    made = compiled(kernel, gpu, dtype, constants, config.warps, stages, fp32)
    assert made.metadata.shared <= memory
    if not may_spill:
        assert spills(made) == 0


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """One cache for the whole run, so that equal kernels compile once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def rows_forward(target, dtype, columns, centred, biased, fp32=FP32_POINTERS):
    config = _rows.forward_config(columns)
    kernel = _rows.wide_forward_kernel if config.wide else _rows.forward_kernel
    constants = {"CENTRED": centred, "ROUND_FIRST": not centred}
    constants |= {"ROWS": config.rows, "BLOCK": config.block}
    if not centred:
        constants |= {"mean_ptr": None}
    if not biased:
        constants |= {"b_ptr": None}
    check(kernel, target, dtype, constants, config, fp32=fp32)


def rows_backward(target, dtype, columns, centred, biased, fp32=FP32_POINTERS):
    config = _rows.backward_config(columns, TYPES[dtype].itemsize)
    kernel = _rows.wide_backward_kernel if config.wide else _rows.backward_kernel
    constants = {"ROWS": config.rows, "BLOCK": config.block}
    if not centred:
        constants |= {"mean_ptr": None}
    if not biased:
        constants |= {"db_ptr": None}
    check(kernel, target, dtype, constants, config, fp32=fp32)


@thinned(
    4, target=TARGETS, dtype=["bf16", "fp32"], columns=[64, 1024, 4096, 8192, 16384, 65536],
    kernel=[rows_forward, rows_backward],
)  # fmt: skip
def test_rows(target, dtype, columns, kernel):
    kernel(target, dtype, columns, True, True)


@pytest.mark.parametrize("kernel", [rows_forward, rows_backward])
@pytest.mark.parametrize("columns", [1024, 16384, 65536])
@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_rms_norm_with_weights_and_bias_in_fp32(target, columns, kernel):
    kernel(target, "bf16", columns, False, True, FP32_POINTERS | {"w_ptr", "b_ptr"})


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [rows_forward, rows_backward])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("columns", [1, 128, 256, 512, 2048, 16384, 32768])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_in_full(target, dtype, columns, centred, biased, kernel):
    kernel(target, dtype, columns, centred, biased)


PADDING, TENSOR, SLOPES = "(k <= q) & t0[b, k]", "t0[0, h, q, k]", "t0[h] * (k - q)"
RELATIVE, DOCUMENTS = "t0[h, k - q + S - 1]", "(k <= q) & (t0[b, q] == t0[b, k])"
LANGUAGE = (  # every operator, of scalars and of tiles
    "((q - k) // 3 == -2) | ((k - q) % -4 == h) & ~(t0[b, k // 2] != 5) | (t1[h] >= 0.25) | (t1[h] == 0.5)"
    " | (min(q, 3) + max(k, b) * 2 - abs(q - k) < where(k < 20, S, T)) & (float(k) * 0.5 > -1.0)"
    " | (t2[q, k] == t2[0, k]) | (7 // 2 == 3) | t2[q, 0] | where(h < 2, q < k, t2[q, k]) | (S % 3 == b)"
)
LANGUAGE_BIAS = "-t1[h] * abs(q - k) + float(q // 7) + where(k < 9, 0.0, -3.0e38) + min(t1[h], 0.5) + 1"
FEATURES = {  # mask, bias, softcap, sinks, dropout
    "plain": ("", "", 0.0, False, 0.0),
    "causal": ("k <= q", "", 0.0, False, 0.0),
    "window": ("(k <= q) & (q - k < 128)", "", 0.0, True, 0.0),
    "documents": (DOCUMENTS, "", 0.0, False, 0.0),
    "padding": (PADDING, "", 0.0, False, 0.0),
    "tensor bias": ("", TENSOR, 0.0, False, 0.0),
    "slopes": ("k <= q", SLOPES, 0.0, False, 0.0),
    "relative": ("", RELATIVE, 0.0, False, 0.0),
    "softcap": ("(k <= q) & (q - k < 128)", "", 50.0, False, 0.0),
    "dropout": ("k <= q", "", 0.0, False, 0.1),
    "tensor mask": ("t0[b, 0, q, k]", "", 0.0, False, 0.0),
    "all": ("(k <= q) & (t0[b, q] == t0[b, k])", "t1[b, h, q, k]", 50.0, True, 0.1),
    "empty rows": (_attention_rows.ROWS, f"{RELATIVE} + t1[b, h, q, k]", 50.0, False, 0.1),
}
B, H, G, S, T = 2, 8, 2, 1000, 1100


def tables_of(features):
    """Tensors of the shapes that a feature set reads, of no content."""
    make = lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta")  # noqa: E731
    documents, full = make((B, T), torch.int64), make((B, H, S, T), torch.bfloat16)
    relative, empty = make((H, S + T - 1), torch.float32), make((B, H, S), torch.bool)
    return {
        "documents": [documents],
        "padding": [make((B, T), torch.bool)],
        "tensor bias": [make((1, H, S, T), torch.bfloat16)],
        "slopes": [make((H,), torch.float32)],
        "relative": [relative],
        "tensor mask": [make((B, 1, S, T), torch.bool)],
        "all": [documents, full],
        "empty rows": [relative, full, empty, empty, empty],
        "language": [documents, make((H,), torch.float32), make((S, T), torch.bool)],
    }.get(features, [])


@pytest.fixture
def launches(tmp_path):
    """The launches of an attention on a target: [(kernel, arguments, options)], none of them run."""

    def record(target, dtype, d, features, wanted=False):
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", lambda fn, *a, grid, warmup, **kw: made.append((fn, a, kw)))
            patch.setattr(_flash, "on_gpu", lambda x: True)
            patch.setattr(_flash_blocks, "chip", lambda device: CHIPS[target])
            patch.setattr(torch.version, "hip", "6" if target.startswith("gfx") else None)
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            launch(dtype, d, features, wanted)
        return made

    return record


def launch(dtype, d, features, wanted):
    """Forward and backward on tensors of no content."""
    q, k, v = (torch.empty(B, s, n, d, dtype=dtype, device="meta").transpose(1, 2)
               for s, n in ((S, H), (T, G), (T, G)))  # fmt: skip
    language = (LANGUAGE, LANGUAGE_BIAS, 0.0, False, 0.0)
    mask, bias, softcap, sink, dropout = FEATURES.get(features, language)
    tables = tables_of(features)
    sinks = torch.empty(H, device="meta") if sink else None
    rest = (0.125, softcap, sinks, dropout, torch.empty(1, dtype=torch.int64, device="meta"))
    flat = features == "empty rows"
    out, lse = _flash.launch_forward(q, k, v, tables, mask, bias, *rest, save=True, flat=flat)
    shapes = [t.shape for t in tables]
    asked = [wanted and not _flash.unsupported_gradient(bias, shapes, i) for i in range(len(tables))]
    _flash.launch_backward(out, q, k, v, tables, mask, bias, out, lse, *rest, (*asked, sink), flat=flat)


def compile_launch(target, fn, args, options):
    """What a launch compiles, specialised by its arguments as a launch is."""
    backend = make_backend(TARGETS[target][0])
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    bound, specialization, options = binder(*args, debug=False, **options)
    packed = fn._pack_args(backend, options, bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(fn, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target][0], options=options.__dict__)


def check_flash(launches, target, dtype, d, features, wanted=False, may_spill=False):
    for fn, args, options in launches(target, dtype, d, features, wanted):
        made = compile_launch(target, fn, args, options)
        assert made.metadata.shared <= TARGETS[target][1], fn.__name__
        if not may_spill:
            assert spills(made) == 0, fn.__name__


@pytest.mark.parametrize(("target", "features", "d"), [
    ("sm_90", "causal", 128), ("sm_80", "dropout", 64), ("gfx942", "causal", 64),
])  # fmt: skip
def test_flash(target, features, d, launches):
    check_flash(launches, target, torch.bfloat16, d, features)


# on AMD, these; the rest are like them
AMD_FEATURES = ("causal", "window", "documents", "tensor bias", "dropout", "all", "empty rows")
SPILLS = ("all", "empty rows")  # everything at once
GRID = [(t, f) for t in TARGETS for f in FEATURES if not t.startswith("gfx") or f in AMD_FEATURES]


def test_every_expression_compiles(launches):
    check_flash(launches, "sm_90", torch.bfloat16, 16, "language", may_spill=True)


def test_rows_that_keep_no_key_compile(launches):
    check_flash(launches, "sm_90", torch.bfloat16, 16, "empty rows", wanted=True, may_spill=True)


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(("target", "features"), GRID)
def test_flash_in_full(target, features, d, launches):
    """Without spills, but where everything is asked for at once: that runs, at what it costs."""
    check_flash(launches, target, torch.bfloat16, d, features, wanted=True, may_spill=features in SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("d", [16, 80])
@pytest.mark.parametrize("target", TARGETS)
def test_flash_of_other_head_sizes(target, d, launches):
    check_flash(launches, target, torch.float16, d, "causal")


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("target", TARGETS)
def test_flash_in_fp32(target, d, launches):
    check_flash(launches, target, torch.float32, d, "all", may_spill=True)
