"""Remove the reasoning that models write before their answer."""

from __future__ import annotations

import re

# Tags around reasoning. A generation prompt may contain the opening tag, so that a response has only the closing one.
_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# Headers of channels (gpt-oss). A message to a tool is an answer, and its header names the tool.
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")
_CALL = re.compile(r"(?:<\|start\|>assistant)?[^<]*<\|channel\|>commentary[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")


def without_reasoning(text: str) -> str:
    """Return the response without its reasoning: think blocks, and channels other than the final one.

    A response that is cut inside its reasoning becomes empty. Text without reasoning is returned unchanged.
    """
    if "<|channel|>" in text:
        if final := list(_FINAL.finditer(text)):
            return text[final[-1].end() :].strip()
        call = _CALL.search(text)
        return text[call.start() :].strip() if call else ""
    for opening, closing in _TAGS:
        if closing in text:
            return text.rpartition(closing)[2].strip()
        if text.lstrip().startswith(opening):
            return ""
    return text
