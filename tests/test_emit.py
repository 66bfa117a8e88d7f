"""The generated code: what it accepts, that it frees what it is done with, that its bindings are right."""

import gc
import re
import traceback
import weakref

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import emit
from fxaccel.capture import capture
from fxaccel.errors import CaptureError
from tests.helpers import Function

F = nn.functional
aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.inner(x)


def emitted(function, *args):
    """(accepts, forward) of a function captured on args."""
    program = capture(function if isinstance(function, nn.Module) else Function(function), args, {})
    names = emit.emit(program).bind(nn.Module(), "<test>")
    return names["accepts"], names["forward"]


# -- what a call must be ---------------------------------------------------------------------------


def test_accepts_other_sizes_of_symbolic_dimensions_and_nothing_else():
    x = torch.randn(4, 6)
    accepts, _ = emitted(lambda a: a @ a.t(), x)
    assert accepts(x)
    assert accepts(torch.randn(9, 6))
    assert not accepts(x.double())
    assert not accepts(x[0])
    assert not accepts(x[None])
    assert not accepts(torch.randn(6, 4).t())
    assert not accepts(x.to("meta"))
    assert not accepts(torch.randn(1, 6))  # a size of one broadcasts: another graph


def test_a_wrong_shape_of_the_same_number_of_elements_is_never_computed():
    model = Net()
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 8),))
    for wrong in (torch.randn(8, 4), torch.randn(2, 16), torch.randn(32)):
        with pytest.raises((RuntimeError, CaptureError)):
            model(wrong)
        with pytest.raises((RuntimeError, CaptureError)):
            fast(wrong)


def test_a_size_that_the_model_fixes_is_checked():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x.view(-1, 6, 3) + self.position

    model = Fixed()
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 6, 3),))
    wrong = torch.randn(6, 4, 3)  # as many elements; the view would swallow it in eager, too
    torch.testing.assert_close(fast(wrong), model(wrong))
    with pytest.raises((RuntimeError, CaptureError)):
        fast(torch.randn(4, 5, 3)[:, :, :2])


def test_a_condition_with_an_or_is_no_way_around_the_others():
    """Of the unflatten export assumes `s1 == 2 or s1 % 2 == 0`; of the branch, that there are at most 3."""

    def function(x):
        y = x.unflatten(-1, (2, -1)).permute(0, 2, 1, 3)
        y = y.permute(0, 2, 1, 3).flatten(2)
        return y.tanh() if y.shape[0] > 3 else y * 2

    accepts, _ = emitted(function, torch.randn(3, 4, 8))
    assert accepts(torch.randn(2, 4, 8))
    assert not accepts(torch.randn(8, 4, 8))


def test_two_inputs_that_share_a_size_must_agree():
    accepts, _ = emitted(lambda a, b: a + b, torch.randn(4, 6), torch.randn(4, 6))
    assert accepts(torch.randn(5, 7), torch.randn(5, 7))
    assert not accepts(torch.randn(5, 7), torch.randn(4, 7))
    assert not accepts(torch.randn(5, 7), torch.randn(5, 1))


def test_another_dtype_or_layout_is_captured_anew_and_computed_right():
    model = Net().double()
    fast = fxaccel.accelerate(model)
    x = torch.randn(8, 8, dtype=torch.float64)
    for given in (x, x.t(), x[::2], x[:, :, None].expand(8, 8, 2)[:, :, 0]):
        torch.testing.assert_close(fast(given), model(given))
    with pytest.raises((RuntimeError, CaptureError)):
        fast(x.float())


def test_an_index_out_of_range_raises():
    model = nn.Embedding(10, 4)
    fast = fxaccel.accelerate(model, example_inputs=(torch.tensor([[1, 2], [3, 4]]),))
    with pytest.raises(IndexError):
        fast(torch.tensor([[1, 2], [3, 10]]))


def test_the_check_costs_microseconds():
    import timeit

    x = torch.randn(4, 8)
    accepts, _ = emitted(lambda a: a * 2, x)
    each = min(timeit.repeat(lambda: accepts(x), number=1000, repeat=5)) / 1000
    assert each < 100e-6  # about 2 us on an idle machine


# -- the text --------------------------------------------------------------------------------------


def test_the_code_is_flat_and_names_module_and_line_of_each_statement():
    fast = fxaccel.accelerate(Net(), passes=[], example_inputs=(torch.randn(4, 8),))
    body = fast.code.split("def forward")[1]
    assert re.search(r"= linear\(.*\).*# inner\.0  ", body)
    assert "for " not in body
    assert "test_emit.py:" in body
    compile(fast.code.split("\n", 1)[1], "<code>", "exec")


def test_an_error_at_run_time_shows_the_generated_line_with_path_and_users_line():
    fast = fxaccel.accelerate(nn.Sequential(nn.Embedding(4, 2), nn.ReLU()), passes=[])
    fast(torch.tensor([[1, 2], [0, 3]]))
    try:
        fast(torch.tensor([[1, 9], [0, 3]]))
    except IndexError as error:
        text = "".join(traceback.format_exception(error))
    assert "embedding(" in text
    assert re.search(r"embedding\(.*# 0", text)


def test_two_models_of_one_class_show_each_its_own_lines():
    shown = []
    for function in (torch.sin, torch.cos):
        fast = fxaccel.accelerate(Function(lambda a, f=function: f(a) @ a), passes=[], check=False)
        fast(torch.randn(4, 4, requires_grad=True))
        capture = fast.__dict__["_fxaccel"].all[0]
        try:
            capture.forward(torch.randn(4, 3))
        except RuntimeError as error:
            shown.append("".join(traceback.format_exception(error)))
    assert [re.findall(r"matmul\((sin|cos)", t) for t in shown] == [["sin"], ["cos"]]


def test_names_that_are_keywords_or_shadow_others_are_made_different():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("lambda", nn.Parameter(torch.ones(2)))
            self.torch = nn.Linear(2, 2)
            self.forward_ = nn.ModuleDict({"class": nn.Linear(2, 2), "my-layer": nn.Linear(2, 2)})

        def forward(self, linear, torch):
            x = self.torch(linear) * getattr(self, "lambda")
            return self.forward_["class"](x) + self.forward_["my-layer"](torch)

    model, a, b = Odd(), torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(fxaccel.accelerate(model)(a, b), model(a, b))


def test_names_of_python_stay_what_they_are():
    """What guards and sizes call is not hidden by an operator, an input or a module of that name."""

    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            self.len = nn.Linear(4, 4)

        def forward(self, round):
            return self.len(round).max()

    model, x = Largest(), torch.randn(3, 4)
    program = capture(model, (x,), {})
    program.guards = (*program.guards, "max(1, 2) == round(2.1)", "math.floor(2.5) == min(2, 3)")
    names = emit.emit(program).bind(model, "<test>")
    assert names["accepts"](x)
    torch.testing.assert_close(names["forward"](x)[0], model(x))


def test_literals_survive():
    x = torch.randn(3, 4)

    def function(a):
        b = torch.where(a > 0, a, float("-inf")).clamp(min=-1e30)
        c = torch.full((2,), float("nan")).nan_to_num(1.5)
        return (
            b.to(torch.float64).sum((0, 1), keepdim=True),
            a[..., 1::2],
            c,
            a.new_zeros(2, dtype=torch.int8),
        )

    want = function(x)
    _, forward = emitted(function, x)
    for a, b in zip(forward(x), want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


# -- freed values ----------------------------------------------------------------------------------


def test_intermediate_values_are_freed_after_their_last_reader():
    alive = weakref.WeakSet()
    most = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive.add(out)
                most.append(len(alive))
            return out

    def chain(a):
        for _ in range(20):
            a = a.sin()
        return a

    x = torch.randn(3, 4)
    _, forward = emitted(chain, x)
    gc.collect()
    with torch.no_grad(), Watch():
        forward(x)
    assert max(most) <= 3


def test_what_is_returned_or_read_again_is_not_freed():
    def function(a):
        b = a.sin()
        c = b.cos()
        return b, c + b, [c]

    x = torch.randn(3, 4)
    _, forward = emitted(function, x)
    got = forward(x)
    assert torch.equal(got[0], x.sin())
    assert torch.equal(got[2], x.sin().cos())


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 9])
def test_size_arithmetic_is_emitted(size):
    def function(a):
        b = a.view(a.shape[0] * 2, a.shape[1] // 2)
        return b, b.new_ones(b.shape[0] - 1, (a.shape[0] + 3) % 4 + 1), a.shape[0] / 2, -a.shape[0]

    _, forward = emitted(function, torch.randn(6, 4))
    x = torch.randn(size, 4)
    for a, b in zip(forward(x), function(x), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
