"""The orders are those that torch runs; what it does not run is refused."""

from types import SimpleNamespace

import pytest
from pipelines import VARIANTS, orders, torch_schedule
from torch.distributed.pipelining.schedules import get_schedule_class

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import ONE, SCHEDULES, TWO, Action, Order, named, order


class Recorder(SimpleNamespace):
    """A stage that computes and sends nothing and remembers what it was told to do."""

    def forward_one_chunk(self, microbatch, *_, **__):
        self.done.append(f"{self.stage_index}F{microbatch}")

    def backward_one_chunk(self, microbatch, **_):
        self.done.append(f"{self.stage_index}B{microbatch}")

    def no_ops(self, _):
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = no_ops

    def perform_reduce_grad(self, _):
        pass


@pytest.mark.parametrize("schedule", ONE)
def test_torchs_loops_of_one_stage_a_rank_do_these_actions(schedule):
    for one in orders(schedule, 1):
        for rank, actions in enumerate(one.ranks):
            count = len(one.ranks)
            stage = Recorder(
                stage_index=rank, num_stages=count, is_first=rank == 0, is_last=rank == count - 1, done=[]
            )
            runs = get_schedule_class(schedule)(stage, one.microbatches)
            runs._initialize_stage = lambda *_: None
            runs._step_microbatches([()] * one.microbatches, [{}] * one.microbatches)
            assert [str(a) for a in actions] == stage.done


@pytest.mark.parametrize(("schedule", "chunks"), [v for v in VARIANTS if v[0] not in ONE])
def test_the_actions_are_those_that_torchs_runtime_goes_through(schedule, chunks):
    for one in orders(schedule, chunks):
        made = torch_schedule(schedule, len(one.ranks), one.microbatches, chunks)
        for rank, actions in enumerate(one.ranks):
            lowered = [a for a in made.pipeline_order_with_comms[rank] if a.is_compute_op]
            assert [str(a) for a in actions] == [str(p) for a in lowered for p in a.sub_actions or [a]]
            pairs = [a for a in lowered if a.sub_actions]
            assert [str(a) for a in actions if a.joined] == [str(a.sub_actions[0]) for a in pairs]
        assert dict(enumerate(one.placement)) == made.stage_index_to_group_rank


def test_an_overlapped_pair_sends_when_both_are_done():
    """What `joined` says: torch sends after the pair, not after its first part."""
    made = torch_schedule("DualPipeV", 2, 8, 2)
    names = [str(a) for a in made.pipeline_order_with_comms[0]]
    at = names.index("(0F3;3B1)OVERLAP_F_B")
    assert names[at + 1 : at + 3] == ["0SEND_F3", "3SEND_B1"]


def test_small_orders_by_hand():
    def text(one):
        return [" ".join(map(str, actions)) for actions in one.ranks]

    assert text(order("gpipe", 2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]
    assert text(order("1f1b", 3, 3)) == [
        "0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1B0 1F2 1B1 1B2", "2F0 2B0 2F1 2B1 2F2 2B2"
    ]  # fmt: skip
    assert text(order("1F1B", 2, 4))[0] == "0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3"
    zero = order("InterleavedZeroBubble", 2, 4)
    assert text(zero)[1] == "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3"
    assert order("ZBVZeroBubble", 3, 6).placement == (0, 1, 2, 2, 1, 0)
    assert order("Interleaved1F1B", 3, 6, 2).placement == (0, 1, 2, 0, 1, 2)


def test_microbatches_in_flight():
    assert order("gpipe", 4, 8).in_flight() == (8, 8, 8, 8)
    assert order("1f1b", 4, 8).in_flight() == (4, 3, 2, 1)
    assert order("InterleavedZeroBubble", 4, 8).in_flight() == (4, 4, 4, 4)
    assert order("ZBVZeroBubble", 4, 8).in_flight() == (8, 7, 6, 5, 4, 3, 2, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_names_in_any_case(name):
    assert named(name.lower()) == named(name.upper()) == name
    assert order(name.lower(), 2, 4) == order(name, 2, 4, 2 if name in TWO else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pipedream", 2, 4), "expected a schedule of GPipe, 1F1B, .* came 'pipedream'"),
        (("1F1B", 4, 3), "expected at least 4 microbatches for 1F1B on 4 ranks, came 3"),
        (("GPipe", 4, 8, 2), "expected 1 stage a rank for GPipe, came 2\nhint: leave chunks out"),
        (("ZBVZeroBubble", 4, 8, 3), "expected 2 stages a rank for ZBVZeroBubble, came 3"),
        (("Interleaved1F1B", 4, 9, 2), "Interleaved1F1B does not run 9 microbatches on 4 ranks: .*rounds"),
        (("InterleavedZeroBubble", 2, 5), "InterleavedZeroBubble does not run 5 microbatches on 2 ranks"),
        (("DualPipeV", 4, 7), "DualPipeV does not run 7 microbatches on 4 ranks: .* 8 stages"),
        (("GPipe", 0, 1), "expected ranks to be a number from 1 on, came 0"),
        (("GPipe", 2, 1.5), "expected microbatches to be a number from 1 on, came 1.5"),
        (("LoopedBFS", 2, 2, 0), "expected chunks to be a number from 1 on, came 0"),
    ],
)
def test_what_does_not_run_is_refused(arguments, words):
    with pytest.raises(OptionError, match=words):
        order(*arguments)


@pytest.mark.parametrize(
    ("actions", "words"),
    [
        (
            [("F", 0, 0)],
            "expected one F and one B or I and W of microbatch 0 on stage 0, came 1 F, 0 B, 0 I, 0 W",
        ),
        ([("F", 0, 0), ("B", 0, 0), ("W", 0, 0)], "came 1 F, 1 B, 0 I, 1 W"),
        ([("F", 0, 0), ("F", 0, 0), ("B", 0, 0)], "came 2 F, 1 B"),
        ([("F", 0, 0), ("B", 0, 0), ("F", 0, 1)], "0F1 is of none of the 1 microbatches"),
        ([("F", 1, 0), ("B", 0, 0)], "rank 0 does 1F0, expected stages that are placed there"),
    ],
)
def test_an_order_of_ones_own_is_checked(actions, words):
    with pytest.raises(OptionError, match=words):
        Order("mine", 1, (0,), (tuple(Action(*a) for a in actions),))
