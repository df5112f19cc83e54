"""Check that a teacher's loss on its chat template's own text is the same here as in transformers.

    python benchmarks/templates.py --templates DIR [--families llama3_1 qwen3 …] [--json]

DIR contains chat templates of model families as NAME.jinja (the wheel of `trl` has them in trl/chat_templates/). For
each family a tiny model is trained in transformers on conversations rendered by `apply_chat_template`, the loss
taken on the answer up to its end-of-turn token. Then `distillm sft` reads the same conversations as `messages` and
measures the same model. Exits 1 if a difference is 1e-4 or more.

The expected values are independent of this project: ids of the whole conversation, the prompt's ids as the part before
the answer, and the end-of-turn token from the family's documentation.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lab import last_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

# Family → its end-of-sequence token, and the token that ends an answer.
FAMILIES = {
    "llama3": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_1": ("<|eot_id|>", "<|eot_id|>"),
    "llama3_2": ("<|eot_id|>", "<|eot_id|>"),
    "qwen2_5": ("<|im_end|>", "<|im_end|>"),
    "qwen3": ("<|im_end|>", "<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>", "<|im_end|>"),
    "qwen3_5_think": ("<|im_end|>", "<|im_end|>"),
    "gemma": ("<eos>", "<end_of_turn>"),
    "gemma3": ("<eos>", "<end_of_turn>"),
    "phi3": ("<|endoftext|>", "<|end|>"),
    "gptoss": ("<|return|>", "<|return|>"),
    "cohere2": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "lfm2": ("<|im_end|>", "<|im_end|>"),
    "glm4moe": ("<|endoftext|>", "<|user|>"),
}
PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added tokens that are not special
CONTROL = re.compile(r"<\|[^|<>\s]+\|>|<(?:start|end)_of_turn>|</?think>|</?tool_call>|\[gMASK\]|<sop>")
TOLERANCE = 1e-4


def tokenizer(template: str, eos: str, end: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and of the template's control tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    control = sorted({*CONTROL.findall(template), eos, end, "<bos>"})
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control if t not in PLAIN])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in control if t in PLAIN])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=eos, pad_token=eos)
    made.chat_template = template
    return made


def rows() -> list[dict]:
    """Return eight conversations with one answer each."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}+1?"},
                {"role": "assistant", "content": f"It is {n + 1}."},
            ]
        }
        for n in range(8)
    ]


def labeled(made: PreTrainedTokenizerFast, messages: list[dict], end: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids of the whole conversation up to the answer's end, and labels: −100 on the prompt."""
    whole = made.apply_chat_template(messages, return_dict=False)
    prompt = made.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt
    token = made.convert_tokens_to_ids(end)
    answer = whole[len(prompt) :]
    answer = answer[: answer.index(token) + 1] if token in answer else [*answer, token]
    ids = torch.tensor([*prompt, *answer])
    labels = ids.clone()
    labels[: len(prompt)] = -100
    return ids, labels


def loss(model: LlamaForCausalLM, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the mean cross-entropy over all answer tokens."""
    total, count = 0.0, 0
    for ids, labels in examples:
        logits = model(ids[None]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def measured(family: str, templates: Path, steps: int, work: Path) -> tuple[float, float]:
    """Return the teacher's loss in transformers and here."""
    eos, end = FAMILIES[family]
    made = tokenizer((templates / f"{family}.jinja").read_text(encoding="utf-8"), eos, end)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = sorted({made.convert_tokens_to_ids(t) for t in (eos, end)})
    conversations = rows()
    examples = [labeled(made, row["messages"], end) for row in conversations]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, examples).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        theirs = float(loss(model, examples))
    teacher, data = work / family, work / f"{family}.jsonl"
    model.save_pretrained(teacher)
    made.save_pretrained(teacher)
    data.write_text("".join(json.dumps(row) + "\n" for row in conversations), encoding="utf-8")
    output = work / f"{family}-sft"
    command = [sys.executable, "-m", "distillm_cli", "sft", "--model", str(teacher), "--data", str(data)]
    command += ["--set", f"data.valid={data}", "--max-length", "4096", "--set", "data.max_prompt_length=4000"]
    command += ["--steps", "1", "--lr", "1e-12", "--dtype", "fp32", "--set", "eval.report_rows=0"]
    last_json([*command, "--output", str(output), "--json", "--quiet"], 1)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = next(line["valid_loss"] for line in lines if line.get("valid_loss") is not None)
    return theirs, ours


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, required=True, help="directory of NAME.jinja")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES], metavar="NAME")
    parser.add_argument("--steps", type=int, default=60, help="training steps of each teacher [default: 60]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for family in given.families:
            found[family] = measured(family, given.templates, given.steps, Path(work))
            if not given.json:
                theirs, ours = found[family]
                print(f"| {family} | {theirs:.6f} | {ours:.6f} | {abs(theirs - ours):.1e} |", flush=True)
    if given.json:
        print(json.dumps({family: {"transformers": a, "distillm": b} for family, (a, b) in found.items()}))
    raise SystemExit(any(abs(theirs - ours) >= TOLERANCE for theirs, ours in found.values()))


if __name__ == "__main__":
    main()
