"""Test which courses of a run raise which alarm, and which raise none."""

import json
import math

import pytest

from distillm_cli.training.alarms import ALARMS, MIN_WATCHED_STEPS, AlarmWatch, History
from distillm_cli.training.events import Stepped, Validated

STEPS = 80  # two in each part of the run


def course(start, end):
    """Return a figure that goes from start to end in a straight line over the run."""
    return lambda progress: start + (end - start) * progress


HEALTHY = {
    "rollout_length": course(30.0, 12.0),
    "rollout_cut": course(1.0, 0.0),
    "rollout_distinct2": course(0.7, 0.95),
    "student_entropy": course(3.0, 0.5),
    "teacher_entropy": course(0.6, 0.4),
    "top16_overlap": course(0.2, 0.6),
    "acceptance": course(0.1, 0.7),
}


FALLING_LOSS = course(2.0, 0.5)


def events(health=None, loss=FALLING_LOSS, valid=(), steps=STEPS):
    """Yield the events of a run. health: figures in place of the healthy ones. valid: (loss, KL) of each validation."""
    valid = list(valid)
    for step in range(1, steps + 1):
        figures = {name: value(step / steps) for name, value in (HEALTHY | (health or {})).items()}
        yield Stepped(step, 0.0, "rollout", loss(step / steps), 1e-3, 1.0, 0.0, 8, 0.1, {}, figures)
        if valid and step % (steps // len(valid)) == 0:
            value, kl = valid[step * len(valid) // steps - 1]
            yield Validated(step, value, 0.0, scores={"kl_teacher_student": kl})


def raised(happened, **history):
    watch = AlarmWatch(History(STEPS, **history))
    for event in happened:
        watch.observe(event)
    return {alarm.name: alarm for alarm in watch.raised}


FALLING = [(3.0, 2.0), (2.0, 1.0), (1.5, 0.7), (1.4, 0.6)]
RISING = [(1.0, 0.5), (1.1, 0.6), (1.2, 0.7), (1.3, 0.8)]
CASES = {
    "outputs_grow": {
        "health": {
            "rollout_length": lambda progress: 5 * math.exp(5 * progress),
            "rollout_cut": lambda progress: min(0.45, max(0.0, 1.5 * progress - 0.5)),
        }
    },
    "outputs_cut": {"health": {"rollout_cut": course(0.9, 0.9)}},
    "outputs_repeat": {"health": {"rollout_distinct2": lambda progress: 0.9 if progress < 0.6 else 0.2}},
    "entropy_collapse": {"health": {"student_entropy": lambda progress: 1.0 if progress < 0.5 else 0.01}},
    "loss_stuck": {"loss": course(2.0, 2.001), "health": {"acceptance": course(0.6, 0.6)}},
    "models_differ": {"health": {"top16_overlap": course(0.2, 0.2), "acceptance": course(0.1, 0.1)}},
    "validation_rises": {"valid": RISING},
}


def test_healthy_run_raises_no_alarm():
    assert raised(events(valid=FALLING)) == {}


@pytest.mark.parametrize("name", CASES)
def test_each_alarm_is_raised_once_with_a_cure(name):
    found = raised(events(**CASES[name]))
    assert found.keys() == {name}
    assert found[name].message
    assert found[name].cure
    assert found[name].step <= STEPS


def test_every_alarm_has_a_case():
    assert ALARMS.keys() == CASES.keys()


@pytest.mark.parametrize(
    ("happened", "history"),
    [
        ({"valid": RISING}, {"selects_best": True}),
        ({"valid": [(1.0, 0.8), (1.1, 0.7), (1.2, 0.6), (1.3, 0.5)]}, {}),  # the student still approaches the teacher
        ({"valid": [(1.0, 0.5), (1.001, 0.501), (1.002, 0.502), (1.003, 0.503)]}, {}),
        (CASES["outputs_cut"], {"cuts_outputs": True}),
        (CASES["outputs_grow"], {"cuts_outputs": True}),
        ({"health": {"rollout_length": course(10.0, 120.0)}}, {}),  # longer, and none of them cut
        ({"loss": course(2.0, 2.001)}, {}),  # the agreement with the teacher rises
        ({"loss": lambda progress: 0.2 + 0.3 * progress * (1 - progress)}, {}),  # with the learning rate
        ({"health": {"top16_overlap": course(0.3, 0.3)}}, {}),  # the acceptance rises
        ({"health": {"student_entropy": course(0.02, 0.01), "teacher_entropy": course(0.1, 0.1)}}, {}),
        ({"health": {"rollout_distinct2": course(0.2, 0.2)}}, {}),  # as at the start
    ],
)
def test_no_false_alarm(happened, history):
    assert raised(events(**happened), **history) == {}


def test_short_run_raises_no_alarm_on_its_steps():
    watch = AlarmWatch(History(MIN_WATCHED_STEPS - 1))
    for event in events(**CASES["outputs_cut"], steps=MIN_WATCHED_STEPS - 1):
        watch.observe(event)
    assert watch.raised == []


def test_watch_continues_from_a_checkpoint():
    happened = [*events(**CASES["outputs_repeat"])]
    whole = raised(happened)
    for split in (1, 33, 70):
        first, second = AlarmWatch(History(STEPS)), AlarmWatch(History(STEPS))
        for event in happened[:split]:
            first.observe(event)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.take() == []
        for event in happened[split:]:
            second.observe(event)
        assert {alarm.name: alarm for alarm in second.raised} == whole
