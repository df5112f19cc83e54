"""Train small students and write their reports into the built documentation: ``gallery/`` of the site.

python docs/make_gallery.py [--site build/site] [--steps N] [--work DIR]

Each run is the quickstart recipe with another method and few steps. The reports are those of ``distillm report``. Run it
after ``zensical build``, which empties the site. docs/gallery.md is the page that links to the reports.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from distillm_cli.cli.app import main as distillm

# Name of each run, with its own options.
RUNS = {
    "kd": ["--method", "kd"],
    "mixed": ["--divergence", "kl", "--schedule", "mixed"],
    "ab": ["--method", "ab"],
}
SETTINGS = ["student.sft_epochs=2", "train.eval_steps=20", "train.log_steps=1", "train.keep=0", "data.valid_limit=40"]
SHARED = ["--recipe", "quickstart", "--quiet", *(word for field in SETTINGS for word in ("--set", field))]


def call(*argv: str) -> None:
    """Run a command of ``distillm`` without its results. Exit with its code if it fails."""
    with redirect_stdout(io.StringIO()):
        code = distillm(list(argv))
    if code:
        print(f"make_gallery: `distillm {' '.join(argv)}` ended with exit code {code}", file=sys.stderr)
        raise SystemExit(code)


def make_gallery(site: Path, runs: Path, steps: int) -> None:
    """Train the runs into ``runs``, and write a report of each and one of all below ``site``."""
    for name, options in RUNS.items():
        call("distill", *SHARED, *options, "--steps", str(steps), "--output", str(runs / name))
    places = {name: [str(runs / name)] for name in RUNS} | {"all": [str(runs / name) for name in RUNS]}
    for name, directories in places.items():
        call("report", *directories, "--html", "--output", str(site / "gallery" / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=Path("build/site"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--work", type=Path, help="directory for the runs [default: a temporary one]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_gallery(args.site, args.work or Path(directory), args.steps)


if __name__ == "__main__":
    main()
