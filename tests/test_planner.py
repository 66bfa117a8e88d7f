"""The planner on made-up places whose effects on a model are known."""

import itertools
import math
import random

import pytest

from fxaccel.errors import OptionError
from fxaccel.planner import TRIALS, Alternative, Place, choose, knapsack
from fxaccel.quality import Budget, Measured


class Model:
    """Effects add up over places: weight * error**2; `trials` counts measurements."""

    def __init__(self, weights, factor=1.0):
        self.weights, self.factor, self.trials = weights, factor, 0

    def __call__(self, choice):
        self.trials += 1
        return Measured(self.factor * sum(self.weights[n] * a.error**2 for n, a in choice.items()))


def place(name, cost, *alternatives):
    """Alternatives as (cost, error); bytes are ten times the cost."""
    made = tuple(Alternative(f"{name} at {c}", c, 10 * c, e) for c, e in alternatives)
    return Place(name, cost, 10 * cost, made)


def cost(places, chosen):
    return sum(chosen[p.name].cost if p.name in chosen else p.cost for p in places)


def best(places, model, limit):
    """The least cost within the limit, of all choices there are."""
    found = math.inf
    for one in itertools.product(*[[None, *p.alternatives] for p in places]):
        choice = {p.name: a for p, a in zip(places, one, strict=True) if a is not None}
        if model(choice).value <= limit:
            found = min(found, cost(places, choice))
    return found


def least_effect(places, bytes_to_save):
    found = math.inf
    for one in itertools.product(*[[None, *p.alternatives] for p in places]):
        choice = {p.name: a for p, a in zip(places, one, strict=True) if a is not None}
        saved = sum(p.nbytes - choice[p.name].nbytes for p in places if p.name in choice)
        if saved >= bytes_to_save:
            found = min(found, Model(WEIGHTS)(choice).value)
    return found


PLACES = [
    place("a", 100.0, (50.0, 0.1), (25.0, 0.2), (12.0, 0.4)),
    place("b", 100.0, (50.0, 0.2), (25.0, 0.3), (12.0, 0.45)),
    place("c", 40.0, (20.0, 0.01), (10.0, 0.02), (5.0, 0.3)),
    place("d", 10.0, (5.0, 0.5)),
]
WEIGHTS = {"a": 1.0, "b": 0.1, "c": 2.0, "d": 5.0}


@pytest.mark.parametrize("limit", [0.0, 0.003, 0.01, 0.05, 0.2, 10.0])
def test_the_cheapest_choice_within_the_budget_or_close_to_it(limit):
    model = Model(WEIGHTS)
    found = choose(PLACES, Budget("kl", limit), model, None)
    assert found.decided.value <= limit
    assert found.decided == model(found.chosen)
    assert found.held_out is None
    assert cost(PLACES, found.chosen) <= 1.02 * best(PLACES, Model(WEIGHTS), limit)
    if limit == 10.0:
        assert cost(PLACES, found.chosen) == 12 + 12 + 5 + 5


def test_measurements_are_few():
    places = [place(str(i), 10.0, (5.0, 0.1), (2.0, 0.2), (1.0, 0.3)) for i in range(40)]
    model = Model({str(i): 1.0 for i in range(40)})
    choose(places, Budget("kl", 1.0), model, None)
    assert model.trials <= 40 + TRIALS + 1  # places, whole choices, the last


def change(choice):
    """Effects at right angles, as changes of outputs are."""
    return Measured(math.sqrt(Model(WEIGHTS)(choice).value))


def test_a_change_counts_by_its_square():
    found = choose(PLACES, Budget("change", math.sqrt(0.05)), change, None)
    wanted = choose(PLACES, Budget("kl", 0.05), Model(WEIGHTS), None)
    assert found.chosen == wanted.chosen


def test_what_the_effects_do_together_is_measured_and_not_believed():
    """Together the changes are ten times as bad as each alone."""

    def together(choice):
        return Measured(Model(WEIGHTS)(choice).value * (10 if len(choice) > 1 else 1))

    found = choose(PLACES, Budget("kl", 0.05), together, None)
    assert found.chosen
    assert together(found.chosen).value <= 0.05


def test_calls_that_were_held_out_have_the_last_word():
    harder = Model(WEIGHTS, factor=3.0)
    alone = choose(PLACES, Budget("kl", 0.05), Model(WEIGHTS), None)
    assert harder(alone.chosen).value > 0.05
    found = choose(PLACES, Budget("kl", 0.05), Model(WEIGHTS), harder)
    assert found.held_out is not None
    assert found.held_out.value == harder(found.chosen).value <= 0.05
    assert found.chosen


def test_a_mean_keeps_the_budget_with_two_standard_errors_added():
    def unsure(choice):
        return Measured(Model(WEIGHTS)(choice).value, 0.01 if choice else 0.0)

    found = choose(PLACES, Budget("kl", 0.05), unsure, None)
    assert found.chosen == choose(PLACES, Budget("kl", 0.03), Model(WEIGHTS), None).chosen
    assert not choose(PLACES, Budget("kl", 0.015), unsure, None).chosen


def test_a_size_is_reached_at_the_least_effect():
    total = 4960  # bytes, of which the places hold 2500
    found = choose(PLACES, Budget("size", 0.75), change, None, total)
    saved = sum(p.nbytes - found.chosen[p.name].nbytes for p in PLACES if p.name in found.chosen)
    assert saved >= 0.25 * total
    assert found.decided.value == pytest.approx(math.sqrt(least_effect(PLACES, 0.25 * total)))
    with pytest.raises(OptionError, match=r"bring the model's parameters down to 56%, expected size<=0.5"):
        choose(PLACES, Budget("size", 0.5), change, None, total)


def test_a_place_that_alone_makes_the_model_worthless_stays():
    model = Model({**WEIGHTS, "b": math.inf})
    found = choose(PLACES, Budget("kl", 0.05), model, None)
    assert "b" not in found.chosen
    assert len(found.chosen) >= 2


def test_nothing_to_choose_from_is_no_error():
    found = choose([place("a", 1.0)], Budget("kl", 1.0), Model({}), None)
    assert (found.chosen, found.effects) == ({}, {})


def test_the_effects_that_were_measured_are_kept_for_the_report():
    found = choose(PLACES, Budget("kl", 0.05), Model(WEIGHTS), None)
    probe, seen = found.effects["b"]
    assert probe.error == 0.45  # the coarsest whose effect is still quadratic
    assert seen.value == pytest.approx(0.1 * 0.45**2)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_the_optimum_up_to_its_rounding(seed):
    draw = random.Random(seed)
    options = [
        (str(i), 10.0, [(draw.uniform(-1, 2), draw.uniform(0, 9), (i, j)) for j in range(draw.randint(0, 4))])
        for i in range(5)
    ]

    def best(capacity):
        found = math.inf
        for one in itertools.product(*[[(0.0, v, None), *of] for _, v, of in options]):
            if sum(w for w, _, _ in one) <= capacity:
                found = min(found, sum(v for _, v, _ in one))
        return found

    for capacity in (0.0, 0.5, 3.0):
        chosen = knapsack(options, capacity)
        picked = [next((o for o in of if o[2] == chosen.get(n)), (0.0, v, None)) for n, v, of in options]
        assert sum(w for w, _, _ in picked) <= capacity + 1e-9
        room = capacity - sum(min([0.0, *(w for w, _, _ in of)]) for _, _, of in options)
        assert sum(v for _, v, _ in picked) <= best(capacity - len(options) * room / 1000)
