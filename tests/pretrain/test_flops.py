import pytest
import torch
from helpers import tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pretrain.flops import step_flops
from pretrain.model.forms import Causal


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "qwen3"])
def test_flops_are_those_that_torch_counts(family):
    """A forward and backward of the stock model with every token's logits, attention in matrix products."""
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    ids = torch.randint(0, 300, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    found = step_flops(model, ids.numel(), ids.numel(), 32, 1.0)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_only_labelled_tokens_meet_the_vocabulary_and_only_visible_pairs_count():
    config = tiny_config("llama")
    model = AutoModelForCausalLM.from_config(config)
    tokens, length = 64, 32
    whole = step_flops(model, tokens, tokens, length, 1.0)
    without_head = step_flops(model, tokens, 0, length, 1.0)
    assert whole - without_head == 6 * tokens * config.vocab_size * config.hidden_size
    causal = step_flops(model, tokens, tokens, length, Causal().visible_share(length))
    attention = 12 * config.num_hidden_layers * config.hidden_size * length * tokens  # heads are as wide as the model
    assert whole - causal == pytest.approx(attention * (length - 1) / (2 * length))
