import pytest
import torch
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pretrain.flops import step_flops, visible_share
from pretrain.model.visibility import Visibility


@given(st.sampled_from(["full", "causal", "window", "block"]), st.integers(1, 40), st.integers(1, 50))
def test_the_visible_share_is_that_of_the_mask(form, length, width):
    mask = Visibility(form, width=width).dense(length, "cpu")
    counted = 1.0 if mask is None else mask.double().mean().item()
    assert visible_share(form, 0, width, length) == pytest.approx(counted)


def test_bernoullis_share_is_its_expectation():
    mask = Visibility("bernoulli", 0.3, key=(1, 1)).dense(400, "cpu").double().mean().item()
    assert visible_share("bernoulli", 0.3, 0, 400) == pytest.approx(mask, rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_flops_are_those_that_torch_counts(family):
    """A forward and backward of the stock model with every token's logits, attention in matrix products."""
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    ids = torch.randint(0, 300, (2, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    found = step_flops(model, ids.numel(), ids.numel(), 32, 1.0)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
