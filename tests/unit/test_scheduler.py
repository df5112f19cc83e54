"""Test φ, the replay ratio and the drawn sources of each schedule: the paper's Algorithm 1 and its variants."""

import itertools
import json
import math
from collections import Counter

import pytest

from distillm_cli.config.schedule import OWN_BUFFERED_KINDS, BufferedConfig, kinds_with
from distillm_cli.config.schema import ScheduleConfig
from distillm_cli.rollouts.scheduler import HELD_OUT_LOSS, OUTPUT_LOSS, Source, build_scheduler

FULL = 1000


def sources(scheduler, buffered=FULL):
    return Counter(scheduler.draw(step, buffered) for step in range(scheduler.steps))


def make(steps=20_000, seed=3, epoch_steps=1, **config):
    return build_scheduler(ScheduleConfig(**config), steps=steps, seed=seed, epoch_steps=epoch_steps)


def test_kinds_that_buffer_own_outputs_match_their_classes():
    by_class = kinds_with(lambda kind: issubclass(kind, BufferedConfig) and not kind.drafts)
    assert by_class == OWN_BUFFERED_KINDS


def observe(scheduler, valid_loss, **figures):
    """Pass a validation to the schedule; return whether φ rose."""
    before = scheduler.phi
    scheduler.observe(valid_loss, figures)
    return scheduler.phi > before


def is_close(count, expected, n):
    """Return whether the count is within four standard deviations of the binomial mean."""
    share = expected / n
    return abs(count - expected) <= 4 * math.sqrt(n * share * (1 - share)) + 1


def test_off_and_on_use_a_single_source():
    assert sources(make(kind="off", steps=500)) == {Source.DATASET: 500}
    assert sources(make(kind="on", steps=500)) == {Source.ROLLOUT: 500}


def test_mixed_schedule_uses_rollouts_with_probability_mix():
    counts = sources(make(kind="mixed", mix=0.3))
    assert is_close(counts[Source.ROLLOUT], 6000, 20_000)
    assert counts[Source.REPLAY] == 0


@pytest.mark.parametrize(
    ("replay", "fresh_share"), [("decreasing", 0.5), ("constant", 0.5), ("increasing", 0.5), ("none", 1.0)]
)
def test_adaptive_splits_between_fresh_and_replayed(replay, fresh_share):
    scheduler = make(kind="adaptive", replay=replay, phi=0.4)
    counts = sources(scheduler)
    assert is_close(counts[Source.DATASET], 12_000, 20_000)
    assert is_close(counts[Source.ROLLOUT], 8_000 * fresh_share, 20_000)


def test_share_of_fresh_rollouts_decreases_or_increases():
    for replay, is_decreasing in (("decreasing", True), ("increasing", False)):
        scheduler = make(kind="adaptive", replay=replay, phi=1.0)
        draws = [scheduler.draw(step, FULL) for step in range(scheduler.steps)]
        first_half, second_half = (sum(d is Source.ROLLOUT for d in part) for part in (draws[:10_000], draws[10_000:]))
        assert (first_half > 2 * second_half) is is_decreasing


def test_no_replay_until_the_buffer_is_full():
    scheduler = make(kind="adaptive", phi=0.5, steps=2000)
    assert sources(scheduler, buffered=999)[Source.REPLAY] == 0
    assert sources(scheduler, buffered=1000)[Source.REPLAY] > 0


def test_replay_without_warm_up_starts_with_any_rollout():
    scheduler = make(kind="adaptive", phi=0.5, steps=2000, warm_up="none")
    assert sources(scheduler, buffered=0)[Source.REPLAY] == 0
    assert sources(scheduler, buffered=8)[Source.REPLAY] > 0


@pytest.mark.parametrize("anneal", ["linear", "exponential", "sigmoid"])
def test_annealing_moves_dataset_share_from_one_to_zero(anneal):
    scheduler = make(kind="annealed", anneal=anneal)
    shares = [1 - scheduler.student_probability(step) for step in range(0, scheduler.steps, 100)]
    assert shares[0] > 0.99
    assert shares[-1] < 0.02
    assert all(a >= b for a, b in itertools.pairwise(shares))


def test_phi_rises_relative_to_loss_at_last_rise():
    scheduler = make(epsilon=0.1)
    rises = [observe(scheduler, loss) for loss in (2.0, 1.5, 2.09, 2.1, 2.15, 2.2)]
    assert rises == [False, False, False, True, False, True]
    assert scheduler.phi == pytest.approx(0.2)


def test_phi_rises_relative_to_previous_loss():
    scheduler = make(epsilon=0.1, reference="previous")
    rises = [observe(scheduler, loss) for loss in (2.0, 1.5, 1.6, 1.65, 1.75, 1.0, 1.1)]
    assert rises == [False, False, True, False, True, False, True]


def test_phi_starts_at_its_setting_and_is_at_most_one():
    scheduler = make(phi=0.85, levels=10, epsilon=0.0)
    assert [observe(scheduler, 1.0) for _ in range(5)] == [False, True, True, False, False]
    assert scheduler.phi == 1.0


def test_draws_depend_only_on_seed_and_step():
    first, second = make(phi=0.5), make(phi=0.5)
    observe(first, 1.0), observe(first, 2.0)
    second.load_state_dict(first.state_dict())
    assert second.phi == first.phi == pytest.approx(0.6)
    steps = [700, 3, 19_999, 3]
    assert [first.draw(s, FULL) for s in steps] == [second.draw(s, FULL) for s in steps]
    other = make(seed=4, phi=0.6)
    assert [other.draw(s, FULL) for s in range(200)] != [first.draw(s, FULL) for s in range(200)]


def test_other_schedules_ignore_validation():
    scheduler = make(kind="mixed")
    assert not observe(scheduler, 1.0)
    assert not observe(scheduler, 9.0)
    assert scheduler.phi == 0


def test_gap_sets_phi_to_the_share_of_the_loss_on_outputs():
    scheduler = make(trigger="gap")
    assert scheduler.config.measures == {HELD_OUT_LOSS, OUTPUT_LOSS}
    scheduler.observe(1.0, {HELD_OUT_LOSS: 0.6, OUTPUT_LOSS: 0.8})
    assert scheduler.phi == pytest.approx(0.25)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 0.9, OUTPUT_LOSS: 0.8})
    assert scheduler.phi == 0, "outputs are no harder than held-out rows"


def test_auto_sets_phi_to_the_future_value_of_rows():
    scheduler = make(kind="auto", rollout_cost=2.0, steps=1000)
    assert scheduler.config.measures == {HELD_OUT_LOSS}
    for _ in range(100):
        scheduler.record(Source.DATASET, 0.3)
    for _ in range(50):
        scheduler.record(Source.REPLAY, 9.0)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 0.5})
    # r fell to 0.6 in 100 steps on rows, and 850 steps remain: the mean of a sum in place of the integral
    future = [0.6 * 0.6 ** (step / 100) for step in range(850)]
    assert scheduler.phi == pytest.approx(1 - 2 * sum(future) / 850, abs=2e-3)
    before = scheduler.phi
    scheduler.observe(1.0, {HELD_OUT_LOSS: 5.0})
    assert scheduler.phi == before, "no step on rows since then"
    scheduler.record(Source.DATASET, 0.9)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 0.9})
    assert scheduler.phi == 0, "rows are as hard as held-out rows"
    scheduler.record(Source.DATASET, 0.0)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 0.7})
    assert 0.9 < scheduler.phi < 1, "some steps on rows remain"


def test_auto_waits_if_few_steps_remain():
    """Check two runs with the same losses: only the longer one will use up its rows."""
    short, long = (make(kind="auto", rollout_cost=2.0, steps=steps) for steps in (120, 2000))
    for scheduler in (short, long):
        for _ in range(100):
            scheduler.record(Source.DATASET, 0.6)
        scheduler.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert short.phi == 0
    assert long.phi > 0.7


def test_auto_waits_for_a_pass_over_the_rows():
    few, many = (make(kind="auto", rollout_cost=2.0, steps=1000, epoch_steps=steps) for steps in (100, 101))
    for scheduler in (few, many):
        for _ in range(100):
            scheduler.record(Source.DATASET, 0.3)
        scheduler.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert few.phi > 0.7
    assert many.phi == 0
    many.record(Source.DATASET, 0.3)
    many.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert many.phi > 0.7


@pytest.mark.parametrize(("ratio", "phi"), [(0.374, 0.252), (0.376, 0.0)])
def test_auto_has_no_phi_below_a_quarter(ratio, phi):
    """Check φ = 1 − 2·r, since no steps remain, on both sides of the smallest φ."""
    scheduler = make(kind="auto", rollout_cost=2.0, steps=100)
    for _ in range(100):
        scheduler.record(Source.DATASET, ratio)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert scheduler.phi == pytest.approx(phi)


def test_auto_lowers_phi_at_once_if_student_outputs_repeat_the_rows():
    scheduler = make(kind="auto", rollout_cost=2.0, steps=1000)
    scheduler.record(Source.DATASET, 0.1)
    scheduler.observe(1.0, {HELD_OUT_LOSS: 1.0})
    before = scheduler.phi
    for _ in range(3):
        scheduler.record(Source.ROLLOUT, 9.0, 0.95)
    assert scheduler.phi == before > 0.9, "three batches say too little"
    scheduler.record(Source.ROLLOUT, 9.0, 0.95)
    assert scheduler.phi == 0, "0.19 is less than a quarter"
    other = make(kind="auto", rollout_cost=2.0, steps=1000)
    other.load_state_dict(scheduler.state_dict())
    for one in (scheduler, other):
        one.record(Source.ROLLOUT, 9.0, 0.7)
    assert scheduler.phi == other.phi == pytest.approx(before * 0.1 / 0.25)


def test_auto_lowers_phi_if_student_outputs_repeat_the_rows():
    plain, repeating = (make(kind="auto", rollout_cost=2.0, steps=1000) for _ in range(2))
    for scheduler, shares in ((plain, (0.7, 0.5)), (repeating, (0.8, 1.0))):
        for repeats in shares:
            scheduler.record(Source.DATASET, 0.1)
            scheduler.record(Source.ROLLOUT, 9.0, repeats)
        scheduler.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert plain.phi > 0.9, "0.4 of the outputs are new, which is enough"
    assert repeating.phi == pytest.approx(plain.phi * 0.1 / 0.25)
    before = repeating.phi
    repeating.record(Source.DATASET, 0.1)
    repeating.observe(1.0, {HELD_OUT_LOSS: 1.0})
    assert repeating.phi == pytest.approx(before, rel=0.1), "without outputs the share is that of before"


def gain_run(scheduler, fall_per_cost):
    """Return φ of each period of 100 steps; the held-out loss falls by ``fall_per_cost(φ)`` per unit of cost."""
    loss, phis = 10.0, []
    scheduler.observe(1.0, {HELD_OUT_LOSS: loss})
    for _ in range(40):
        phis.append(scheduler.phi)
        rollouts = round(100 * scheduler.phi)
        for step in range(100):
            scheduler.record(Source.ROLLOUT if step < rollouts else Source.DATASET, 1.0)
        loss *= 1 - fall_per_cost(scheduler.phi) * (100 - rollouts + 2 * rollouts)
        scheduler.observe(1.0, {HELD_OUT_LOSS: loss})
    return phis


@pytest.mark.parametrize(("slope", "expected"), [(1e-4, 1.0), (-1e-4, 0.0)])
def test_gain_moves_phi_to_the_source_with_the_larger_gain(slope, expected):
    phis = gain_run(make(trigger="gain", phi=0.5), lambda phi: 2e-4 + slope * phi)
    assert phis[0] == pytest.approx(0.4)
    assert phis[1] == pytest.approx(0.6)
    assert abs(phis[-1] - expected) <= 0.2 + 1e-9
    assert all(0 <= phi <= 1 for phi in phis)


@pytest.mark.parametrize(
    "settings", [{"trigger": "gap", "phi": 0.3}, {"trigger": "gain", "phi": 0.3}, {"kind": "auto"}]
)
def test_state_of_a_schedule_with_phi_round_trips(settings):
    first, second = make(**settings), make(**settings)
    for loss in (1.0, 0.9):
        first.record(Source.DATASET, 0.4)
        first.observe(1.0, {HELD_OUT_LOSS: loss, OUTPUT_LOSS: 1.2})
        first.record(Source.DATASET, 0.5)
        first.record(Source.ROLLOUT, 0.5, 0.9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for scheduler in (first, second):
        scheduler.record(Source.DATASET, 0.3)
        scheduler.observe(1.0, {HELD_OUT_LOSS: 0.8, OUTPUT_LOSS: 1.0})
    assert first.phi == second.phi
    assert first.state_dict() == second.state_dict()
