"""What the stages of a cut cost: bytes beside those of torch's stages, seconds beside the graph."""

import gc

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input

from fxaccel.memory import Meter
from fxaccel.passes import Partition
from fxaccel.passes._partition_costs import costs
from fxaccel.passes._partition_plan import Step
from fxaccel.passes._partition_plan import cut as cut_of
from fxaccel.pipeline.orders import order
from fxaccel.profile import profile
from fxaccel.roofline import speed
from fxaccel.stage_module import stage_modules
from tests.helpers import session
from tests.passes.partition_models import cut, made


def planned(fast, ranks=None, under="GPipe", **options):
    """The step of a program, its cut and what the stages cost under a schedule."""
    program, one = session(fast).all[0].canonical, Partition(**options)
    found = profile(program)
    step, terms = Step(program, found, speed(program).seconds(found)), one.terms()
    at = cut_of(step, terms, one.named)
    ranks = ranks or terms.stages
    return step, at, costs(step, terms, at, order(under, ranks, 4 * ranks, terms.stages // ranks))


def inputs(stage):
    return [torch.ones(t.shape, dtype=t.dtype).requires_grad_(t.requires_grad) for t in stage.receives]


def copied(out):
    """What a stage hands to others where its backward is done in two parts: torch_stage.py."""
    return tuple(t.clone() if t.requires_grad else t for t in out)


@pytest.mark.parametrize(
    "name", ["chain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("tied", "unet"))]
)
def test_bytes_are_those_that_a_stage_of_torch_holds(name):
    model, args, stages = made(name)
    fast = cut(model, args, check=False, stages=stages)
    found = planned(fast, under="InterleavedZeroBubble", stages=stages)[2]
    for i, (stage, cost) in enumerate(zip(stage_modules(fast, *args), found, strict=True)):
        given = list(args) if i == 0 else inputs(stage)
        received = sum(t.nbytes for t in given) if i else 0
        with Meter() as meter:
            out = stage(*given)
            if i == stages - 1 and isinstance(out, tuple):
                out = out[0]  # the loss
            loss = out.nbytes if i == stages - 1 and out.dim() == 0 else 0
            if i < stages - 1:
                out = copied(out)
            gc.collect()
            assert cost.saved == meter.live - loss + received
            assert cost.rising >= meter.peak >= cost.saved - received
            if i == 0:
                assert cost.kept == cost.saved + found[1].returns  # torch does all of it in W
                continue
            out = [t for t in ([out] if isinstance(out, torch.Tensor) else out) if t.requires_grad]
            gradients = [torch.ones_like(t) for t in out]
            came = sum(t.nbytes for t in gradients) if i < stages - 1 else 0
            meter.reset()
            back, groups = stage_backward_input(out, gradients, given, stage.parameters())
            del out, gradients
            gc.collect()
            left, most = meter.live + received, meter.peak + received
        assert cost.saved + cost.parting + came >= most
        if name == "chain":
            assert cost.kept == left
        assert cost.kept >= left - sum(t.nbytes for t in back if t is not None)  # may be of larger
        assert groups


def test_seconds_are_those_of_the_gradients_that_the_graph_has():
    model, args, _ = made("chain")
    model.layers[4].requires_grad_(False)
    step, _, (first, second) = planned(cut(model, args, check=False, at=("layers.3",)), at=("layers.3",))
    calls = {n.name: s for n, s in step.forward.items()}
    linears, tanhs = (
        [calls[f"{w}{i}"] for i in ("", *(f"_{i}" for i in range(1, 7)))] for w in ("linear", "tanh")
    )
    assert first.forward == pytest.approx(sum(linears[:3] + tanhs[:3]))
    assert first.backward_input == 0  # torch has no I for it
    assert first.backward_weight == pytest.approx(linears[0] + 2 * sum(linears[1:3]) + 2 * sum(tanhs[:3]))
    assert second.forward == pytest.approx(sum(linears[3:] + tanhs[3:]))
    assert second.backward_input == pytest.approx(sum(linears[3:]) + 2 * sum(tanhs[3:]))
    assert second.backward_weight == pytest.approx(linears[3] + sum(linears[5:]))
    sizes = {n: p.nbytes for n, p in model.named_parameters()}
    assert second.fixed == sum((1 if "4" in n else 2) * b for n, b in sizes.items() if int(n[7]) > 2)


def test_what_two_stages_of_a_rank_read_is_there_once():
    model, args, _ = made("tied")
    fast = cut(model, args, check=False, stages=2)
    both, apart = (
        planned(fast, ranks, under, stages=2, bandwidth=1e9)[2]
        for ranks, under in ((1, "Interleaved1F1B"), (2, "GPipe"))
    )
    embedding, table = model.embed.weight.nbytes, model.frequencies.nbytes
    assert [a.fixed - b.fixed for a, b in zip(apart, both, strict=True)] == [0, 2 * embedding + table]
    sums = [a.backward_weight - b.backward_weight for a, b in zip(apart, both, strict=True)]
    assert sums == pytest.approx([2 * embedding / 1e9] * 2)  # the gradient to the other rank and back
