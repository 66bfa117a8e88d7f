"""partition: a training step in stages is the step that it was, and each stage costs what the plan says."""

import itertools
import re

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.ir import Region
from fxaccel.listing import listing
from fxaccel.passes import Partition
from fxaccel.profile import profile
from fxaccel.roofline import FORWARDS, roofline
from fxaccel.schedule import Schedule
from fxaccel.stage_module import stage_modules
from fxaccel.stages import parts
from tests.helpers import session
from tests.passes.partition_models import MODELS, Chain, agree, cut, made, seen


def program_of(fast):
    return session(fast).all[0].program


def plan_of(fast, **options):
    """The plan as an object: that of the program before the pass."""
    return Partition(**options).plan(session(fast).all[0].canonical)


# -- it fires --------------------------------------------------------------------------------------


def test_the_code_has_a_function_a_stage_and_the_listing_a_line():
    model, (x,), _ = made("unet")
    fast = cut(model, (x,), at=("middle", "up.1"))
    code = fast.code
    assert code.count("def stage_") == 3
    assert re.search(
        r"def forward\(x\):\n    (\w+), (\w+), (\w+), = stage_0\(x\)\n"
        r"    (\w+), (\w+), = stage_1\(\1, \2, \3\)\n    return stage_2\(\4, \5\)",
        code,
    )
    program = program_of(fast)
    assert [s.node for s in fast.report()["partition"].applied] == list(program.stages.begins)
    lines = [line for line in listing(program).splitlines() if line.startswith("stage(")]
    assert lines[0].startswith("stage(1, %tanh, %tanh_1, %tanh_2) ")
    assert lines[0].endswith("# f64[s0,8] f64[s0,8] f64[s0,8]")
    assert lines[1].startswith("stage(2, %tanh, ")
    diff = str(fast.diff())
    assert all(f"+{line}" in diff for line in lines)
    assert "stage: 0 -> 2\nnodes: 16 -> 16" in diff


def test_a_line_of_the_listing_stands_before_the_first_call_of_its_stage():
    fast = cut(*made("chain")[:2], at=("layers.3",))
    lines = listing(program_of(fast)).splitlines()
    (line,) = [i for i, text in enumerate(lines) if text.startswith("stage(1")]
    assert "%p_layers_3_weight" in lines[line + 1]


def costs(fast):
    """Seconds of each call of the program before the pass, forward and backward, in its order."""
    program = session(fast).all[0].canonical
    found = roofline(torch.device("cpu"), torch.float64).seconds(profile(program))
    seconds = [FORWARDS * found[i] for i, n in enumerate(program.graph.nodes) if i in found]
    return [seconds[0] * 2 / 3, *seconds[1:]]  # the input takes no gradient, which is one product less


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_slowest_stage_of_a_chain_is_the_fastest_that_there_is(stages):
    model, args, _ = made("chain")
    fast = cut(model, args, stages=stages)
    seconds = costs(fast)
    best = min(
        max(sum(seconds[i:j]) for i, j in itertools.pairwise((0, *cuts, len(seconds))))
        for cuts in itertools.combinations(range(1, len(seconds)), stages - 1)
    )
    plan = plan_of(fast, stages=stages)
    assert max(s.seconds for s in plan.stages) == pytest.approx(best, rel=1e-9)
    assert plan.gap >= 0


def test_a_slow_link_is_cut_where_few_bytes_cross():
    model = Chain((8, 64, 64, 2, 64, 8)).double()
    args = (torch.randn(50, 8, dtype=torch.float64),)
    plan = plan_of(cut(model, args, stages=2), stages=2, bandwidth=1e3)
    assert plan.stages[0].sends == plan.stages[0].returns == 50 * 2 * 8
    assert plan.stages[0].seconds > 2 * 50 * 2 * 8 / 1e3


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_says_what_is_sent_and_held(name):
    model, args, stages = made(name)
    fast = cut(model, args, stages=stages)
    plan, taken = plan_of(fast, stages=stages), stage_modules(fast, *args)
    for one, stage, after in zip(plan.stages, taken, taken[1:], strict=False):
        assert one.sends == sum(t.empty().nbytes for t in stage.sends)
        assert one.returns == sum(t.empty().nbytes for t in stage.sends if t.requires_grad)
        assert after.receives == stage.sends
    for one, stage in zip(plan.stages, taken, strict=True):
        assert one.parameters == sum(p.nbytes for p in stage.parameters())
        assert one.held >= 2 * one.parameters


def test_a_value_read_far_on_is_relayed_by_each_stage_between():
    model, args, _ = made("unet")
    fast = cut(model, args, at=("down.1", "down.2", "middle", "up.0", "up.1", "up.2"))
    skips = [len(p.receives) for p in program_of(fast).facts(parts)]
    assert skips == [1, 1, 2, 3, 3, 2, 1]  # what `up` reads is put together before


def test_masks_and_tables_are_made_again_in_each_stage():
    model, args, _ = made("tied")
    fast = cut(model, args, at=("layers.1", "layers.2"))
    received = [{str(n.meta["val"].dtype) for n in p.receives} for p in program_of(fast).facts(parts)]
    assert received[1:] == [{"torch.int64", "torch.bool", "torch.float64"}] * 2  # labels, keep, x
    assert fast.code.count(" = tril(") == fast.code.count(" = cos(") == 3
    assert all(t.shape[-2:] != (7, 7) for s in stage_modules(fast, *args) for t in s.sends)


def test_what_is_made_of_more_bytes_than_it_has_is_sent():
    class Lengths(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x, many):
            share = many.sum(0)  # [4] of [100, 4]
            for layer in self.layers:
                x = layer(x) * share
            return x

    model, args = Lengths(), (torch.randn(3, 4), torch.randint(0, 5, (100, 4)))
    fast = cut(model, args, stages=2)
    assert sorted(tuple(t.shape) for t in stage_modules(fast, *args)[0].sends) == [(3, 4), (4,)]


def test_a_tied_parameter_is_shared_where_that_costs_less():
    model, args, _ = made("tied")
    fast = cut(model, args, stages=2)
    plan = plan_of(fast, stages=2)
    assert plan.shared == (("embed.weight", (0, 1)),)
    assert "embed.weight is shared by the stages 0, 1: its gradient is summed" in str(plan)
    modules = stage_modules(fast, *args)
    for stage in modules:
        assert stage.embed.weight is stage.head.weight is fast.embed.weight


def test_a_tied_parameter_has_its_readers_together_where_that_costs_less():
    model, args, _ = made("again")
    fast = cut(model, args, stages=2)
    free, slow = plan_of(fast, stages=2), plan_of(fast, stages=2, bandwidth=1e6)
    assert {name for name, _ in free.shared} == {"layers.2.bias", "layers.2.weight"}
    assert slow.shared == ()
    assert slow.gap > free.gap


def test_the_memory_of_a_stage_is_kept():
    model = nn.Sequential(nn.Embedding(400, 8), *(nn.Linear(8, 8) for _ in range(8)), nn.Linear(8, 1))
    fast = cut(model, (torch.randint(0, 400, (64, 8)),), stages=2)
    free = plan_of(fast, stages=2)
    most = max(s.held for s in free.stages)
    with pytest.raises(OptionError) as caught:
        plan_of(fast, stages=2, memory="1KiB")
    least = int(re.search(r"the smallest memory that does is (\d+) bytes", str(caught.value))[1])
    assert least < most
    for limit in (least, (least + most) // 2):
        tight = plan_of(fast, stages=2, memory=f"{limit / 2**10}KiB")
        assert max(s.held for s in tight.stages) <= limit
        assert max(s.seconds for s in tight.stages) > max(s.seconds for s in free.stages)
    adam = plan_of(fast, stages=2, optimizer="adam")
    assert adam.stages[0].held == free.stages[0].held + 2 * free.stages[0].parameters


def test_what_several_stages_read_is_held_by_each():
    model, args, _ = made("again")
    plan = plan_of(cut(model, args, stages=2), stages=2)
    assert [s.parameters for s in plan.stages] == [4 * 72 * 8] * 2  # seven linears, one of them in both
    with pytest.raises(OptionError, match="expected 2 stages within"):
        plan_of(cut(model, args, stages=2), stages=2, memory=f"{(plan.stages[1].held - 1) / 2**10}KiB")


def test_microbatches_share_what_is_sent_and_wait_as_1f1b_has_them():
    model, args, _ = made("chain")
    fast = cut(model, args, at=("layers.3",))
    one, two = (plan_of(fast, at=("layers.3",), microbatches=m) for m in (1, 2))
    assert two.stages[0].sends == one.stages[0].sends // 2
    assert two.stages[0].seconds == pytest.approx(one.stages[0].seconds / 2)
    assert two.stages[0].held == one.stages[0].held  # two of half the size
    state = 2 * one.stages[1].parameters
    assert two.stages[1].held - state == (one.stages[1].held - state) // 2


@pytest.mark.parametrize(
    ("options", "flight"),
    [
        ({"schedule": "gpipe"}, (4, 4)), ({"schedule": "1F1B"}, (2, 1)),
        ({"schedule": "Interleaved1F1B", "chunks": 2}, (2, 1)), ({"schedule": "ZBVZeroBubble"}, (4, 3)),
    ],
)  # fmt: skip
def test_what_waits_is_what_the_schedule_has_in_flight(options, flight):
    model, args, _ = made("chain")
    plan = plan_of(cut(model, args, at=("layers.3",)), at=("layers.3",), microbatches=4, **options)
    if options.get("schedule") in ("Interleaved1F1B", "ZBVZeroBubble"):
        from fxaccel.pipeline.orders import order

        flight = order(options["schedule"], 1, 4, 2).in_flight()
    one = plan_of(cut(model, args, at=("layers.3",)), at=("layers.3",), microbatches=1)
    for stage, whole, many in zip(plan.stages, one.stages, flight, strict=True):
        state = 2 * stage.parameters
        assert stage.held - state == many * (whole.held - state) // 4


def test_what_writes_to_a_tensor_and_what_reads_it_stay_together():
    for name, buffer in (("counter", "mean"), ("stepped", "count")):
        model, args, stages = made(name)
        taken = stage_modules(cut(model, args, stages=stages), *args)
        assert [buffer in s.state_dict() for s in taken].count(True) == 1
    model, args, _ = made("residual")
    for stage in stage_modules(cut(model, args, stages=3), *args):
        norms = {n.rpartition(".")[0] for n in stage.state_dict() if "running" in n or "tracked" in n}
        for norm in norms:
            assert {f"{norm}.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} <= set(
                stage.state_dict()
            )


def test_a_region_without_gradients_stays_together():
    model, args, _ = made("regions")
    fast = cut(model, args, stages=3)
    for part in program_of(fast).facts(parts):
        nodes = [n for n in part.program.graph.nodes if n.op == "call_function"]
        inside = [n for n in nodes if Region("grad", 0, (False,)) in n.meta["regions"]]
        assert len(inside) in (0, 4)


def test_autocast_around_the_whole_step_is_entered_by_each_stage():
    model, x = Chain(), torch.randn(6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = cut(model, (x,), stages=2)
        got = seen(fast, (x,))
        want = seen(model, (x,))
    assert fast.code.count("with torch.autocast(") == 2
    assert torch.equal(got[0][0], want[0][0])
    for name, gradient in want[1].items():
        torch.testing.assert_close(got[1][name], gradient)


# -- it declines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stages": 99}, "the step has 14 calls that can be apart, which is too few for 99 stages"),
        ({"at": ("layer.3",)}, r"at names 'layer.3', which is no module of the step and no call of it"),
        ({"at": ("nothing like it",)}, "hint: see the paths"),
        ({"at": ("layer.3",)}, "hint: did you mean 'layers.3'"),
        ({"at": ("layers.0",)}, "at names 'layers.0', with which the step begins anyway"),
        ({"stages": 2, "at": ("layers.2", "layers.3")}, "expected at most 1 cuts for 2 stages"),
        ({"stages": 2, "memory": "1KiB"}, r"expected 2 stages within 1024.0 bytes, came none"),
        (
            {"stages": 3, "schedule": "ZBVZeroBubble"},
            "ZBVZeroBubble has 2 stages on each device, which 3 stages do not give",
        ),
        ({"stages": 3, "microbatches": 2}, "expected at least 3 microbatches for 1F1B on 3 ranks, came 2"),
        ({"stages": 2, "memory": "1KiB"}, r"hint: the smallest memory that does is \d+ bytes a device"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, says):
    model, args, _ = made("chain")
    with pytest.raises(OptionError, match=says):
        cut(model, args, **options)


def test_the_largest_group_is_named_with_its_reason():
    says = "for 9 stages; 3 calls stay together, for they touch a tensor that is written to"
    with pytest.raises(OptionError, match=says):
        cut(*made("counter")[:2], stages=9)


def test_captures_without_gradients_are_left_as_they_are():
    model, args, _ = made("chain")
    fast = fxaccel.accelerate(model.eval(), [Partition(stages=2)])
    with torch.no_grad(), pytest.warns(UserWarning, match="it serves training only"):
        fast(*args)
    assert "stage_" not in fast.code


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "partition takes stages or at"),
        ({"stages": 0}, "stages is 0, expected 1 or more"),
        ({"stages": 2, "microbatches": 0.5}, "microbatches is 0.5, expected 1 or more"),
        ({"stages": 2, "optimizer": "lion"}, "optimizer is 'lion', expected one of none, sgd"),
        ({"stages": 2, "bandwidth": 0.0}, "bandwidth is 0.0, expected bytes a second"),
        ({"stages": 2, "memory": "six"}, "'six', expected bytes"),
        ({"stages": 2, "memory": "0.5"}, "memory is '0.5', expected bytes with a unit"),
        ({"stages": 2, "schedule": "2f2b"}, "expected a schedule of GPipe, 1F1B, .* came '2f2b'"),
        ({"stages": 2, "chunks": 0}, "chunks is 0, expected 1 or more"),
    ],
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        Partition(**options)


def test_a_plan_for_the_memory_of_the_whole_step_is_no_plan_for_stages():
    program = session(cut(*made("chain")[:2], stages=2)).all[0].canonical.copy()
    program.schedule = Schedule()
    with pytest.raises(OptionError, match="a stage has a backward of its own"):
        Partition(stages=2).plan(program)


def test_a_second_run_is_refused():
    program = program_of(cut(*made("chain")[:2], stages=2))
    with pytest.raises(OptionError, match="the step is cut into stages already"):
        Partition(stages=2).plan(program)


# -- values agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_step_in_stages_is_the_step(name):
    model, args, stages = made(name)
    plain = fxaccel.accelerate(model, [], check=False)
    fast = cut(model, args, stages=stages)
    seen(plain, args)
    want = seen(plain, args)
    agree(seen(fast, args), want)
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert "checked against the model" in session(fast).all[0].report.check


def test_one_cut_serves_other_sizes():
    model, args, stages = made("tied")
    fast, plain = cut(model, args, stages=stages), fxaccel.accelerate(model, [], check=False)
    other = tuple(torch.cat([a, a], 0)[:, :5].contiguous() for a in args)
    seen(plain, other)
    agree(seen(fast, other), seen(plain, other))
    assert len(session(fast).all) == 1
    assert stage_modules(fast, *other)[1].receives[0].shape[0] == 6


@pytest.mark.parametrize(
    "passes",
    [
        ["fuse-attention", "fuse-norm"],
        ["layer-norm-to-rms-norm", "fuse-norm"],
        ["replace-linear{structure=low-rank,init=random,share=0.3,even_if_slower=true}"],
    ],
)
def test_other_passes_come_before_it(passes):
    model, args, _ = made("tied")
    fast, plain = (
        fxaccel.accelerate(model, [*passes, *more], check=False, allow="approximate")
        for more in ([Partition(stages=3)], [])
    )
    torch.manual_seed(0)
    seen(plain, args)
    torch.manual_seed(0)
    seen(fast, args)
    fast.load_state_dict(plain.state_dict())
    if passes[0].startswith("replace"):
        factors = dict(plain.named_parameters())
        for name, parameter in fast.named_parameters():
            parameter.data.copy_(factors[name])
    assert len(fast.report()["partition"].applied) == 2
    agree(seen(fast, args), seen(plain, args))


def test_a_step_learns_as_before():
    models = [made("residual")[0] for _ in range(2)]
    args = made("residual")[1]
    fast = cut(models[1], args, stages=3)
    for model in (fxaccel.accelerate(models[0], [], check=False), fast):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.load_state_dict(made("residual")[0].state_dict())
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            model(*args).square().sum().backward()
            optimizer.step()
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_files_hold_the_cuts(tmp_path):
    model, args, stages = made("tied")
    fast = cut(model, args, stages=stages)
    fast.save(tmp_path / "model.fxa")
    again = fxaccel.load(tmp_path / "model.fxa").train()
    assert program_of(again).stages == program_of(fast).stages
    assert again.code == fast.code
    agree(seen(again, args), seen(fast, args))
    assert [list(s.state_dict()) for s in stage_modules(again, *args)] == [
        list(s.state_dict()) for s in stage_modules(fast, *args)
    ]
