"""Test the router's auxiliary loss against transformers, and which models have one."""

from __future__ import annotations

import pytest
import torch

from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models import router
from distillm_cli.models.backbone import Backbone
from distillm_cli.training.events import Note, Warned
from tests import command_line, families, tiny
from tests.codes import raises_code

WITH_LOSS = ("mixtral", "qwen2_moe", "gpt_oss", "phimoe", "ernie4_5_moe")


def _backbone(family: str, **fields) -> Backbone:
    return Backbone(families.model(family, **fields), tiny.tokenizer(size=families.VOCAB))


@pytest.mark.parametrize("family", WITH_LOSS)
def test_loss_and_gradients_match_transformers(family):
    student = _backbone(family, router_aux_loss_coef=0.3, output_router_logits=True)
    batch = tiny.batch([(5, 3), (2, 4), (1, 2)], families.VOCAB)
    mask_BT = router.attention_mask(batch)
    labels_BT = torch.full_like(batch.ids_BT, -100)
    labels_BT.view(-1)[batch.positions_N] = batch.targets_N
    # transformers shifts the labels, so they are moved one position to the right, with one more column.
    ids_BT, mask_BT, labels_BT = (
        torch.nn.functional.pad(x, pad, value=value)
        for x, pad, value in ((batch.ids_BT, (0, 1), 0), (mask_BT, (0, 1), 0), (labels_BT, (1, 0), -100))
    )
    expected_output = student.model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT, use_cache=False)
    expected_output.loss.backward()
    expected = {
        name: weight.grad.clone() for name, weight in student.model.named_parameters() if weight.grad is not None
    }
    student.model.zero_grad()

    weight = router.set_router_loss("auto", student)
    objective = StudentLoss(student, CrossEntropy(), router_aux=weight).train()
    student.model.eval()  # no dropout; the loss itself stays in training mode
    loss, _ = objective([batch], None, CROSS_ENTROPY, scale=1 / batch.tokens)
    loss.backward()
    assert weight == 0.3
    torch.testing.assert_close(loss, expected_output.loss, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(student.model.get_parameter(name).grad, gradient, atol=1e-5, rtol=1e-3)


def test_attention_mask_ends_with_each_row():
    batch = tiny.batch([(3, 2), (1, 2), (2, 4)], families.VOCAB)
    assert router.attention_mask(batch).sum(1).tolist() == [4, 2, 5]


def test_validation_loss_excludes_the_router_loss():
    student = _backbone("mixtral")
    batch = tiny.batch([(5, 3)], families.VOCAB)
    weight = router.set_router_loss(0.5, student)
    plain, balanced = (StudentLoss(student, CrossEntropy(), router_aux=w) for w in (0.0, weight))
    losses = {w: o.eval()([batch], None, CROSS_ENTROPY)[0].item() for w, o in (("plain", plain), ("with", balanced))}
    assert losses["plain"] == losses["with"]
    assert balanced.train()([batch], None, CROSS_ENTROPY)[0].item() != losses["plain"]


@pytest.mark.parametrize(("is_enabled", "weight"), [(True, 0.2), (False, 0.0)])
def test_auto_weight_follows_the_config(is_enabled, weight):
    events = []
    student = _backbone("mixtral", output_router_logits=is_enabled, router_aux_loss_coef=0.2)
    assert router.set_router_loss("auto", student, events.append) == weight
    assert [type(event) for event in events] == [Note] * is_enabled


def test_router_loss_without_a_router_is_rejected():
    dense = Backbone(tiny.model("llama", families.VOCAB), tiny.tokenizer(size=families.VOCAB))
    for student in (dense, _backbone("deepseek_v2")):
        with raises_code("model.no_router", "objective.router_aux"):
            router.set_router_loss(0.1, student)
    events = []
    dense.model.config.output_router_logits, dense.model.config.router_aux_loss_coef = True, 0.1
    assert router.set_router_loss("auto", dense, events.append) == 0.0
    assert isinstance(events[0], Warned)


def test_router_aux_option_changes_the_loss(tmp_path, capsys):
    data = families.rows(tmp_path / "rows.jsonl")
    argv = ("--data", data, *families.QUICK, "--output", tmp_path / "out", "--overwrite", "--json")
    mixture = families.save(tmp_path / "mixtral", "mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    losses = {}
    for setting in ("auto", "0", "0.5"):
        code, report, err = command_line.call(
            capsys, "sft", "--model", mixture, "--set", f"objective.router_aux={setting}", *argv
        )
        assert code == 0, err
        losses[setting] = report["train_loss"]
    assert losses["auto"] == losses["0.5"] != losses["0"]
    dense = tiny.save(tmp_path / "dense", "llama")
    code, report, _ = command_line.call(capsys, "sft", "--model", dense, "--set", "objective.router_aux=0.5", *argv)
    assert code == 4
    assert "objective.router_aux" in report["message"]
