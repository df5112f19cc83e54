"""A command line as it is typed, with ``--json``."""

from __future__ import annotations

import json

from distillm_cli.cli.app import main
from distillm_cli.cli.options import collect_field_flags


def flags(verb="distill", **given):
    """The flags of a command by parameter name, as ``resolve`` takes them."""
    return collect_field_flags(verb, given)


def call(capsys, *argv):
    """(exit code, the JSON object on stdout, stderr) of one command line."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1, out
    return code, json.loads(out), err
