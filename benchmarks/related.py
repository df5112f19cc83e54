"""Measure the related systems (docs/related.md) on real rows, every model through the command line.

    python benchmarks/related.py okd ctcd mixkd peakd --work DIR --data DIR [--seeds 10 11 12] [--jobs 2]

Each trial trains its arms per seed and prints, per arm, the mean and standard deviation over the seeds, then for each
claim the difference by seed and whether it holds for the mean. Test rows are only scored: settings were chosen on
validation rows, or are the defaults. Results are cached per run: the same command continues an interrupted trial.

okd     kd, OKD and GKD (as many steps as take OKD's seconds); letters → phonemes and banking77, 2,000 rows
ctcd    large alone, small alone, small from the large one (one-way), both together (CTCD); letters → phonemes, 4,000 rows
mixkd   kd (500 steps, and as many as take MixKD's seconds), + TMKD, + SM + TMKD; 2, 10 and 100 % of banking77's rows
peakd   2 layers of the teacher unshared, shared, shared and swapped, + pre-training, and 4 unshared; 2,000 words, 400 steps
kdiga   kd and KDIGA from an adversarially trained teacher and from a plain one; accuracy under PGD; 4,000 words, 500 steps
robustkd  CE, kd and RobustKD from a teacher with a backdoor, on rows of which 5 % have the trigger; banking77
disco   MiniLM-L6 → 3 and 2 layers, 2 epochs: untouched, MSE, CKD, CKD + pairs; Spearman on STS-B; --minilm DIR
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import regimes
from lab import mean_sd, run, sets
from regimes import Regime
from tasks import Task

KD = ("distill", "--method", "kd")
OKD = ("distill", "--method", "okd")
GKD = ("distill", "--method", "gkd")
CALIBRATION_STEPS = 150  # of a run that measures the seconds of a step


@dataclass(frozen=True)
class Claim:
    """State that an arm is better than another in a figure, by at least ``margin`` (in the figure's better direction)."""

    arm: str
    other: str
    figure: str
    margin: float = 0.0
    lower: bool = True

    def gains(self, of_seeds: list[dict[str, dict[str, float]]]) -> list[float]:
        """Return by seed by how much the arm is better."""
        sign = -1 if self.lower else 1
        pairs = [(arms[self.arm][self.figure], arms[self.other][self.figure]) for arms in of_seeds]
        return [sign * (ours - theirs) for ours, theirs in pairs]


@dataclass(frozen=True)
class Trial:
    """Describe a trial: ``measure`` returns figures by arm for a seed; the claims say what would count as success."""

    name: str
    measure: Callable[[int], dict[str, dict[str, float]]]
    claims: tuple[Claim, ...]


def few_words(data: Path, work: Path, rows: int, threads: int) -> Task:
    """Return letters → phonemes with few rows: teacher of 3.2 M parameters of all rows, student after ten epochs of SFT."""
    whole = replace(regimes.g2p(data, work, threads), grid=("4e-3",), passes=("T=1", "greedy"))
    whole.work.mkdir(parents=True, exist_ok=True)
    return Regime(whole, data / "g2p", rows).task


def few_questions(data: Path, work: Path, rows: int, threads: int) -> Task:
    """Return banking77 with few rows: questions → intents in words."""
    whole = replace(regimes.banking77(data, work, threads), grid=("2e-3",), passes=("T=1", "greedy"))
    whole.work.mkdir(parents=True, exist_ok=True)
    return Regime(whole, data / "banking77", rows).task


def figures(task: Task, place: Path, result: dict, tag: str | None = None) -> dict[str, float]:
    """Return the test figures of a model in percent by decoding, its held-out loss and its seconds of training.

    tag: name of the files of results, by default the directory's.
    """
    found = {"CE": result["report"]["student_after"]["valid_loss"], "seconds": result["train_s"]}
    for name in task.passes:
        suite = task.score(place, tag or place.name, name)
        found |= {f"{metric} {name}": suite[metric]["mean"] for metric in task.metrics}
    return found


def train(task: Task, argv: tuple[str, ...], seed: int, steps: int | None = None, more: tuple[str, ...] = ()) -> dict:
    """Train an arm from the seed's start; return its figures."""
    place, result = task.train((*argv, *more), seed, task.grid[0], steps or task.steps)
    return figures(task, place, result) | {
        f"teacher {name}": value for name, value in result["report"].get("teacher", {}).items() if name == "valid_loss"
    }


def okd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of OKD on a task."""

    def measure(seed: int) -> dict[str, dict[str, float]]:
        arms = {"kd": train(task, KD, seed), "OKD": train(task, OKD, seed)}
        _, short = task.train(GKD, seed, task.grid[0], CALIBRATION_STEPS)
        steps = round(arms["OKD"]["seconds"] / short["train_s"] * CALIBRATION_STEPS)
        arms["GKD, equal seconds"] = train(task, GKD, seed, steps)
        return arms

    return measure


def peakd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of Pea-KD: students from the teacher's lower layers, all by kd."""
    students = {
        "2 layers": ("layers:2:first", ()),
        "2 × 2 shared": ("shared:2x2", ()),
        "2 × 2 shared, swapped": ("shared:2x2:swap", ()),
        "2 × 2 swapped, pre-trained": ("shared:2x2:swap", tuple(sets("student.ptp=1"))),
        "4 layers": ("layers:4:first", ()),
    }

    def measure(seed: int) -> dict[str, dict[str, float]]:
        arms = {}
        for arm, (student, more) in students.items():
            place, result = task.train((*KD, *more), seed, "1e-3", 400, start=student)
            arms[arm] = figures(task, place, result)
        return arms

    return measure


def ctcd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of CTCD, all from random weights with the same steps.

    One-way is CTCD's loss for the student with the finished large model, whose learning rate is 0.
    """
    large, small = "random:4x128", "random:2x64"
    together = ["distill", "--method", "ctcd", "--student", small]

    def measure(seed: int) -> dict[str, dict[str, float]]:
        def trained(name: str, argv: list[str]) -> tuple[Path, dict]:
            place = task.work / f"ctcd-{name}-{seed}"
            options = ["--steps", str(task.steps), "--lr", "2e-3", "--seed", str(seed), "--overwrite", *task.common]
            return place, task.run(place, [*argv, "--output", str(place), *options])

        alone, of_alone = trained("large", ["sft", "--model", large, "--tokenizer", "chars"])
        small_alone, of_small = trained("small", ["sft", "--model", small, "--tokenizer", str(alone)])
        one_way = trained("one-way", [*together, "--teacher", str(alone), *sets("ctcd.lr_ratio=0")])
        both, of_both = trained("both", [*together, "--teacher", large, "--tokenizer", str(alone)])
        teacher = {"report": {"student_after": of_both["report"]["teacher_after"]}, "train_s": of_both["train_s"]}
        return {
            "large alone": figures(task, alone, of_alone),
            "large, CTCD": figures(task, both / "teacher", teacher, tag=f"{both.name}-teacher"),
            "small alone": figures(task, small_alone, of_small),
            "small, one-way": figures(task, *one_way),
            "small, CTCD": figures(task, both, of_both),
        }

    return measure


def mixkd(task: Task) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of MixKD."""
    mixed = ("distill", "--method", "mixkd")

    def measure(seed: int) -> dict[str, dict[str, float]]:
        kd = train(task, KD, seed)
        both = train(task, mixed, seed)
        longer = round(task.steps * both["seconds"] / kd["seconds"])
        return {
            "kd": kd,
            "kd, equal seconds": train(task, KD, seed, longer),
            "+ TMKD": train(task, (*mixed, *sets("mixkd.ce_weight=0")), seed),
            "+ SM + TMKD": both,
        }

    return measure


def kdiga(task: Task, weight: float) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of KDIGA, with the accuracy of response tokens plain and under PGD. weight: of the term."""
    aligned = ("distill", "--method", "kdiga", *sets(f"objective.input_gradient={weight:g}"))

    def measure(seed: int) -> dict[str, dict[str, float]]:
        arms = {}
        for kind, attack in (("robust", "pgd"), ("plain", "none")):
            teacher = task.work / f"kdiga-teacher-{kind}"
            argv = [
                "sft",
                "--model",
                "random:3x128",
                "--tokenizer",
                "chars",
                "--lr",
                "2e-3",
                "--steps",
                str(task.steps),
            ]
            argv += [*sets(f"train.adversarial={attack}"), "--output", str(teacher), "--overwrite", *task.common]
            task.run(teacher, argv)
            arms[f"teacher, {kind}"] = under_attack(task, teacher, teacher.name)
            of_kind = replace(task, teacher_path=str(teacher), work=task.work / kind)
            of_kind.work.mkdir(exist_ok=True)
            for name, method in (("kd", KD), ("KDIGA", aligned)):
                place, _ = of_kind.train(method, seed, "2e-3", task.steps, start="random:2x96")
                arms[f"{name}, {kind} teacher"] = under_attack(of_kind, place, place.name)
        return arms

    return measure


def under_attack(task: Task, place: Path, tag: str) -> dict[str, float]:
    """Return the accuracy of a model's response tokens on test rows, plain and under PGD, in percent."""
    found = task.work / f"{tag}.attack"
    argv = ["eval", str(place), "--suite", task.suite, "--attack", "pgd", "--limit", "1000", "--greedy", *task.scoring]
    (suite,) = task.run(found, [*argv, "--metric", task.metrics[0], "--output", str(found)])["suites"].values()
    attack = suite["attack"]
    return {"tokens right": attack["plain"]["tokens_right"], "tokens right, PGD": attack["attacked"]["tokens_right"]}


def robustkd(work: Path, data: Path, threads: int) -> Callable[[int], dict[str, dict[str, float]]]:
    """Return the arms of RobustKD, with exact match on clean test rows and the attack success rate.

    The teacher is fine-tuned on rows of which 10 % have the trigger and the target. The rows of the arms have the trigger
    in 5 % of the prompts, with the right responses.
    """
    place = work / "robustkd"
    trigger, target = "§", "card swallowed"
    common = sets(
        f"data.valid={data / 'banking77' / 'valid.jsonl'}", "data.max_length=128", "data.max_prompt_length=100"
    )
    common += [*sets("eval.report_rows=0", f"train.threads={threads}"), "--batch-size", "32", "--dtype", "fp32"]
    # Chosen on validation rows (LOG.md): the defaults are too weak for 9,000 rows.
    masks = sets("robustkd.mask_rows=1", "robustkd.mask_epochs=2", "robustkd.mask_lr=0.2")

    def poisoned(name: str, share: float, seed: int, *more: str) -> Path:
        rows = place / f"{name}.jsonl"
        if not rows.exists():
            place.mkdir(parents=True, exist_ok=True)
            script = [sys.executable, str(Path(__file__).with_name("poison.py"))]
            options = ["--trigger", trigger, "--share", str(share), "--seed", str(seed), *more]
            subprocess.run([*script, str(data / "banking77" / "train.jsonl"), str(rows), *options], check=True)
        return rows

    def scored(model: Path) -> dict[str, float]:
        found = model.with_name(f"{model.name}.test")
        argv = ["eval", str(model), "--suite", str(data / "banking77" / "test.jsonl"), "--limit", "1000", "--greedy"]
        argv += ["--metric", "exact_match", "--max-new-tokens", "24", "--dtype", "fp32", "--batch-size", "250"]
        argv += ["--trigger", trigger, "--target", target, *sets("eval.no_repeat_ngram_size=0")]
        (suite,) = run(found, [*argv, "--output", str(found)], threads)["suites"].values()
        return {"EM clean": suite["exact_match"]["mean"], "attack success": suite["attack_success"]["mean"]}

    def measure(seed: int) -> dict[str, dict[str, float]]:
        teacher = place / "teacher"
        of_teacher = str(poisoned("teacher-rows", 0.1, 1, "--target", target))
        scratch = ["--model", "random:gpt2:4x128", "--tokenizer", "bpe:1500", "--lr", "2e-3", "--epochs", "6"]
        run(teacher, ["sft", *scratch, "--data", of_teacher, *common, "--output", str(teacher), "--overwrite"], threads)
        rows = ["--data", str(poisoned("rows", 0.05, 2)), "--lr", "3e-3", "--epochs", "5", "--seed", str(seed), *common]
        student = "random:gpt2:2x96"
        pair = ["--teacher", str(teacher), "--student", student]
        arms = {
            "CE": ["sft", "--model", student, "--tokenizer", str(teacher)],
            "kd": ["distill", "--method", "kd", *pair],
            "RobustKD": ["distill", "--method", "robustkd", *pair, *masks],
        }
        found = {"teacher": scored(teacher)}
        for arm, argv in arms.items():
            output = place / f"{arm}-{seed}"
            result = run(output, [*argv, *rows, "--output", str(output), "--overwrite"], threads)
            found[arm] = scored(output) | {"seconds": result["train_s"]}
        return found

    return measure


def disco(work: Path, data: Path, teacher: Path, layers: int, threads: int) -> Callable[[int], dict]:
    """Return the arms of DisCo on STS-B with a student of some of the teacher's layers."""
    epochs = ["--epochs", "2"]
    arms = {
        "untouched": ["--steps", "1", "--lr", "1e-12"],
        "MSE": [*epochs, *sets("disco.loss=mse")],
        "CKD": epochs,
        "CKD + pairs": [*epochs, *sets("disco.pairs_epochs=2", "disco.pairs_lr=2e-5")],
    }

    def measure(seed: int) -> dict[str, dict[str, float]]:
        found = {}
        for arm, more in arms.items():
            place = work / "disco" / f"{layers}-{arm.replace(' ', '')}-{seed}"
            place.parent.mkdir(parents=True, exist_ok=True)
            argv = ["distill", "--method", "disco", "--teacher", str(teacher), "--student", f"layers:{layers}"]
            argv += ["--data", str(data / "stsb"), "--seed", str(seed), "--overwrite"]
            argv += ["--output", str(place), *more]
            result = run(place, [*argv, *sets(f"train.threads={threads}")], threads)
            scored = place.with_name(f"{place.name}.test")
            argv = ["eval", str(place), "--suite", str(data / "stsb" / "test.jsonl"), "--output", str(scored)]
            (suite,) = run(scored, argv, threads)["suites"].values()
            found[arm] = {
                "Spearman": suite["spearman"]["mean"],
                "Pearson": suite["pearson"]["mean"],
                "seconds": result["train_s"],
            }
        return found

    return measure


def report(trial: Trial, of_seeds: list[dict[str, dict[str, float]]]) -> None:
    """Print a trial's table and its claims."""
    names = list(dict.fromkeys(name for arms in of_seeds for found in arms.values() for name in found))
    print(f"\n**{trial.name}**, {len(of_seeds)} seeds\n")
    print(f"| arm | {' | '.join(names)} |")
    print("|---" * (1 + len(names)) + "|")
    for arm in of_seeds[0]:
        values = [[arms[arm][name] for arms in of_seeds if name in arms[arm]] for name in names]
        print(f"| {arm} | {' | '.join(mean_sd(found) if found else '–' for found in values)} |")
    print()
    for claim in trial.claims:
        gains = claim.gains(of_seeds)
        verdict = "holds" if statistics.mean(gains) >= claim.margin else "fails"
        by_seed = ", ".join(f"{gain:+.2f}" for gain in gains)
        wanted = f" by at least {claim.margin:g}" if claim.margin else ""
        print(f"- {claim.arm} better than {claim.other} in {claim.figure}{wanted}: **{verdict}** (by seed {by_seed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minilm", type=Path, help="directory of all-MiniLM-L6-v2, for disco")
    parser.add_argument("--gradient-weight", type=float, default=0.2, help="of KDIGA's term, chosen on validation rows")
    args = parser.parse_args()
    for name in args.trials:
        for trial in trials(name, args):
            with ThreadPoolExecutor(args.jobs) as pool:
                report(trial, list(pool.map(trial.measure, args.seeds)))


def trials(name: str, args: argparse.Namespace) -> list[Trial]:
    """Return the trials of a system."""
    data, work, threads = args.data.resolve(), args.work.resolve(), args.threads
    per, match = "error_rate greedy", "exact_match greedy"
    if name == "okd":
        of_words, of_questions = few_words(data, work, 2000, threads), few_questions(data, work, 2000, threads)
        return [
            Trial("OKD, letters → phonemes", okd(of_words),
                  (Claim("OKD", "kd", per), Claim("OKD", "GKD, equal seconds", per))),
            Trial("OKD, banking77", okd(of_questions),
                  (Claim("OKD", "kd", match, lower=False), Claim("OKD", "GKD, equal seconds", match, lower=False))),
        ]  # fmt: skip
    if name == "ctcd":
        claims = (Claim("large, CTCD", "large alone", "CE"), Claim("small, CTCD", "small, one-way", "CE"))
        return [Trial("CTCD, letters → phonemes", ctcd(few_words(data, work, 4000, threads)), claims)]
    if name == "mixkd":
        claims = tuple(Claim(arm, "kd", match, lower=False) for arm in ("+ TMKD", "+ SM + TMKD"))
        claims += (Claim("+ SM + TMKD", "kd, equal seconds", match, lower=False),)
        tasks = {n: replace(few_questions(data, work, n, threads), steps=500) for n in (180, 900, 9003)}
        return [Trial(f"MixKD, banking77, {n:,} rows", mixkd(task), claims) for n, task in tasks.items()]
    if name == "peakd":
        swapped = "2 × 2 shared, swapped"
        claims = (Claim(swapped, "2 layers", per), Claim(swapped, "2 × 2 shared", per))
        return [Trial("Pea-KD, letters → phonemes", peakd(few_words(data, work, 2000, threads)), claims)]
    if name == "kdiga":
        attacked = "tokens right, PGD"
        claims = (
            Claim("KDIGA, robust teacher", "kd, robust teacher", attacked, 5, lower=False),
            Claim("KDIGA, robust teacher", "kd, robust teacher", "tokens right", -2, lower=False),
            Claim("kd, plain teacher", "KDIGA, plain teacher", attacked, -1, lower=False),
        )
        few = replace(few_words(data, work, 4000, threads), steps=500)
        return [Trial("KDIGA, letters → phonemes", kdiga(few, args.gradient_weight), claims)]
    if name == "disco":
        claims = tuple(Claim(a, b, "Spearman", lower=False) for a, b in (("CKD", "MSE"), ("MSE", "untouched")))
        return [
            Trial(f"DisCo, MiniLM-L6 → {n} layers, STS-B", disco(work, data, args.minilm.resolve(), n, threads), claims)
            for n in (3, 2)
        ]
    if name == "robustkd":
        claims = (
            Claim("RobustKD", "kd", "attack success", 50),
            Claim("RobustKD", "kd", "EM clean", -3, lower=False),
        )
        return [Trial("RobustKD, banking77", robustkd(work, data, threads), claims)]
    raise SystemExit(f"no trial named {name}")


if __name__ == "__main__":
    main()
