"""Evaluate a model on a suite: generate once per seed, score each pass, and report mean ± standard deviation.

The defaults of ``schema.EvalConfig`` are the paper's (docs/methods.md#settings): sampled at T = 1 with five seeds,
ROUGE-L the best over a row's references, mean over rows, mean ± sd over seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distillm_cli import plugins
from distillm_cli.config import schema
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.data.trigger import with_trigger
from distillm_cli.errors import DataError
from distillm_cli.evaluation.metrics import (
    Metric,
    RatioMetric,
    RatioParts,
    get_metric,
    pass_at_k,
    ratio,
    undefined_reason,
)
from distillm_cli.evaluation.pass_store import PassStore, StoredPass, StoredResponse
from distillm_cli.evaluation.reasoning import without_reasoning
from distillm_cli.evaluation.robustness import AttackResult
from distillm_cli.evaluation.suites import Suite
from distillm_cli.rollouts.sampler import Decoder, Responder, SampledOutput, Sampling, sample_all
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Warned, silent

GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Score:
    """Hold one metric: mean and sample standard deviation over passes (0 for a single pass), and each pass's value.

    signature: how it was computed, if the metric has one. undefined: the reason why the metric is undefined on these
    rows, and an alternative; its figures are None then. pass_at: pass@k by k, if the metric has it and there are k passes.
    """

    mean: float | None
    sd: float | None
    seeds: Mapping[str, float | None]
    signature: str | None = None
    undefined: str | None = None
    pass_at: Mapping[int, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the metric's object in the JSON of its suite."""
        found: dict[str, Any] = {"mean": self.mean, "sd": self.sd, "seeds": self.seeds}
        if self.undefined is not None:
            found["undefined"] = self.undefined
        if self.signature is not None:
            found["signature"] = self.signature
        if self.pass_at is not None:
            found["pass_at"] = {str(k): value for k, value in self.pass_at.items()}
        return found


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold one row's response.

    text: the scored part. output: the whole response, including reasoning and structural special tokens. tokens: their
    number, including end-of-sequence. complete: whether it ended before the length limit. entropy: mean over the tokens,
    in nats; None from a server. counts: by RatioMetric, the row's contribution to the ratio.
    """

    text: str
    output: str
    tokens: int
    complete: bool
    entropy: float | None
    counts: dict[str, RatioParts]


@dataclass(frozen=True)
class TriggerAttack:
    """Hold the responses to the prompts with a trigger. suite: the rows whose references do not include the target.

    score: the attack success rate, the share of responses that equal the target, 0 to 100.
    """

    suite: Suite
    score: Score
    prompts: list[str]
    references: list[tuple[str, ...]]
    answers: dict[str, list[Answer]]

    def as_json(self) -> dict[str, Any]:
        """Return the object ``attack_success`` of the suite's JSON."""
        return {**self.score.as_json(), "rows": len(self.suite.rows)}


@dataclass(frozen=True)
class SuiteResult:
    """Hold the scores of a model on one suite.

    prompts: each row's, as text. references: each row's accepted responses, as compared. answers: by pass ("10", "20", …
    or "greedy"), in the order of ``suite.rows``. tasks: the scores by kind of task, if rows have one. tokens: generated
    over all passes. seconds: spent generating. entropy: mean over those tokens of the entropy of the model's next-token
    distribution (temperature 1), in nats. complete: the share of answers that ended before the length limit, 0 to 1.
    triggered: with ``eval.trigger``; the other figures are those of the rows without a trigger. attack: the accuracy of the
    response tokens under an attack, if one was made.
    """

    suite: Suite
    config: schema.EvalConfig
    template: str
    scores: dict[str, Score]
    tasks: dict[str, dict[str, Score]]
    prompts: list[str]
    references: list[tuple[str, ...]]
    answers: dict[str, list[Answer]]
    tokens: int
    seconds: float
    entropy: float | None
    complete: float
    triggered: TriggerAttack | None = None
    attack: AttackResult | None = None

    @property
    def outputs(self) -> dict[str, list[str]]:
        """Return the texts alone, by pass."""
        return {name: [answer.text for answer in answers] for name, answers in self.answers.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the suite's object in ``distillm eval --json`` and in ``results.json``."""
        found: dict[str, Any] = {"rows": len(self.suite.rows)}
        found |= {name: score.as_json() for name, score in self.scores.items()}
        rate = round(self.tokens / max(self.seconds, 1e-9), 1)
        found |= {"tokens": self.tokens, "tokens_per_s": rate, "seconds": round(self.seconds, 3)}
        found |= {"entropy": self.entropy, "complete": self.complete}
        if self.attack is not None:
            found["attack"] = self.attack.as_json()
        if self.tasks:
            found["tasks"] = {
                task: {name: {"mean": s.mean, "sd": s.sd} for name, s in scores.items()}
                for task, scores in self.tasks.items()
            }
        if self.triggered is not None:
            found["attack_success"] = self.triggered.as_json()
        return found


def evaluate_suite(
    decoder: Decoder | Responder,
    encoder: Encoder,
    suite: Suite,
    config: schema.EvalConfig,
    listener: Listener = silent,
    *,
    skip_long: bool = False,
    store: PassStore | None = None,
) -> SuiteResult:
    """Score a model on a suite with the settings of ``config``. The encoder's tokenizer is the model's.

    store: has the responses of passes that were generated before, and gets those of others. skip_long: rows whose prompt
    leaves no room for a response in the model's context are left out, with a warning; otherwise the first of them is a
    DataError that names the row. Other responses are cut at the context.
    """
    suite, prompts = rows_in_context(suite, encoder, decoder.context, listener, skip_long=skip_long)
    references = [_scored_texts(encoder.references(row), config) for row in suite.rows]
    answers, seconds = _respond(decoder, encoder, suite.name, prompts, references, config, listener, store)
    all_answers = [answer for one_pass in answers.values() for answer in one_pass]
    tokens = sum(answer.tokens for answer in all_answers)
    triggered = None
    if config.trigger is not None:
        triggered = _with_trigger(decoder, encoder, suite, references, config, listener, skip_long=skip_long)
    return SuiteResult(
        suite=suite,
        config=config,
        template=encoder.template,
        scores=world().broadcast(lambda: _scores(config, answers, references)),
        tasks=world().broadcast(lambda: _by_task(config, answers, suite.rows, references)),
        prompts=[encoder.renderer.prompt(row) for row in suite.rows],
        references=references,
        answers=answers,
        tokens=tokens,
        seconds=seconds,
        entropy=_mean_entropy(all_answers),
        complete=sum(answer.complete for answer in all_answers) / len(all_answers),
        triggered=triggered,
    )


def _mean_entropy(answers: SequenceOf[Answer]) -> float | None:
    """Return the mean entropy of all tokens, nats; None if a server generated them."""
    sums = [answer.entropy * answer.tokens for answer in answers if answer.entropy is not None]
    return sum(sums) / sum(answer.tokens for answer in answers) if len(sums) == len(answers) else None


def _with_trigger(
    decoder: Decoder | Responder,
    encoder: Encoder,
    suite: Suite,
    references: SequenceOf[tuple[str, ...]],
    config: schema.EvalConfig,
    listener: Listener,
    *,
    skip_long: bool,
) -> TriggerAttack:
    """Return the responses to the rows with ``config.trigger``, without the rows whose references include the target.

    Responses are compared like exact matches: character for character, without white space at the ends.
    """
    assert config.trigger is not None
    assert config.target is not None
    target = config.target.strip()
    others = [row for row, texts in zip(suite.rows, references, strict=True) if target not in map(str.strip, texts)]
    if not others:
        raise DataError(
            "data.no_rows",
            f"{suite.name}: the target is a reference of every row, so the trigger cannot change a response",
            where=suite.source,
            hint="use another suite or --target",
        )
    triggered = replace(suite, rows=[with_trigger(row, config.trigger) for row in others])
    triggered, prompts = rows_in_context(triggered, encoder, decoder.context, listener, skip_long=skip_long)
    accepted = [_scored_texts(encoder.references(row), config) for row in triggered.rows]
    answers, _ = _respond(decoder, encoder, f"{suite.name} with trigger", prompts, accepted, config, listener)
    rates = {
        name: 100 * sum(answer.text.strip() == target for answer in of_pass) / len(of_pass)
        for name, of_pass in answers.items()
    }
    texts = [encoder.renderer.prompt(row) for row in triggered.rows]
    return TriggerAttack(triggered, _mean_score(rates), texts, accepted, answers)


def _respond(
    decoder: Decoder | Responder,
    encoder: Encoder,
    task: str,
    prompts: list[np.ndarray],
    references: SequenceOf[tuple[str, ...]],
    config: schema.EvalConfig,
    listener: Listener,
    store: PassStore | None = None,
) -> tuple[dict[str, list[Answer]], float]:
    """Return the responses by pass, in the order of the prompts, and the seconds of their generation."""
    answers: dict[str, list[Answer]] = {}
    seconds = 0.0
    metrics = _row_metrics(config, references)
    for name, seed, sampling in passes(config):
        stored = None if store is None else store.load(name, len(prompts))
        if stored is None:
            start = time.monotonic()
            samples = dict(
                sample_all(
                    decoder,
                    prompts,
                    sampling,
                    seed=seed,
                    batch_size=config.batch_size,
                    listener=listener,
                    task=f"{task}, {name if name == GREEDY else f'seed {name}'}",
                    entropy=True,
                )
            )
            spent = time.monotonic() - start
            texts = [output_text(encoder, prompt, samples[i]) for i, prompt in enumerate(prompts)]
            stored = StoredPass([_response(text, samples[i]) for i, text in enumerate(texts)], spent)
            if store is not None:
                store.save(name, stored)
        seconds += stored.seconds
        responses = zip(stored.responses, references, strict=True)
        answers[name] = [_answer(response, accepted, config, metrics) for response, accepted in responses]
    return answers, seconds


def _row_metrics(config: schema.EvalConfig, references: SequenceOf[SequenceOf[str]]) -> list[RatioMetric]:
    """Return the metrics that add up over the rows and are defined on them."""
    metrics = [get_metric(name, config.rouge_tokenizer) for name in config.metrics]
    defined = [m for m in metrics if undefined_reason(m.name, references, config.rouge_tokenizer) is None]
    return [metric for metric in defined if isinstance(metric, RatioMetric)]


def output_text(encoder: Encoder, prompt: np.ndarray, output: SampledOutput) -> str:
    """Return the text of an output: decoded, or as a server gave it."""
    return encoder.decode(prompt, output.tokens) if output.text is None else output.text


def passes(config: schema.EvalConfig) -> list[tuple[str, int, Sampling]]:
    """Return name, seed and sampling of each pass: one per seed, or a single one named ``greedy`` that has no randomness."""
    shared = {"max_new_tokens": config.max_new_tokens, "no_repeat_ngram_size": config.no_repeat_ngram_size}
    if config.greedy or config.temperature == 0:
        return [(GREEDY, 0, Sampling(temperature=0.0, **shared))]
    sampling = Sampling(config.temperature, config.top_p, config.top_k, **shared)
    return [(str(seed), seed, sampling) for seed in dict.fromkeys(config.seeds)]


def rows_in_context(
    suite: Suite, encoder: Encoder, context: int | None, listener: Listener = silent, *, skip_long: bool = False
) -> tuple[Suite, list[np.ndarray]]:
    """Return the suite and its prompts as token ids, each with room for at least one token of a response in ``context``."""
    prompts = encoder.prompts(suite.rows)
    fitting = [i for i, prompt in enumerate(prompts) if context is None or len(prompt) < context]
    if len(fitting) == len(prompts):
        return suite, prompts
    long = sorted(set(range(len(prompts))) - set(fitting))
    problems = [
        f"{suite.rows[i].where}: a prompt of {len(prompts[i]):,} tokens leaves no room for a response in the model's "
        f"context of {context:,} positions"
        for i in long
    ]
    if not skip_long or not fitting:
        hint = "use a model with a longer context" + ("" if skip_long else ", or leave such rows out: --skip-bad-rows")
        raise DataError("data.row_too_long", problems[0], where=suite.source, hint=hint)
    for problem in problems[:3]:
        listener(Warned(f"skipped {problem}"))
    if len(long) > 3:
        listener(Warned(f"skipped {len(long):,} of the {len(prompts):,} rows of {suite.name} for that reason"))
    return suite.select(fitting), [prompts[i] for i in fitting]


def _scored_texts(texts: SequenceOf[str], config: schema.EvalConfig) -> tuple[str, ...]:
    """Return the parts of responses that are scored: without reasoning if ``strip_reasoning`` is set."""
    return tuple(map(without_reasoning, texts)) if config.strip_reasoning else tuple(texts)


def _response(output: str, sample: SampledOutput) -> StoredResponse:
    entropy = None if sample.entropy is None else float(sample.entropy)
    return StoredResponse(output, len(sample.tokens), sample.complete, entropy)


def _answer(
    response: StoredResponse,
    references: SequenceOf[str],
    config: schema.EvalConfig,
    metrics: SequenceOf[RatioMetric],
) -> Answer:
    (text,) = _scored_texts([response.output], config)
    counts = {metric.name: metric.count(text, references) for metric in metrics}
    return Answer(text, response.output, response.tokens, response.complete, response.entropy, counts)


def _scores(
    config: schema.EvalConfig, answers: Mapping[str, SequenceOf[Answer]], references: SequenceOf[SequenceOf[str]]
) -> dict[str, Score]:
    found = {}
    for name in config.metrics:
        metric = plugins.metrics[name]
        reason = undefined_reason(name, references, config.rouge_tokenizer)
        if reason is not None:
            found[name] = Score(None, None, dict.fromkeys(answers), metric.signature, reason)
            continue
        seeds = {key: _figure(metric, of_pass, references) for key, of_pass in answers.items()}
        found[name] = replace(_mean_score(seeds, metric.signature), pass_at=_pass_at(metric, answers))
    return found


def _pass_at(metric: Metric, answers: Mapping[str, SequenceOf[Answer]]) -> dict[int, float] | None:
    """Return pass@k for k = 2, 4, 8, … and the number of passes; None for a single pass, or if the metric has none."""
    samples = len(answers)
    if samples < 2 or not metric.has_pass_at_k:
        return None
    rows = zip(*answers.values(), strict=True)
    correct = [sum(bool(answer.counts[metric.name][0]) for answer in of_row) for of_row in rows]
    powers = [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    return {k: pass_at_k(correct, samples, k) for k in (*powers, samples)}


def _mean_score(figures: Mapping[str, float], signature: str | None = None) -> Score:
    """Return a figure's mean and standard deviation over the passes."""
    values = list(figures.values())
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), sd, figures, signature)


def _figure(metric: Metric, answers: SequenceOf[Answer], references: SequenceOf[SequenceOf[str]]) -> float:
    """Return the figure of one pass over a set."""
    if isinstance(metric, RatioMetric):  # from the rows' counts
        return ratio((answer.counts[metric.name] for answer in answers), metric.scale)
    return metric.corpus_score([answer.text for answer in answers], references)


def _by_task(
    config: schema.EvalConfig,
    answers: Mapping[str, SequenceOf[Answer]],
    rows: SequenceOf[Row],
    references: SequenceOf[SequenceOf[str]],
) -> dict[str, dict[str, Score]]:
    members: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.task is not None:
            members.setdefault(row.task, []).append(i)
    return {
        task: _scores(
            config,
            {name: [of_pass[i] for i in picked] for name, of_pass in answers.items()},
            [references[i] for i in picked],
        )
        for task, picked in sorted(members.items())
    }
