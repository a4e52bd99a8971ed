"""Fraction of the budget, and the learning rate that depends on it."""

import math

import pytest

from cnf.training.budget import TICKS, Budget


def spend(budget, durations):
    fractions = []
    for seconds in durations:
        budget.spend(seconds)
        fractions.append(budget.fraction)
    return fractions


def test_fraction_of_a_budget_in_steps_is_the_share_of_steps(config):
    budget = Budget(config(steps=4))
    assert not budget.done
    assert spend(budget, [9.0] * 4) == [0.25, 0.5, 0.75, 1.0]
    assert budget.done and budget.seconds == 36.0


def test_fraction_of_a_budget_in_seconds_is_the_share_of_whole_ticks(config):
    budget = Budget(config(seconds=2.0))
    assert spend(budget, [0.004, 0.007, 0.489]) == [0.0, 1 / TICKS, 0.25]
    assert budget.ticks == [2] + [3] * 49
    assert not budget.done
    assert spend(budget, [1.6]) == [1.0]
    assert budget.done and len(budget.ticks) == TICKS


def test_recorded_ticks_reproduce_the_fractions_of_a_budget_in_seconds(config):
    durations = [0.013 * (1 + step % 5) for step in range(60)]
    first = Budget(config(seconds=2.0))
    fractions = []
    while not first.done:
        fractions += spend(first, [durations[first.step]])
    again = Budget(config(steps=first.step, ticks=first.ticks))
    assert spend(again, [0.5] * first.step) == fractions
    assert again.done


def test_cosine_schedule_has_its_closed_form(config):
    budget = Budget(config(steps=100, warmup=0.2))
    budget.fraction = 0.2
    assert budget.lr_factor() == 1.0
    budget.fraction = 0.6
    assert math.isclose(budget.lr_factor(), 0.5)
    budget.fraction = 0.4
    assert math.isclose(budget.lr_factor(), 0.5 + 0.5 * math.cos(math.pi / 4))
    budget.fraction = 1.0
    assert budget.lr_factor() == 0.0


def test_constant_schedule_stays_at_one_after_warmup(config):
    budget = Budget(config(steps=100, warmup=0.1, schedule="constant"))
    spend(budget, [0.0] * 10)
    assert [budget.lr_factor() for _ in spend(budget, [0.0] * 3)] == [1.0] * 3


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warmup_rises_from_above_zero_to_one(config, schedule):
    budget = Budget(config(steps=1000, warmup=0.1, schedule=schedule))
    factors = [budget.lr_factor()]
    for _ in range(100):
        budget.spend(0.0)
        factors.append(budget.lr_factor())
    assert 0 < factors[0] < 0.1
    assert all(low < high for low, high in zip(factors[:-1], factors[1:], strict=True))
    assert factors[-1] == 1.0


def test_schedule_without_warmup_starts_at_the_highest_rate(config):
    assert Budget(config(warmup=0.0)).lr_factor() == 1.0


def test_state_restores_step_seconds_ticks_and_fraction(config):
    first, second = Budget(config(seconds=2.0)), Budget(config(seconds=2.0))
    spend(first, [0.1, 0.2, 0.3])
    second.restore(first.state())
    assert (second.step, second.seconds, second.fraction) == (3, first.seconds, first.fraction)
    assert second.ticks == first.ticks
    assert spend(second, [0.4]) == spend(first, [0.4])


@pytest.mark.parametrize("steps", [5, 60, 1_000])
def test_ticks_of_another_number_of_steps_are_left_out_in_words(steps, config):
    """The learning rate would stay at 0 beyond their end, and not come to 0 before it."""
    ticks = [1 + k // 8 for k in range(TICKS)]  # of 25 steps
    with pytest.warns(UserWarning, match="a record of another number of steps"):
        settings = config(steps=steps, ticks=ticks)
    budget = Budget(settings)
    while not budget.done:
        budget.spend(0.0)
    assert budget.fraction == 1 and settings.ticks is None
    assert config(steps=25, ticks=ticks).ticks == ticks


def test_patience_without_validations_is_refused(config):
    with pytest.raises(ValueError, match="patience=3 counts validations, got validations=0"):
        config(patience=3, validations=0)
