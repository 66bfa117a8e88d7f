"""The meter counts what operators allocate, once, for as long as it lives."""

import torch
from torch import nn

from fxaccel.memory import Meter

FLOAT = 4


def test_an_allocation_is_counted_until_its_tensor_is_deleted():
    with Meter() as meter:
        a = torch.empty(10, 10)
        assert (meter.live, meter.peak) == (400, 400)
        b = torch.zeros(7, dtype=torch.int64)
        assert (meter.live, meter.peak) == (456, 456)
        del a
        assert (meter.live, meter.peak) == (56, 456)
        c = torch.ones(3, dtype=torch.bool)
        assert (meter.live, meter.peak) == (59, 456)
        del b, c
    assert (meter.live, meter.peak, meter.known) == (0, 456, {})


def test_what_is_freed_after_the_block_is_seen_to_be_freed():
    with Meter() as meter:
        a = torch.empty(10)
    b = torch.empty(10)  # not inside
    assert meter.live == 40
    del a
    assert meter.live == 0
    del b
    assert meter.live == 0


def test_the_peak_is_the_most_since_it_was_reset():
    with Meter() as meter:
        a = torch.empty(100)
        b = torch.empty(50)
        del a
        assert (meter.live, meter.peak) == (200, 600)
        meter.reset()
        assert (meter.live, meter.peak) == (200, 200)
        c = torch.empty(25)
        assert (meter.live, meter.peak) == (300, 300)
        del b, c
    assert (meter.live, meter.peak) == (0, 300)


def test_a_storage_counts_once_however_many_tensors_lie_in_it():
    with Meter() as meter:
        a = torch.empty(4, 6)
        views = [a.t(), a[1], a.view(-1), a.detach(), a.expand(2, 4, 6), *a.split(2), *a.unbind(0)]
        assert meter.live == 24 * FLOAT
        a.add_(1).relu_().mul_(2)
        a[0].zero_()
        torch.add(a, 1, out=a)
        assert (meter.live, meter.peak) == (24 * FLOAT, 24 * FLOAT)
        del a
        assert meter.live == 24 * FLOAT  # the views keep it
        last = views[-1]
        del views
        assert meter.live == 24 * FLOAT
        del last
        assert meter.live == 0


def test_the_whole_of_a_storage_is_counted_not_the_part_that_a_tensor_shows():
    with Meter() as meter:
        row = torch.empty(10, 8)[3]
        assert meter.live == 80 * FLOAT
        del row
        assert meter.live == 0
        strided = torch.empty_strided((2, 2), (100, 1))
        assert meter.live == 102 * FLOAT
        del strided


def test_what_was_there_before_counts_nothing_nor_do_views_of_it():
    weight, buffer = nn.Parameter(torch.empty(8, 8)), torch.empty(8, 8)
    with Meter() as meter:
        views = [weight.t(), weight[2], buffer.view(-1), buffer[0].detach()]
        with torch.no_grad():
            weight.add_(1)
            buffer[0].copy_(weight[1])
        assert (meter.live, meter.peak) == (0, 0)
        made = buffer + 1
        assert meter.live == 64 * FLOAT
    del views, made, weight, buffer
    assert meter.live == 0


def test_a_new_storage_in_the_place_of_an_old_one_is_counted():
    with Meter() as meter:
        for _ in range(50):  # the allocator hands the same memory out again
            a = torch.empty(1000)
            assert meter.live == 4000
            del a
            assert meter.live == 0


def test_an_operator_with_several_results_counts_each():
    x = torch.randn(5, 8)
    with Meter() as meter:
        found = x.sort(-1)
        assert meter.live == 40 * FLOAT + 40 * 8
        indices = found.indices
        del found
        assert meter.live == 40 * 8
        del indices
        assert meter.live == 0


def test_what_autograd_saves_lives_until_backward_lets_it_go():
    x = torch.randn(32, 16, requires_grad=True)
    size = 32 * 16 * FLOAT
    with Meter() as meter:
        loss = x.tanh().exp().sum()  # both results are saved, by no other name
        assert (meter.live, meter.peak) == (2 * size + FLOAT, 2 * size + FLOAT)
        loss.backward()
        assert meter.live == size + FLOAT  # the gradient, the loss
        del loss
        assert meter.live == size
        x.grad = None
        assert meter.live == 0


def test_a_graph_that_is_retained_stays_and_one_without_backward_dies_with_its_output():
    x = torch.randn(32, 16, requires_grad=True)
    size = 32 * 16 * FLOAT
    with Meter() as meter:
        loss = x.tanh().sum()
        loss.backward(retain_graph=True)
        assert meter.live == 2 * size + FLOAT  # tanh(x), the gradient, the loss
        del loss
        assert meter.live == size
        y = x.tanh().tanh()
        outer = (y.detach().requires_grad_().exp() * 2).sum()  # a graph over a result of another
        assert meter.live == 4 * size + FLOAT
        del outer
        assert meter.live == 3 * size
        del y
        assert meter.live == size


def test_the_graph_of_a_gradient_is_freed_with_it():
    x = torch.randn(32, 16, requires_grad=True)
    with Meter() as meter:
        (grad,) = torch.autograd.grad(x.tanh().sum(), x, create_graph=True)
        alive = meter.live
        assert alive >= 2 * 32 * 16 * FLOAT  # tanh(x) and the gradient
        (second,) = torch.autograd.grad(grad.sum(), x)
        del grad
        assert meter.live == 32 * 16 * FLOAT
        del second
        assert meter.live == 0


def test_gradients_that_are_accumulated_take_no_more_than_once():
    layer, x = nn.Linear(16, 4), torch.randn(8, 16)
    grads = (16 * 4 + 4) * FLOAT
    with Meter() as meter:
        layer(x).sum().backward()
        assert meter.live == grads
        for _ in range(3):
            layer(x).sum().backward()
            assert meter.live == grads
        layer.zero_grad()
        assert meter.live == 0


def test_a_training_step_of_two_layers_by_hand():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)), torch.randn(4, 16)
    with Meter() as meter:
        hidden = model[0](x)
        assert meter.live == 4 * 32 * FLOAT
        hidden = model[1](hidden)  # the linear saves its input, the tanh its result
        assert (meter.live, meter.peak) == (4 * 32 * FLOAT, 2 * 4 * 32 * FLOAT)
        out = model[2](hidden)
        assert meter.live == (4 * 32 + 4 * 8) * FLOAT
        del hidden
        assert meter.live == (4 * 32 + 4 * 8) * FLOAT  # saved by the tanh and by the linear behind it
        del out
        assert meter.live == 0


def test_dropout_keeps_its_mask_and_no_gradient_keeps_nothing():
    x = torch.randn(64, requires_grad=True)
    with Meter() as meter:
        y = nn.functional.dropout(x, 0.5)
        mask = meter.live - 64 * FLOAT
        assert mask > 0
        del y
        assert meter.live == 0
        with torch.no_grad():
            y = nn.functional.dropout(x, 0.5).exp()
        assert meter.live == 64 * FLOAT
        del y


def test_meters_in_each_other_count_the_same():
    with Meter() as outer:
        a = torch.empty(5)
        with Meter() as inner:
            b = torch.empty(10)
            a.add_(1)
        assert (outer.live, inner.live) == (60, 40)
        del a
        assert (outer.live, inner.live) == (40, 40)
        del b
    assert (outer.live, inner.live) == (0, 0)
