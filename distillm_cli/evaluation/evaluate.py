"""A model on a suite: one pass of generation per seed, each scored, and their mean ± standard deviation.

The paper's way (METHODS D) is in the defaults of ``schema.Eval``: sampled at T = 1 with five seeds, ROUGE-L the best over a
row's references, mean over rows, mean ± sd over seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillm_cli.config import schema
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.errors import DataError
from distillm_cli.evaluation.metrics import METRICS, Count, Metric, metric_of, ratio, undefined_on
from distillm_cli.evaluation.reasoning import without_reasoning
from distillm_cli.evaluation.suites import Suite
from distillm_cli.rollouts.sampler import Decoder, SampledOutput, Sampling, sample_all
from distillm_cli.training.events import Listener, Warned, silent

GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Score:
    """Hold one metric: mean and sample standard deviation over passes (0 for a single pass), and each pass's value.

    signature: how it was computed, where a library has words for that (``metrics.Metric``). undefined: why the metric gives
    nothing on these rows, and what to use instead; its figures are None then.
    """

    mean: float | None
    sd: float | None
    seeds: dict[str, float | None]
    signature: str | None = None
    undefined: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Its object in the suite's."""
        told = {"mean": self.mean, "sd": self.sd, "seeds": self.seeds}
        if self.undefined is not None:
            told |= {"undefined": self.undefined}
        return told if self.signature is None else told | {"signature": self.signature}


@dataclass(frozen=True, slots=True)
class Answer:
    """Hold one row's response. tokens: how many, end-of-sequence included. entropy: their mean, nats.

    text: what is scored. output: the whole response, reasoning and structural special tokens included. counts: by metric,
    what the row adds to a figure (see ``metrics.ratio``); none for the figures of a whole set.
    """

    text: str
    output: str
    tokens: int
    complete: bool
    entropy: float
    counts: dict[str, Count]


@dataclass(frozen=True)
class SuiteResult:
    """Hold the scores of a model on one suite.

    prompts: each row's, as text. references: each row's accepted responses, as they are compared. answers: by pass ("10",
    "20", … or "greedy"), in the order of ``suite.rows``. tasks: the scores by kind of task, where rows carry one. tokens:
    generated over all passes. seconds: spent generating.
    entropy: mean over those tokens of the entropy of the model's next-token distribution (temperature 1), nats.
    complete: the share of answers that ended by themselves, 0 to 1.
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
    entropy: float
    complete: float

    @property
    def outputs(self) -> dict[str, list[str]]:
        """The texts alone, by pass."""
        return {name: [answer.text for answer in said] for name, said in self.answers.items()}

    def as_json(self) -> dict[str, Any]:
        """The suite's object in ``distillm eval --json`` and in ``results.json``."""
        found: dict[str, Any] = {"rows": len(self.suite.rows)}
        found |= {name: score.as_json() for name, score in self.scores.items()}
        rate = round(self.tokens / max(self.seconds, 1e-9), 1)
        found |= {"tokens": self.tokens, "tokens_per_s": rate, "seconds": round(self.seconds, 3)}
        found |= {"entropy": self.entropy, "complete": self.complete}
        if self.tasks:
            found["tasks"] = {
                task: {name: {"mean": s.mean, "sd": s.sd} for name, s in scores.items()}
                for task, scores in self.tasks.items()
            }
        return found


def evaluate(
    decoder: Decoder,
    encoder: Encoder,
    suite: Suite,
    config: schema.EvalConfig,
    listener: Listener = silent,
    *,
    skip_long: bool = False,
) -> SuiteResult:
    """Scores a model on a suite as ``config`` says. The encoder's tokenizer is the model's.

    skip_long: rows whose prompt leaves no room for a response in the model's context are left out, with a warning;
    otherwise the first of them is a DataError that names the row. Other responses are cut at the context.
    """
    suite, prompts = fitting(suite, encoder, decoder.context, listener, skip_long=skip_long)
    references = [_scored(encoder.references(row), config) for row in suite.rows]
    answers: dict[str, list[Answer]] = {}
    seconds = 0.0
    for name, seed, sampling in passes(config):
        task = f"{suite.name}, {name if name == GREEDY else f'seed {name}'}"
        began = time.monotonic()
        said = dict(
            sample_all(
                decoder,
                prompts,
                sampling,
                seed=seed,
                batch_size=config.batch_size,
                listener=listener,
                task=task,
                entropy=True,
            )
        )
        seconds += time.monotonic() - began
        answers[name] = [
            _answer(encoder.decode(prompts[i], said[i].tokens), said[i], references[i], config)
            for i in range(len(suite.rows))
        ]
    every = [answer for one_pass in answers.values() for answer in one_pass]
    tokens = sum(answer.tokens for answer in every)
    return SuiteResult(
        suite=suite,
        config=config,
        template=encoder.template,
        scores=_scores(config, answers, references),
        tasks=_by_task(config, answers, suite.rows, references),
        prompts=[encoder.renderer.prompt(row) for row in suite.rows],
        references=references,
        answers=answers,
        tokens=tokens,
        seconds=seconds,
        entropy=sum(answer.entropy * answer.tokens for answer in every) / tokens,
        complete=sum(answer.complete for answer in every) / len(every),
    )


def passes(config: schema.EvalConfig) -> list[tuple[str, int, Sampling]]:
    """(name, seed, sampling) of each pass: one per seed, or a single one named ``greedy`` that has no randomness."""
    shared = {"max_new_tokens": config.max_new_tokens, "no_repeat_ngram_size": config.no_repeat_ngram_size}
    if config.greedy or config.temperature == 0:
        return [(GREEDY, 0, Sampling(temperature=0.0, **shared))]
    sampling = Sampling(config.temperature, config.top_p, config.top_k, **shared)
    return [(str(seed), seed, sampling) for seed in dict.fromkeys(config.seeds)]


def fitting(
    suite: Suite, encoder: Encoder, context: int | None, listener: Listener = silent, *, skip_long: bool = False
) -> tuple[Suite, list[np.ndarray]]:
    """The suite with its prompts as token ids, each with room for at least one token of a response in ``context``."""
    prompts = encoder.prompts(suite.rows)
    kept = [i for i, prompt in enumerate(prompts) if context is None or len(prompt) < context]
    if len(kept) == len(prompts):
        return suite, prompts
    long = sorted(set(range(len(prompts))) - set(kept))
    whats = [
        f"{suite.rows[i].where}: a prompt of {len(prompts[i]):,} tokens leaves no room for a response in the model's "
        f"{context:,} positions"
        for i in long
    ]
    if not skip_long or not kept:
        hint = "use a model with a longer context" + ("" if skip_long else ", or leave such rows out: --skip-bad-rows")
        raise DataError(whats[0], where=suite.source, hint=hint)
    for what in whats[:3]:
        listener(Warned(f"skipped {what}"))
    if len(long) > 3:
        listener(Warned(f"skipped {len(long):,} of the {len(prompts):,} rows of {suite.name} for that reason"))
    return suite.keep(kept), [prompts[i] for i in kept]


def _scored(texts: SequenceOf[str], config: schema.EvalConfig) -> tuple[str, ...]:
    """Return texts as they are compared."""
    return tuple(map(without_reasoning, texts)) if config.strip_reasoning else tuple(texts)


def _answer(output: str, said: SampledOutput, references: SequenceOf[str], config: schema.EvalConfig) -> Answer:
    (text,) = _scored([output], config)
    metrics = [metric_of(name, config.rouge_tokenizer) for name in config.metrics]
    counts = {metric.name: metric.count(text, references) for metric in metrics if metric.count is not None}
    return Answer(text, output, len(said.tokens), said.complete, float(said.entropy), counts)


def _scores(
    config: schema.EvalConfig, answers: Mapping[str, SequenceOf[Answer]], references: SequenceOf[SequenceOf[str]]
) -> dict[str, Score]:
    found = {}
    for name in config.metrics:
        if (why := undefined_on(name, references, config.rouge_tokenizer)) is not None:
            found[name] = Score(None, None, dict.fromkeys(answers), METRICS[name].signature, why)
            continue
        seeds = {key: _figure(METRICS[name], said, references) for key, said in answers.items()}
        values = list(seeds.values())
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = Score(statistics.fmean(values), spread, seeds, METRICS[name].signature)
    return found


def _figure(metric: Metric, said: SequenceOf[Answer], references: SequenceOf[SequenceOf[str]]) -> float:
    """Of one pass over a set."""
    if metric.count is not None:  # counted already
        return ratio(answer.counts[metric.name] for answer in said)
    return metric.figure([answer.text for answer in said], references)


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
            {name: [said[i] for i in picked] for name, said in answers.items()},
            [references[i] for i in picked],
        )
        for task, picked in sorted(members.items())
    }
