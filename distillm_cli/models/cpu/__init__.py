"""Replace passes of transformers by hand-written ones, for CPUs: the same numbers, up to rounding, in less time.

- `forward`: whole sequences through a GPT-2 or a Llama-like trunk, for training and for the teacher. On CPUs only.
- `decode_step`: one token through the same models, for generation. On other devices too, where it saves Python's time.
- `packed`: products with frozen bf16 weights that are laid out once for the processor. On CPUs only.

The first two are used only after they gave the numbers of transformers' own code for the model at hand, on a few tokens.
One switch turns all of them off: with ``DISTILLM_CPU_FAST=0`` in the environment transformers' own code runs everywhere.
"""

from __future__ import annotations

import os

SWITCH = "DISTILLM_CPU_FAST"


def is_enabled() -> bool:
    """Return whether the hand-written passes may be used. Read each time, so that a test can compare both."""
    return os.environ.get(SWITCH, "1") != "0"
