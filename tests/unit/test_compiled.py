"""The compiled loss: the plain one's numbers, compiled for any sizes and settings, and never in the way."""

import shutil

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.core import criteria, divergences, fused
from distillm_cli.core.compiled import CompiledPart, Shape, Trial, pays, tried
from distillm_cli.core.criterion import CROSS_ENTROPY
from distillm_cli.core.events import Warned
from distillm_cli.core.families import AdaptiveKL, Interpolated
from distillm_cli.core.fused import fused_loss
from distillm_cli.core.objective import Objective
from distillm_cli.core.part import Way, part_loss
from distillm_cli.core.terms import NOTHING, PerToken, Terms
from distillm_cli.models.backbone import Backbone, Head
from tests import tiny

V, CPU = 211, torch.device("cpu")
ALL = [
    ("kl", {}), ("rkl", {}), ("skl", {"alpha": 0.1}), ("srkl", {"alpha": 0.3}), ("jsd", {"beta": 0.1}), ("tvd", {}),
    ("jeffreys", {}), ("ab", {"ab_alpha": 0.2, "ab_beta": 0.7}), ("amid", {}), ("taid", {}), ("atkd", {}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted(CompiledPart):
    """Traced, and run as it was traced: no compiler is needed to see what one would be given."""

    def __init__(self):
        self.graphs = 0

        def backend(graph, inputs):
            self.graphs += 1
            return graph.forward

        super().__init__(backend=backend)


def heads(width=16, dtype=torch.bfloat16):
    torch.manual_seed(0)
    plain = Head((torch.randn(V, width) / 2).to(dtype))
    capped = Head((torch.randn(V, width) / 2).to(dtype), torch.randn(V).to(dtype), scale=0.5, softcap=20.0)
    return plain, capped


@pytest.mark.parametrize("how", [0.0, 0.4])
@pytest.mark.parametrize(("name", "settings"), ALL, ids=[name for name, _ in ALL])
def test_values_and_gradients_are_the_plain_ones(name, settings, how):
    """Through the whole loss: several parts, weights of tokens, a soft cap, a bias."""
    terms = Terms(1 - how, how, divergences.build(schema.Objective(divergence=name, **settings)))
    teacher, student = heads()
    targets, weights = torch.randint(0, V, (23,)), torch.rand(23)
    found = []
    for part in (None, Counted()):
        hidden = (torch.linspace(-1, 1, 23 * 16).reshape(23, 16)).bfloat16().requires_grad_()
        weight, bias = (x.detach().clone().requires_grad_() for x in (student.weight_VD, student.bias_V))
        own = Head(weight, bias, student.scale, student.softcap)
        loss = fused_loss(
            hidden, own, targets, terms=terms, teacher_hidden_ND=hidden.detach().flip(0), teacher_head=teacher,
            per_token=PerToken(weights), chunk=7, part=part,
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    assert part.graphs
    for ours, plain in zip(*reversed(found), strict=True):
        assert_close(ours, plain, rtol=2e-2, atol=2e-3)


def test_what_changes_from_step_to_step_is_compiled_once():
    """Rows, TAID's t, the divergence's weight while it warms up: each new value would otherwise be ten seconds."""
    part, ways = Counted(), (Way(None, 1.0, None), Way(None, 1.0, None))
    for step in range(12):
        rows, progress = 9 - step % 5, step / 12
        product, told = torch.randn(rows, V).bfloat16(), torch.randn(rows, V).bfloat16()
        terms = Terms(0.5 + progress / 2, 0.5 - progress / 2, Interpolated(progress))
        with torch.no_grad():
            part(product, told, torch.arange(rows), NOTHING, ways, terms, torch.float32, product, False)
    assert part.graphs <= 4


def test_a_divergence_that_cannot_be_compiled_is_computed_as_it_is_and_said():
    """The head of adaptive KL is looked for until it is found: no fixed sequence of operations."""
    events = []
    part, ways = CompiledPart("eager", events.append), (Way(None, 1.0, None), Way(None, 1.0, None))
    arguments = [torch.randn(5, V), torch.randn(5, V), torch.arange(5), NOTHING, ways, Terms(1.0, 0.0, AdaptiveKL(0.5))]
    for _ in range(2):
        ours, plain = arguments[0].clone(), arguments[0].clone()
        with torch.no_grad():
            value_R, _ = part(ours, *arguments[1:], torch.float32, ours, False)
            expected_R, _ = part_loss(plain, *arguments[1:], torch.float32, plain, False)
        assert_close(value_R, expected_R, rtol=0, atol=0)
        assert_close(ours, plain, rtol=0, atol=0)
    assert [type(event) for event in events] == [Warned]
    assert "cannot be compiled here" in events[0].text
    assert "is not compiled: that fails here" in str(tried(part, shape(AdaptiveKL(0.5))))


def shape(divergence=None, rows=6):
    ways = (Way(None, 1.0, None), Way(None, 1.0, None))
    terms = Terms(1.0, 0.0, divergence or divergences.SkewKL(0.1))
    return Shape(rows, V, CPU, (torch.bfloat16, torch.bfloat16), ways, terms)


def test_a_part_that_gives_other_numbers_is_not_used():
    class Wrong(CompiledPart):
        def __init__(self):
            super().__init__("eager")
            right = self._compiled

            def wrong(*arguments):
                value_R, more = right(*arguments)
                return value_R * 1.01, more

            self._compiled = wrong

    trial = tried(Wrong(), shape())
    assert not trial.wins
    assert str(trial) == "the loss is not compiled: it then gives other numbers"


def test_the_faster_one_wins_and_a_short_run_does_not_try():
    assert Trial(1e-3, 0.5e-3).wins
    assert not Trial(1e-3, 0.95e-3).wins
    assert str(Trial(1e-3, 0.5e-3)) == "the loss is faster compiled: 0.5 ms a part in the trial, without 1"
    assert str(Trial(1e-3, 2e-3)) == "the loss is no faster compiled: 2 ms a part in the trial, without 1"
    assert not pays(shape(), parts=10)
    assert pays(shape(), parts=1e12)
    assert tried(Counted(), shape()).compiled_s > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_inductor_makes_of_it_has_the_plain_values(monkeypatch):
    """In the loss itself, where the gradient is written over the products that it is made of, part by part."""
    terms, (teacher, student) = Terms(1.0, 0.0, divergences.SkewKL(0.1)), heads()
    monkeypatch.setitem(fused._TABLE_BYTES, "cpu", 4 * 4 * V)  # four rows
    hidden, told = torch.randn(24, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    part = CompiledPart()
    assert tried(part, shape(rows=4)).compiled_s
    found = []
    for way in (None, part):
        mine = hidden.clone().requires_grad_()
        loss = fused_loss(
            mine, student, torch.arange(24), terms=terms, teacher_hidden_ND=told, teacher_head=teacher, chunk=11, part=way
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), mine.grad))
    (expected, expected_grad), (ours, grad) = found
    assert_close(ours, expected, rtol=1e-4, atol=0)
    assert_close(grad, expected_grad, rtol=2e-2, atol=1e-3)


def test_validation_is_not_compiled():
    """It has no gradient, and would be compiled once more for a few batches."""
    tokenizer = tiny.tokenizer()
    objective = Objective(Backbone(tiny.model("llama", len(tokenizer), seed=3), tokenizer), criteria.build(None))
    objective.part, batch = Counted(), tiny.batch([(3, 4), (2, 5)], vocab=len(tokenizer))
    with torch.no_grad():
        held_out, _ = objective([batch], None, CROSS_ENTROPY)
    assert not objective.part.graphs
    in_training, _ = objective([batch], None, CROSS_ENTROPY)
    assert objective.part.graphs
    assert_close(in_training.detach(), held_out, rtol=1e-5, atol=0)


def test_every_run_is_tuned_before_the_same_step(tmp_path):
    """Long or short, resumed before it or not; a run that was resumed after it is not tuned again."""
    from tests.unit.test_engine import build, resume

    def tuned(engine):
        at = []
        engine.tune = lambda: at.append(engine.at.step)
        engine.run()
        return at

    assert tuned(build(tmp_path, method="off", steps=24)) == [20]
    assert tuned(build(tmp_path / "short", method="off", steps=18)) == []
    kept = sorted(tmp_path.glob("step-*"))
    assert tuned(resume(tmp_path, "off", steps=30)) == []
    assert int(kept[-1].name[5:]) > 20


def test_a_resumed_run_computes_as_it_did(tmp_path):
    """Whatever a trial would find now."""
    from tests.unit.test_engine import build, resume

    engine = build(tmp_path, method="off", steps=4)
    engine.objective.part = CompiledPart("eager")
    engine.run()
    assert resume(tmp_path, "off", steps=4).objective.part is not None
    other = tmp_path / "plain"
    build(other, method="off", steps=4).run()
    assert resume(other, "off", steps=4).objective.part is None
