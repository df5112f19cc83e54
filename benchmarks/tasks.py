"""Define the tasks of the comparisons: rows, a teacher, a student's start, decoding settings. All use the command line.

A task stores all results in one directory, and existing results are not computed again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from lab import run, sets

from distillm_cli.config.fields import is_lower_better

SAMPLED = ["--seeds", "10", "--temperature"]
PASSES = {"T=1": [*SAMPLED, "1"], "T=0.5": [*SAMPLED, "0.5"], "greedy": ["--greedy"]}


@dataclass
class Task:
    """Describe one setting in which methods are compared.

    work: its directory. threads: of each run. steps, batch: of a run, optimizer steps and rows. metrics: of the test
    set, the first chooses the learning rate on validation rows. passes: decoding settings of the test set. common:
    arguments of every training. scoring: arguments of every evaluation. student: the model of a start. start_steps,
    start_lr: of the SFT before every method. suite: test set. reference: reference method for differences by seed, if
    seeds differ more than methods.
    """

    name: str
    work: Path
    threads: int
    steps: int
    batch: int
    metrics: tuple[str, ...]
    grid: tuple[str, ...]
    passes: tuple[str, ...]
    common: list[str]
    scoring: list[str]
    student: list[str]
    start_steps: int
    start_lr: str
    suite: str
    teacher_argv: list[str] = field(default_factory=list)
    teacher_path: str | None = None
    reference: str | None = None

    @property
    def lower(self) -> bool:
        """Return whether the first metric is better when it is lower."""
        return is_lower_better(self.metrics[0])

    def run(self, place: Path, argv: list[str]) -> dict:
        return run(place, argv, self.threads)

    def teacher(self) -> str:
        """Return the teacher, which is trained first if it does not exist."""
        if self.teacher_path:
            return self.teacher_path
        place = self.work / "teacher"
        if not (place / "model.safetensors").exists():
            self.run(place, [*self.teacher_argv, "--output", str(place)])
        return str(place)

    def start(self, seed: int) -> Path:
        """Return the student that every method starts from: a short SFT without selection."""
        place = self.work / f"start-{seed}"
        options = ["--steps", str(self.start_steps), "--lr", self.start_lr, "--seed", str(seed), "--overwrite"]
        student = [*self.student, "--tokenizer", self.teacher()]
        self.run(place, ["sft", *student, "--output", str(place), *options, *self.common])
        return place

    def place(self, argv: tuple[str, ...], seed: int, lr: str, steps: int, start: str | None, tag: str | None) -> Path:
        """Return the directory in which ``train`` stores this run."""
        verb, *method = argv
        words = [word for word in method or [verb] if word not in ("--method", "--set")]
        words += [word for word in (start, tag) if word] + [str(seed), lr, str(steps)]
        return self.work / re.sub(r"[^\w.=]+", "_", "-".join(words))

    def has(self, argv, seed: int, lr: str, steps: int, start: str | None, tag: str | None, *_: object) -> bool:
        """Return whether ``train`` with these arguments has a stored result."""
        place = self.place(argv, seed, lr, steps, start, tag)
        return place.with_name(place.name + ".json").exists()

    def train(
        self,
        argv: tuple[str, ...],
        seed: int,
        lr: str,
        steps: int,
        start: str | None = None,
        tag: str | None = None,
        more: tuple[str, ...] = (),
    ) -> tuple[Path, dict]:
        """Run a training from the start of its seed (or from ``start``); return its directory and its ``--json``
        object.

        argv: the verb and the method's arguments, such as ``("distill", "--method", "kd")``. tag: distinguishes it from
        the same run elsewhere. more: further arguments.
        """
        verb, *method = argv
        place = self.place(argv, seed, lr, steps, start, tag)
        origin = start or str(self.start(seed))
        if verb == "sft":
            pair = ["--model", origin, *(["--tokenizer", self.teacher()] if start else [])]
        else:
            pair = ["--teacher", self.teacher(), "--student", origin]
            # bf16 halves the teacher's seconds in methods that sample during training. Methods that can use the states
            # on disk read them.
            pair += sets("teacher.dtype=bf16", f"teacher.cache_dir={self.work / 'cache'}")
        options = ["--steps", str(steps), "--lr", lr, "--seed", str(seed), "--overwrite", *self.common, *more]
        return place, self.run(place, [verb, *method, *pair, "--output", str(place), *options])

    def warm(self, seed: int) -> None:
        """Compute the teacher's states for all training rows on disk, before the first run that reads them."""
        pair = ["--teacher", self.teacher(), "--student", str(self.start(seed))]
        where = sets("teacher.dtype=bf16", "teacher.cache=disk", f"teacher.cache_dir={self.work / 'cache'}")
        options = ["--method", "kd", *where, *self.common, "--steps", str(self.steps)]
        self.run(self.work / "warm", ["distill", *pair, *options, "--warm-teacher-cache"])

    def valid_score(self, result: dict) -> float:
        """Return the figure that selects a learning rate; lower is better."""
        figure = result["report"]["student_after"][self.metrics[0]]
        return figure if self.lower else -figure

    def score(self, place: Path | str, tag: str, name: str) -> dict:
        """Return test figures of one model with one decoding setting. tag: name of the result's file."""
        found = self.work / f"{tag}.test-{name}"
        metrics = [word for metric in self.metrics for word in ("--metric", metric)]
        argv = ["eval", str(place), "--suite", self.suite, *metrics, *PASSES[name], *self.scoring]
        result = self.run(found, [*argv, "--output", str(found)])
        (suite,) = result["suites"].values()
        return suite


def _training(threads: int, batch: int, max_length: int, dtype: str, *fields: str) -> list[str]:
    lengths = ["--batch-size", str(batch), "--max-length", str(max_length), "--dtype", dtype, "--device", "cpu"]
    every = [f"train.threads={threads}", "train.warmup=0.05", "train.select=last", "train.save_steps=100000"]
    return [*lengths, *sets(*every, "eval.no_repeat_ngram_size=0", *fields)]


def g2p(data: Path, work: Path, threads: int, steps: int = 1000) -> Task:
    """Return the task letters → phonemes (CMU dictionary): teacher of 3.2 M parameters, student of 0.23 M."""
    rows, batch = str(data.resolve()), 64
    fields = ["data.template=plain", "train.eval_steps=100", "rollout.max_new_tokens=32"]
    fields += ["eval.max_new_tokens=32", "eval.metrics=[error_rate, exact_match]", "eval.report_rows=1000"]
    fields += ["eval.greedy=true", "eval.batch_size=250"]
    return Task(
        name="g2p", work=work.resolve(), threads=threads, steps=steps, batch=batch, metrics=("error_rate", "exact_match"),
        grid=("1e-3", "2e-3", "4e-3"), passes=("T=1", "T=0.5", "greedy"),
        common=["--data", rows, *_training(threads, batch, 64, "fp32", *fields)],
        scoring=["--batch-size", "250", "--max-new-tokens", "32", "--dtype", "fp32",
                 *sets("eval.no_repeat_ngram_size=0", "data.template=plain", f"train.threads={threads}")],
        student=["--model", "random:2x96"], start_steps=468, start_lr="4e-3", suite=str(Path(rows) / "test.jsonl"),
        teacher_argv=["sft", "--recipe", "g2p-teacher", "--data", rows, *sets(f"train.threads={threads}")],
    )  # fmt: skip


def builtin(work: Path, threads: int, steps: int = 1000) -> Task:
    """Return the task of built-in rows and teacher (0.79 M): student of 0.15 M from scratch; twelve kinds of questions."""
    batch = 16
    fields = [
        "data.template=plain",
        "data.size=8000",
        "train.eval_steps=250",
        "train.betas=[0.9, 0.98]",
    ]
    fields += ["rollout.max_new_tokens=24", "eval.max_new_tokens=24", "eval.metrics=[exact_match]"]
    fields += ["eval.report_rows=500", "eval.greedy=true", "eval.batch_size=250"]
    return Task(
        name="builtin", work=work.resolve(), threads=threads, steps=steps, batch=batch, metrics=("exact_match",),
        grid=("1e-3", "2e-3", "4e-3"), passes=("T=1", "greedy"),
        common=["--data", "builtin", *_training(threads, batch, 64, "fp32", *fields)],
        scoring=["--limit", "1000", "--batch-size", "250", "--max-new-tokens", "24", "--dtype", "fp32",
                 *sets("eval.no_repeat_ngram_size=0", "data.template=plain", f"train.threads={threads}")],
        student=["--model", "random:3x64"], start_steps=2000, start_lr="3e-3", suite="builtin", teacher_path="builtin",
        reference="sft",
    )  # fmt: skip


def dolly(work: Path, threads: int, steps: int = 300) -> Task:
    """Return the task Dolly from scratch, with 2,000 tokens: teacher of 3.7 M parameters, student of 0.65 M.

    With GPT-2's 50,257 tokens two small models would consist almost only of the head.
    """
    fields = ["train.eval_steps=100", "rollout.max_new_tokens=64", "eval.max_new_tokens=64", "eval.metrics=[rouge_l]"]
    fields += ["eval.report_rows=200", "eval.greedy=true", "eval.batch_size=50", "data.valid_limit=200"]
    common = ["--data", "dolly", *_training(threads, 16, 320, "bf16", *fields)]
    scratch = ["--model", "random:4x256", "--tokenizer", "bpe:2000", "--steps", "1500", "--lr", "2e-3"]
    return Task(
        name="dolly", work=work.resolve(), threads=threads, steps=steps, batch=16, metrics=("rouge_l",),
        grid=("1e-3", "2e-3", "4e-3"), passes=("T=1", "greedy"), common=common,
        scoring=["--limit", "500", "--batch-size", "50", "--max-new-tokens", "64", "--dtype", "bf16",
                 *sets(f"train.threads={threads}")],
        student=["--model", "random:2x128"], start_steps=700, start_lr="4e-3", suite="dolly",
        teacher_argv=["sft", *scratch, *common],
    )  # fmt: skip
