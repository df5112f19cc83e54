"""Compare the seconds of one training step (teacher forward, student forward, loss, backward; no optimizer) with peers.

    python benchmarks/step.py [--peers STEP.py --peers-python PYTHON] [--threads N] [--rounds N] [--json]

Ours is the engine's own path: models loaded as in a run, ``micro_batches``, ``collate``, ``Teacher``, ``Objective``,
bf16 autocast; once with the teacher's forward pass in the step and once with its states cached. It is compared with the
textbook skew KL (both models' whole logits at every position, float32 softmax, mask at the end) and, with ``--peers``,
the functions of that file's ``PEERS``, run in a process of ``--peers-python`` (their libraries may need another
environment): ``peers.pair(V)`` and ``peers.batch(B, P, R, V)`` create models and inputs, ``PEERS[name](teacher,
student, *batch)`` a step.

Teacher GPT-2 124M and student 4 × 384 with random weights, V = 50,257, batch 8, prompt 128, response 64 by default; all
have the same shapes, tokens per step, precision and threads. In every round each runs one step; the first round is a
warm-up, and the best of the others counts. Prints seconds, ratios to both of ours with the goals, and the share of this
machine's bf16 matmul peak (measured in the same rounds) that ours reaches, by this count:

    trunk forward, per layer and position   2 · (non-embedding matrix entries) + 4 · D · T/2   (causal attention)
    head, per supervised token              2 · V · D
    student: three times its forward; teacher: once, its trunk only when uncached

The value of our loss is checked against the textbook's before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

UNCACHED, CACHED, TEXTBOOK = "distillm", "distillm, teacher cached", "textbook skew KL"
GOALS = {  # peer → goal for the speed-up: uncached, cached
    "trl_gkd": (8.0, 14.0),
    "trl_chunked_jsd": (3.5, 6.0),
    "plain_skew_kl": (3.5, 6.0),
    TEXTBOOK: (3.5, 6.0),
}
GOAL_FLOPS = 0.55
ALPHA = 0.1
PEAK_SIZES = (1024, 2048)

Step = Callable[[], float]  # runs one step and returns its seconds


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Ours:
    """Hold a pair of models in the classes of a real run, and one batch of sequences."""

    def __init__(self, shape: argparse.Namespace, directory: Path):
        from distillm_cli.config import schema
        from distillm_cli.losses import objectives
        from distillm_cli.losses.student_loss import StudentLoss
        from distillm_cli.models.pair import load_pair
        from distillm_cli.rollouts.scheduler import Source
        from distillm_cli.teachers.cached import CachedTeacher
        from distillm_cli.teachers.local import LocalTeacher
        from distillm_cli.types import Rollout

        save_models(shape, directory)
        recipe = schema.Recipe(
            method="distillm",
            teacher={"path": str(directory / "teacher"), "dtype": "bf16"},
            student={"path": str(directory / "student"), "dtype": "bf16"},
            objective={"divergence": "skl", "alpha": ALPHA},
        )
        self.device = torch.device("cpu")
        self.pair = load_pair(recipe, device=self.device)
        self.batch_size = shape.batch
        self.student = self.pair.student
        self.teacher = LocalTeacher(self.pair.teacher)
        self.objective = StudentLoss(
            self.student,
            objectives.build(recipe.objective),
            teacher_head=self.teacher.head,
            matmul_dtype=torch.bfloat16,
        ).train()
        self.terms = self.objective.criterion.weights(Source.DATASET)
        random, sizes = np.random.default_rng(0), (shape.prompt, shape.response)
        rows = [[random.integers(0, shape.vocab, n, dtype=np.int32) for n in sizes] for _ in range(shape.batch)]
        self.sequences = [Rollout(prompt, response, row) for row, (prompt, response) in enumerate(rows)]
        self.cached = CachedTeacher(
            self.pair.teacher, mode="memory", caches_rollouts=True
        )  # the first result is cached

    def update(self, teacher) -> float:
        """Run the engine's step, up to the optimizer; return the loss per token."""
        from distillm_cli.types import collate, micro_batches

        self.objective.zero_grad(set_to_none=True)
        count, loss = self.objective.criterion.count(self.sequences), 0.0
        for cuts in micro_batches(self.sequences, self.batch_size):
            batches = [collate(sequences).to(self.device) for sequences in cuts]
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden = [teacher.hidden(batch, sequences) for batch, sequences in zip(batches, cuts, strict=True)]
                part, _ = self.objective(batches, torch.cat(hidden), self.terms, scale=1 / count)
            part.backward()
            loss += part.item()
        return loss

    def textbook(self) -> float:
        """Run the usual implementation of the step, on the same models and tokens."""
        self.objective.zero_grad(set_to_none=True)
        ids_BT = torch.from_numpy(np.stack([np.concatenate([s.prompt, s.response]) for s in self.sequences])).long()
        P, R = len(self.sequences[0].prompt), len(self.sequences[0].response)
        supervised_T = torch.zeros(P + R)
        supervised_T[P - 1 : P + R - 1] = 1
        with torch.autocast(self.device.type, torch.bfloat16):
            z_BTV = self.student.model(input_ids=ids_BT).logits
            with torch.no_grad():
                teacher_z_BTV = self.pair.teacher.model(input_ids=ids_BT).logits
        p, q = (F.softmax(z, -1, dtype=torch.float32) for z in (teacher_z_BTV, z_BTV))
        value_BT = (p * (p.clamp_min(1e-30) / (ALPHA * p + (1 - ALPHA) * q)).log()).sum(-1)
        loss = (value_BT * supervised_T).sum() / (supervised_T.sum() * len(ids_BT))
        loss.backward()
        return loss.item()

    def check(self) -> dict[str, float]:
        """Check that our loss, uncached and cached, equals the textbook's up to bf16 rounding."""
        values = {TEXTBOOK: self.textbook(), UNCACHED: self.update(self.teacher), CACHED: self.update(self.cached)}
        if max(values.values()) > 1.02 * min(values.values()):
            raise SystemExit(f"the losses differ, nothing was measured: {values}")
        return values

    def flops(self, shape: argparse.Namespace, *, cached: bool) -> float:
        T, supervised = shape.prompt + shape.response - 1, shape.batch * shape.response

        def trunk(backbone) -> float:
            config, layers = backbone.model.config, backbone.model.transformer.h
            matrices = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
            return shape.batch * T * (2 * matrices + config.n_layer * 4 * config.n_embd * T / 2)

        def head(backbone) -> float:
            return 2 * supervised * shape.vocab * backbone.model.config.n_embd

        of_teacher = head(self.pair.teacher) + (0 if cached else trunk(self.pair.teacher))
        return 3 * (trunk(self.student) + head(self.student)) + of_teacher


def save_models(shape: argparse.Namespace, directory: Path) -> None:
    """Save two model directories with one vocabulary of generated words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(shape.vocab - 1)} | {"<end>": shape.vocab - 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")), eos_token="<end>")
    ends = {"bos_token_id": shape.vocab - 1, "eos_token_id": shape.vocab - 1}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    for name, (layers, width, heads) in (("teacher", (12, 768, 12)), ("student", (4, 384, 6))):
        size = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": shape.vocab}
        GPT2LMHeadModel(GPT2Config(**size, **ends, **no_dropout)).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


class Peers:
    """Control a process with the peers' environment, which runs the step of a given name."""

    def __init__(self, python: str, file: Path, shape: argparse.Namespace):
        sizes = [f"--{name}={getattr(shape, name)}" for name in ("batch", "prompt", "response", "vocab", "threads")]
        command = [python, __file__, "--serve", str(file), *sizes]
        environment = os.environ | {"OMP_NUM_THREADS": str(shape.threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.names: list[str] = self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peers' process ended with {self.process.wait()}")
        return json.loads(line)

    def step(self, name: str) -> float | None:
        """Return the seconds of a step; None if the peer failed, which it reports on stderr."""
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(file: Path, shape: argparse.Namespace) -> None:
    """Serve ``Peers``: read names on stdin, write seconds on stdout."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(shape.threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # output of libraries must not be read as a result
    spec = importlib.util.spec_from_file_location("peers_step", file)
    peers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peers)
    teacher, student = peers.pair(shape.vocab)
    inputs = peers.batch(shape.batch, shape.prompt, shape.response, shape.vocab)

    def step(name: str) -> float | None:
        def work() -> None:
            student.zero_grad(set_to_none=True)
            peers.PEERS[name](teacher, student, *inputs)

        try:
            return timed(work)
        except Exception as error:  # a peer that is not installed is missing in the table, but does not stop the run
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
            return None

    print(json.dumps(list(peers.PEERS)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(step(line.strip())), file=answers, flush=True)


def matmul_flops(size: int) -> Callable[[], float]:
    """Return the FLOP/s of one bf16 product of two size × size matrices."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    return lambda: 2 * size**3 / timed(lambda: a @ b)


def measure(shape: argparse.Namespace, ours: Ours, peers: Peers | None) -> tuple[dict[str, float], float]:
    """Return the best seconds by name, and the best FLOP/s of a bf16 product."""
    steps: dict[str, Step] = {
        UNCACHED: lambda: timed(lambda: ours.update(ours.teacher)),
        CACHED: lambda: timed(lambda: ours.update(ours.cached)),
        TEXTBOOK: lambda: timed(ours.textbook),
    }
    for name in peers.names if peers else ():
        steps[name] = lambda name=name: peers.step(name)
    matmuls = [matmul_flops(size) for size in PEAK_SIZES]
    best, peak = dict.fromkeys(steps, float("inf")), 0.0
    for round_ in range(shape.rounds + 1):
        for name in list(steps):
            seconds = steps[name]()
            if seconds is None:
                del steps[name], best[name]
            elif round_:
                best[name] = min(best[name], seconds)
        peak = max([peak, *(matmul() for matmul in matmuls for _ in range(3))])
        progress = f"round {round_} of {shape.rounds}" if round_ else "warm"
        print(progress, file=sys.stderr, flush=True)
    return best, peak


def report(shape: argparse.Namespace, ours: Ours, best: dict[str, float], peak: float) -> dict:
    ratios = {
        name: {"uncached": seconds / best[UNCACHED], "cached": seconds / best[CACHED], "goals": GOALS.get(name)}
        for name, seconds in best.items()
        if name not in (UNCACHED, CACHED)
    }
    work = {name: ours.flops(shape, cached=name == CACHED) for name in (UNCACHED, CACHED)}
    use = {name: work[name] / best[name] / peak for name in work}
    sizes = {name: getattr(shape, name) for name in ("batch", "prompt", "response", "vocab", "threads", "rounds")}
    return sizes | {
        "seconds": best, "ratios": ratios, "flop": work, "peak_flops": peak, "flop_use": use,
        "flop_use_goal": GOAL_FLOPS, "torch": torch.__version__,
    }  # fmt: skip


def print_table(result: dict) -> None:
    print("| step | seconds | × uncached | goal | × cached | goal |\n|---|---|---|---|---|---|")
    for name, seconds in result["seconds"].items():
        found = result["ratios"].get(name)
        cells = ["", "", "", ""]
        if found:
            goals = [f"≥ {goal:g}" for goal in found["goals"]] if found["goals"] else ["–", "–"]
            cells = [f"{found['uncached']:.2f}", goals[0], f"{found['cached']:.2f}", goals[1]]
        print(f"| {name} | {seconds:.3f} | {' | '.join(cells)} |")
    use, work, peak = result["flop_use"], result["flop"], result["peak_flops"]
    for name in use:
        goal = f" (goal {GOAL_FLOPS})" if name == UNCACHED else ""
        print(f"{name}: {work[name] / 1e9:.0f} GFLOP, {use[name]:.2f} of {peak / 1e9:.0f} GFLOP/s{goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 8), ("prompt", 128), ("response", 64), ("vocab", 50257), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", type=Path, help="a file with PEERS, pair() and batch()")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter with their libraries")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    shape = parser.parse_args()
    if shape.serve:
        serve(shape.serve, shape)
        return
    torch.set_num_threads(shape.threads)
    from distillm_cli.cli.app import set_environment
    from distillm_cli.utils.memory import keep_freed_memory

    peers = Peers(shape.peers_python, shape.peers, shape) if shape.peers else None
    set_environment()  # as in the program; the peers' process has the original environment
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as directory:
        ours = Ours(shape, Path(directory))
    values = ours.check()
    best, peak = measure(shape, ours, peers)
    if peers:
        peers.close()
    result = report(shape, ours, best, peak) | {"loss": values}
    print(json.dumps(result)) if shape.json else print_table(result)


if __name__ == "__main__":
    main()
