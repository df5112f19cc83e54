"""Test the losses and the queue of DisCo, sentence encoders, and correlations."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from distillm_cli.config.extras import DisCoConfig
from distillm_cli.config.load import resolve
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import ColumnsConfig, DataConfig
from distillm_cli.data.sentences import load_sentences
from distillm_cli.evaluation.pairs import cosine
from distillm_cli.extras.disco import PAIR_SCALE, Distillation, EmbeddingLoss, EmbeddingObjective, PairTuning
from distillm_cli.losses.extra import MicroRows
from distillm_cli.models.loading import load_config
from distillm_cli.models.sentence import load_encoder, pool, read_declared, sentence
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import collate
from distillm_cli.utils.correlation import average_ranks, pearson, spearman
from tests import tiny
from tests.codes import raises_code
from tests.command_line import flags

WIDTH, TEACHER_WIDTH, ROWS = 6, 5, 30
CPU = torch.device("cpu")


class Teacher:
    """Return a fixed random embedding for each row."""

    width = TEACHER_WIDTH

    def __init__(self):
        self.table = F.normalize(torch.randn(ROWS, TEACHER_WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)

    def __call__(self, rows):
        return self.table[list(rows)]


class Student(torch.nn.Module):
    """Return the row of a table for each sentence: its first token."""

    device = CPU

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = torch.nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator))

    def forward(self, batch):
        return self.table[batch.ids_BT[:, 0]]


def part(**fields):
    return Distillation(Teacher(), WIDTH, DisCoConfig(enabled=True, **fields), seed=3)


def micro(*rows):
    return MicroRows(Source.DATASET, [[sentence([row, row], row) for row in rows]])


def step(distillation, student, micros):
    """Run the forward and backward pass of a step, and return its loss."""
    loss = EmbeddingLoss(student, EmbeddingObjective("infonce", "distance"), distillation)
    drawn = loss.begin_step(micros, 0)
    count = sum(len(m.sequences) for m in micros)
    total = 0.0
    for rows, of_micro in zip(micros, drawn, strict=True):
        batches = [collate(group) for group in rows.groups]
        value, size = loss(batches, None, loss.criterion.weights(Source.DATASET), None, 1 / count, drawn=of_micro)
        assert size == len(rows.sequences)
        value.backward()
        total += value.item()
    return total


def plain_infonce(table, weight, scale, rows, queue):
    """Return InfoNCE over the rows of a step as its definition states it, in float64."""
    teacher = Teacher()(range(ROWS)).double()
    losses = []
    for row in rows:
        u = table[row] @ weight.T
        u = u / (u * u).sum().sqrt()
        scores = [(scale * (u * key).sum()).exp() for key in [*teacher[rows], *queue]]
        losses.append(-(scale * (u * teacher[row]).sum()).exp().div(sum(scores)).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("micros", [[(4, 9, 2, 17)], [(4, 9), (2,), (17,)]], ids=["whole", "micro-batches"])
def test_infonce_and_its_gradients_equal_the_definition(micros):
    """Check the loss and the gradients of student, W and τ against float64, also split into micro-batches."""
    distillation, student = part(queue=3, temperature=4.0), Student()
    step(distillation, student, [micro(0, 1, 2, 3, 5)])
    distillation.end_step()
    for parameter in (*distillation.parameters(), *student.parameters()):
        parameter.grad = None
    value = step(distillation, student, [micro(*rows) for rows in micros])

    table = student.table.detach().double().requires_grad_()
    weight = distillation.projection.weight.detach().double().requires_grad_()
    scale = distillation.temperature.detach().double().requires_grad_()
    expected = plain_infonce(table, weight, scale, [4, 9, 2, 17], Teacher()([2, 3, 5]).double())
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for found, exact in (
        (student.table, table),
        (distillation.projection.weight, weight),
        (distillation.temperature, scale),
    ):
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert scale.grad.abs() > 0


def test_mse_is_the_squared_distance_of_unit_vectors():
    distillation, student = part(loss="mse"), Student()
    value = step(distillation, student, [micro(1, 2)])
    u = F.normalize(student.table[[1, 2]] @ distillation.projection.weight.T, dim=1)
    assert value == pytest.approx((u - Teacher()([1, 2])).square().sum(1).mean().item(), rel=1e-5)
    assert distillation.temperature is None
    distillation.end_step()
    assert len(distillation.queue_QD) == 0


@pytest.mark.parametrize("capacity", [0, 3, 7, 50])
def test_queue_is_first_in_first_out_without_gradient(capacity):
    distillation, student = part(queue=capacity), Student()
    seen: list[int] = []
    for rows in ((1, 2, 3), (4, 5), (6, 7, 8, 9), (10,)):
        step(distillation, student, [micro(*rows)])
        assert len(distillation.queue_QD) == min(len(seen), capacity)  # it changes only after the step
        distillation.end_step()
        seen += rows
        assert len(distillation.queue_QD) == min(len(seen), capacity)
        assert torch.equal(distillation.queue_QD, Teacher()(seen[max(0, len(seen) - capacity) :]))
        assert not distillation.queue_QD.requires_grad


def test_failed_step_does_not_change_the_queue():
    distillation, student = part(queue=5), Student()
    step(distillation, student, [micro(1, 2)])
    step(
        distillation,
        student,
        [
            micro(
                3,
            ),
            micro(4),
        ],
    )  # the retry
    distillation.end_step()
    assert torch.equal(distillation.queue_QD, Teacher()([3, 4]))


def test_state_restores_queue_temperature_and_projection():
    distillation, student = part(queue=5), Student()
    step(distillation, student, [micro(1, 2, 3)])
    distillation.end_step()
    with torch.no_grad():
        distillation.temperature.add_(1.5)
        distillation.projection.weight.mul_(2)
    state = {name: tensor.detach().clone() for name, tensor in distillation.trained_state().items()}
    other = part(queue=5)
    other.load_trained_state(state)
    assert other.temperature.item() == distillation.temperature.item() == 21.5
    assert torch.equal(other.queue_QD, distillation.queue_QD)
    assert torch.equal(other.projection.weight, distillation.projection.weight)
    with pytest.raises(ValueError, match="projection"):
        other.load_trained_state(state | {"projection.weight": torch.zeros(2, 2)})


def test_projection_starts_as_an_isometry():
    same = Distillation(type("T", (Teacher,), {"width": WIDTH})(), WIDTH, DisCoConfig(enabled=True), seed=0)
    assert torch.equal(same.projection.weight, torch.eye(WIDTH))
    wider = Distillation(type("T", (Teacher,), {"width": 9})(), WIDTH, DisCoConfig(enabled=True), seed=0)
    weight = wider.projection.weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(WIDTH))
    again = Distillation(type("T", (Teacher,), {"width": 9})(), WIDTH, DisCoConfig(enabled=True), seed=0)
    assert torch.equal(weight, again.projection.weight)


def test_pair_losses_equal_their_definitions():
    a, b, c = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0)).unbind(0)
    scores = [0.1, 0.5, 0.9, 1.0]
    expected = sum((F.cosine_similarity(a[i], b[i], dim=0) - scores[i]) ** 2 for i in range(4))
    torch.testing.assert_close(PairTuning([], scores).loss_of([a, b], scores), expected)
    expected = 0.0
    for i in range(4):
        logits = torch.stack([PAIR_SCALE * F.cosine_similarity(a[i], key, dim=0) for key in (*b, *c)])
        expected -= torch.log_softmax(logits, 0)[i]
    torch.testing.assert_close(PairTuning([], None).loss_of([a, b, c], None), expected, rtol=1e-4, atol=1e-5)


def test_pair_sentences_keep_their_order_when_grouped_by_length():
    student = Student()
    pairs = [
        [sentence([row] * length, row), sentence([row + 1] * (9 - length))] for row, length in enumerate((7, 1, 4))
    ]
    columns = [torch.stack([student.table[row + side] for row in (2, 0, 1)]) for side in (0, 1)]
    tuning = PairTuning(pairs, [0.0, 0.5, 1.0])
    value = tuning.embedding_loss(student, [], [2, 0, 1], 0.5)
    torch.testing.assert_close(value, tuning.loss_of(columns, [1.0, 0.0, 0.5]) * 0.5)


def test_sentence_of_several_pairs_has_an_embedding_in_each():
    student = Student()
    first, second, third = (sentence([row] * 3, row) for row in range(3))
    tuning = PairTuning([[first, second], [first, third], [second, first]], [0.0, 0.5, 1.0])
    columns = [torch.stack([student.table[row] for row in rows]) for rows in ((0, 0, 1), (1, 2, 0))]
    value = tuning.embedding_loss(student, [], [0, 1, 2], 1.0)
    torch.testing.assert_close(value, tuning.loss_of(columns, [0.0, 0.5, 1.0]))


# ---------------------------------------------------------------------------------------------------------- encoders


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_pooling_ignores_padding(tmp_path, pooling):
    """Check the embeddings of a padded batch against each sentence alone, computed from the model's own states."""
    encoder = load_encoder(tiny.save_encoder(tmp_path / "m", pooling=pooling), dtype=torch.float32, device=CPU)
    assert encoder.pooling == pooling
    sequences = encoder.sequences(["a plane", "an", "dogs run in a park"])
    found = encoder.embed(sequences)
    for sequence, embedding in zip(sequences, found, strict=True):
        ids = torch.tensor(np.concatenate([sequence.prompt, sequence.response[:-1]])[None]).long()
        states = encoder.model(input_ids=ids).last_hidden_state[0]
        expected = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
        torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_causal_models_and_encoder_decoders_have_embeddings(tmp_path, family):
    encoder = load_encoder(tiny.save(tmp_path / "m", family), dtype=torch.float32, device=CPU)
    assert encoder.pooling == "mean"
    (sequence, _) = encoder.sequences(["abc", "defghi"])
    found = encoder.embed(encoder.sequences(["abc", "defghi"]))
    ids = torch.tensor(np.concatenate([sequence.prompt, sequence.response[:-1]])[None]).long()
    torch.testing.assert_close(
        found[0], encoder.trunk(input_ids=ids).last_hidden_state[0].mean(0), rtol=1e-4, atol=1e-5
    )
    trained = {name for name, p in encoder.model.named_parameters() if p.requires_grad}
    assert trained
    assert not any("decoder." in name for name in trained if family in tiny.SEQ2SEQ)


def test_pooling_of_states():
    states = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    assert torch.equal(pool(states, mask, "last"), torch.stack([states[0, 1], states[1, 3]]))
    assert torch.equal(pool(states, mask, "mean"), torch.stack([states[0, :2].mean(0), states[1].mean(0)]))


def test_saved_student_has_the_files_of_sentence_transformers(tmp_path):
    """Check the files, and that they are read back the same, with and without a Dense module."""
    encoder = load_encoder(tiny.save_encoder(tmp_path / "m", pooling="cls"), dtype=torch.float32, device=CPU)
    texts = ["a plane", "a dog runs"]
    for name, dense in (("plain", None), ("dense", torch.randn(7, 32))):
        directory = tmp_path / name
        directory.mkdir()
        encoder.save(directory, dense=dense)
        modules = json.loads((directory / "modules.json").read_text())
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        assert kinds == ["Transformer", "Pooling", *(["Dense"] if dense is not None else []), "Normalize"]
        assert all((directory / module["path"]).is_dir() for module in modules)
        pooling = json.loads((directory / "1_Pooling" / "config.json").read_text())
        assert pooling.pop("word_embedding_dimension") == 32
        assert [flag for flag, active in pooling.items() if active] == ["pooling_mode_cls_token"]
        limits = json.loads((directory / "sentence_bert_config.json").read_text())
        assert limits == {"max_seq_length": encoder.max_length, "do_lower_case": False}
        settings = json.loads((directory / "config_sentence_transformers.json").read_text())
        assert settings["similarity_fn_name"] == "cosine"
        again = load_encoder(str(directory), dtype=torch.float32, device=CPU)
        expected = encoder.embed(encoder.sequences(texts))
        expected = expected if dense is None else expected @ dense.T
        torch.testing.assert_close(again.embed(again.sequences(texts)), expected)
        assert again.width == expected.shape[1]


def test_prompt_and_length_are_read_from_the_directory(tmp_path):
    directory = tmp_path / "m"
    tiny.save_encoder(directory)
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 5, "do_lower_case": true}')
    settings = {"prompts": {"query": "q "}, "default_prompt_name": "query"}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(settings))
    encoder = load_encoder(str(directory), dtype=torch.float32, device=CPU)
    (found,) = encoder.sequences(["ABCDE"])
    ids = encoder.tokenizer("q abc")["input_ids"]
    assert found.prompt.tolist() + found.response[:-1].tolist() == ids
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    (again,) = load_encoder(str(tmp_path / "saved"), dtype=torch.float32, device=CPU).sequences(["ABCDE"])
    assert np.array_equal(again.response, found.response)


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        ({"pooling_mode": "mean"}, None),
        ({"pooling_mode": "max"}, "pooling max"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls+mean"),
        ({}, "without its pooling"),
    ],
)
def test_undecided_pooling_is_refused(tmp_path, config, mentions):
    directory = tiny.save_encoder(tmp_path / "m")
    (tmp_path / "m/1_Pooling/config.json").write_text(json.dumps(config))
    if mentions is None:
        assert read_declared(directory).pooling == "mean"
        return
    with raises_code("model.no_pooling", mentions, "disco.pooling=mean"):
        read_declared(directory)
    assert read_declared(directory, pooling="last").pooling == "last"


def test_unknown_modules_are_refused(tmp_path):
    directory = tiny.save_encoder(tmp_path / "m")
    modules = json.loads((tmp_path / "m/modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.CNN"
    (tmp_path / "m/modules.json").write_text(json.dumps(modules))
    with raises_code("model.unsupported_module", "CNN"):
        read_declared(directory)


def test_encoders_have_one_use(tmp_path):
    with raises_code("model.not_causal", "encoder", "DisCo only"):
        load_config(tiny.save_encoder(tmp_path / "m"))


# -------------------------------------------------------------------------------------------------- rows and figures


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentences(path, **columns):
    data = DataConfig(source=path, valid=path, columns=ColumnsConfig(**columns))
    return load_sentences(data, "valid")


def test_rows_are_read_as_sentences(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"sentence1": " a ", "sentence2": "b", "score": 2.5},
        {"sentence1": "a", "sentence2": "b"},
        {"anchor": "a", "positive": "b"},
        {"anchor": "a", "positive": "b", "negative": "c"},
        {"sentence": "a"},
        {"text": "a"},
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
    )
    rows = sentences(path)
    assert [row.sentences for row in rows] == [
        ("a", "b"), ("a", "b"), ("a", "b"), ("a", "b", "c"), ("a",), ("a",), ("a\nb",), ("a",), ("a",)
    ]  # fmt: skip
    assert [row.score for row in rows][:2] == [2.5, None]
    assert [row.sentences for row in sentences(write(tmp_path / "c.jsonl", {"words": "x"}), prompt="words")] == [("x",)]


@pytest.mark.parametrize(
    "row",
    [
        {"sentence1": "a", "sentence2": "b", "score": "high"},
        {"sentence1": "a", "sentence2": "b", "score": True},
        {"sentence1": "a", "sentence2": " ", "score": 1},
        {"sentence1": "a", "sentence2": 3, "score": 1},
        {"sentence1": "a", "sentence2": "b", "score": "nan"},
    ],
)
def test_broken_pairs_name_their_line(tmp_path, row):
    path = write(tmp_path / "rows.jsonl", {"sentence": "a"}, row)
    with raises_code("data.invalid_row", "rows.jsonl:2"):
        sentences(path)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_equal_scipy_also_with_ties(seed):
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=40), generator.integers(0, 6, size=40) + 0.0
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert average_ranks(y).tolist() == stats.rankdata(y).tolist()


def test_correlation_with_a_constant_is_undefined():
    assert spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert pearson([1.0], [2.0]) is None


def test_cosine_of_rows():
    assert cosine(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 2.0], [3.0, 3.0]])) == pytest.approx([0.0, 1.0])


# ------------------------------------------------------------------------------------------------------------ recipe


def disco(*sets, **given):
    return resolve(
        command="distill",
        flags=flags(method="disco", teacher="t", student="s", data="rows.jsonl", **given),
        sets=sets,
    ).recipe


@pytest.mark.parametrize(
    ("setting", "code"),
    [
        ("teacher.cache=disk", "recipe.unused_field"),
        ("teacher.quantize=8bit", "recipe.unused_field"),
        ("objective.divergence=rkl", "recipe.unused_field"),
        ("student.lora.r=4", "recipe.unused_field"),
        ("student.sft_epochs=1", "recipe.unused_field"),
        ("student.tokenizer=bpe:100", "recipe.unused_field"),
        ("data.template=chat", "recipe.unused_field"),
        ("rollout.bulk=2", "recipe.unused_field"),
        ("schedule.kind=on", "recipe.fields_conflict"),
        ("train.select=rouge_l", "recipe.fields_conflict"),
        ("train.select=valid_divergence", "recipe.fields_conflict"),
        ("okd.rank=4", "recipe.unused_field"),
        ("disco.pairs_lr=1", "recipe.unused_field"),
        ("disco.queue=-1", "recipe.invalid_value"),
        ("disco.temperature=0", "recipe.invalid_value"),
    ],
)
def test_settings_that_embeddings_do_not_use_are_refused(setting, code):
    with raises_code(code):
        disco(setting)


def test_kept_projection_excludes_tuning_on_pairs():
    with raises_code("recipe.fields_conflict", "pairs_epochs"):
        disco("disco.keep_projection=true", "disco.pairs_epochs=1")


def test_spearman_selects_embeddings_only():
    assert disco("train.select=spearman").train.select == "spearman"
    with raises_code("recipe.fields_conflict", "spearman"):
        resolve(command="distill", flags=flags(teacher="t", student="s"), sets=["train.select=spearman"])


def test_disco_is_off_elsewhere():
    for name, method in METHODS.items():
        recipe = resolve(command=method.verb, sets=[f"method={name}"]).recipe
        assert recipe.disco.enabled == (name == "disco")
