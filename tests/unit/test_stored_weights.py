"""Check that a model whose weights stay mapped is the one that is loaded in float32."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distillm_cli.models.stored_weights import load_stored
from tests import tiny


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "xglm", "mpt", "bart"])
def test_bfloat16_model_differs_in_the_dtype_of_parameters_alone(family, tmp_path):
    """Check families without buffers, with buffers that bfloat16 would round, and with a config within the config."""
    tiny.model(family, tiny.VOCAB).to(torch.bfloat16).save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if family in tiny.SEQ2SEQ else AutoModelForCausalLM
    random_state = torch.get_rng_state()
    whole = auto.from_pretrained(tmp_path, dtype=torch.float32)
    stored = load_stored(lambda dtype: auto.from_pretrained(tmp_path, dtype=dtype), str(tmp_path))
    assert {weight.dtype for weight in stored.parameters()} == {torch.bfloat16}
    assert stored.config.to_dict() == whole.config.to_dict()
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, weight in stored.named_parameters():
        assert torch.equal(weight.float(), whole.get_parameter(name))
    for name, buffer in stored.named_buffers():
        assert buffer.dtype == whole.get_buffer(name).dtype
        assert torch.equal(buffer, whole.get_buffer(name))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float16,), (torch.bfloat16, torch.float32)])
def test_other_weights_are_loaded_in_float32(dtypes, tmp_path):
    model = tiny.model("llama", tiny.VOCAB).to(dtypes[0])
    model.lm_head.to(dtypes[-1])
    model.save_pretrained(tmp_path)
    loaded = load_stored(lambda dtype: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), str(tmp_path))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
