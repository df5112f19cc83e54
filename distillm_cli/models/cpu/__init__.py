"""Provide hand-written passes for CPUs that are faster than transformers' and return the same numbers up to rounding.

- `forward`: whole sequences through a GPT-2 or a Llama-like trunk, for training and for the teacher. On CPUs only.
- `decode_step`: one token through the same models, for generation. Also on other devices, to reduce overhead.
- `packed`: products with frozen bf16 weights in a layout for the processor that is computed once. On CPUs only.

The first two are used only if they match transformers' own code for the model on a few tokens. ``DISTILLM_CPU_FAST=0``
in the environment disables all of them.
"""

from __future__ import annotations

import os

SWITCH = "DISTILLM_CPU_FAST"


def is_enabled() -> bool:
    """Return whether the hand-written passes may be used.

    The environment is read on each call, so tests can compare both.
    """
    return os.environ.get(SWITCH, "1") != "0"
