"""An accelerated module within DDP, torch.compile, torch.export, other modules and threads."""

import os

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from tests.test_module import Net, captures, close, pair


@pytest.fixture
def gloo(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_wraps_it_and_trains(gloo):
    model, fast, x = pair()
    wrapped = nn.parallel.DistributedDataParallel(fast)
    model(x).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for _ in range(2):
        fast.zero_grad()
        wrapped(x).square().sum().backward()
        for name, p in fast.named_parameters():
            close(p.grad, want[name])


def test_torch_compile_of_the_result():
    model, fast, x = pair()
    fast(x)
    compiled = torch.compile(fast, backend="aot_eager")
    close(compiled(x), model(x))
    x = torch.randn(6, 8)
    close(compiled(x), model(x))
    compiled(x).sum().backward()


def test_torch_compile_of_a_result_that_is_not_captured_yet():
    model, fast, x = pair()
    close(torch.compile(fast, backend="eager")(x), model(x))


def test_torch_export_of_the_result():
    model, fast, x = pair()
    fast(x)
    exported = torch.export.export(fast, (x,))
    close(exported.module()(x), model(x))
    assert set(exported.state_dict) >= set(model.state_dict())


@pytest.mark.slow
def test_the_inductor_backend_is_verified_too():
    model, fast, x = pair(backend="inductor")
    close(fast(x), model(x))
    x = torch.randn(7, 8)
    close(fast(x), model(x))
    fast(x).sum().backward()


def test_it_is_a_submodule_of_another_model():
    model, fast, x = pair()
    outer, plain = nn.Sequential(fast, nn.Linear(8, 2)), None
    plain = nn.Sequential(model, outer[1])
    close(outer(x), plain(x))
    assert list(outer.state_dict()) == list(plain.state_dict())
    outer.load_state_dict(plain.state_dict())
    outer.double()
    close(outer(x.double()), plain(x.double()))


def test_keyword_defaults_and_numbers_choose_their_own_capture():
    model, fast, x = pair()
    close(fast(x), model(x))
    close(fast(x, gain=3.0), model(x, gain=3.0))
    close(fast(x=x, gain=3.0), model(x=x, gain=3.0))
    close(fast(x, gain=3.0), model(x, gain=3.0))
    assert captures(fast) == 3
    with pytest.raises(TypeError):
        fast(x, nothing=1)


def test_questions_before_the_first_call_are_answered():
    _, fast, _ = pair()
    assert "nothing captured yet" in str(fast.report())
    assert fast.code == ""
    with pytest.raises(OptionError, match="call the model once"):
        fast.diff()
    assert str(fast.verify()) == "no rewrite rests on a proof"


def test_example_inputs_capture_ahead_of_time():
    model, x = Net(), torch.randn(4, 8)
    for example in ((x,), {"x": x}, x, [x]):
        fast = fxaccel.accelerate(model, example_inputs=example)
        assert captures(fast) == 1
    assert captures(fxaccel.accelerate(model)) == 0


def test_threads_share_a_captured_model():
    from concurrent.futures import ThreadPoolExecutor

    model, fast, _ = pair()
    fast(torch.randn(4, 8))
    inputs = [torch.randn(n + 2, 8) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for x, got in zip(inputs, pool.map(fast, inputs), strict=True):
            close(got, model(x))


def test_torch_compile_makes_one_graph_of_the_result():
    model, fast, x = pair()
    fast(x)
    close(torch.compile(fast, backend="eager", fullgraph=True)(x), model(x))
