"""A base or a description that cannot be trained is refused in one line; a new model fits its tokenizer."""

import pytest
import torch
from helpers import tiny_config

from common.config import load_config
from common.errors import UserError
from pretrain import adapt
from pretrain.config import ModelConfig, RunConfig

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 400,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "nonesuch"}, "model_type='nonesuch', which transformers does not know"),
        ({"hiden_size": 64}, "a llama has no setting hiden_size"),
        ({"hidden_size": "abc"}, "model.architecture cannot be"),
        ({"num_attention_heads": 5}, "model.architecture cannot be"),
    ],
)
def test_a_wrong_description_is_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        adapt.architecture_config({**LLAMA, **change})
    assert "\n" not in str(error.value)


def test_a_new_model_has_its_tokenizers_special_ids(tokenizer):
    config = adapt.architecture_config(LLAMA)
    assert config.eos_token_id != tokenizer.eos_token_id  # LLaMA's own
    adapt.take_token_ids(config, tokenizer)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 0, tokenizer.pad_token_id)


def test_a_folder_that_is_not_there_is_called_so():
    for load in (adapt.load_tokenizer, lambda model: adapt.base_config(model, 32)):
        with pytest.raises(UserError, match=r"'/nowhere/x'.*: there is no such folder"):
            load(ModelConfig(base="/nowhere/x"))


def test_every_kind_of_dropout_is_off():
    model = ModelConfig(init="random")
    config = tiny_config("gpt2")
    config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.3
    config.hidden_dropout_prob = 0.2
    loaded = adapt.load_model(model, config, None, torch.float32)
    rates = [value for key, value in vars(loaded.config).items() if "dropout" in key or key.endswith("_pdrop")]
    assert len(rates) >= 4 and not any(rates)
    assert not any(module.p for module in loaded.modules() if isinstance(module, torch.nn.Dropout))


def test_a_base_without_the_shift_is_no_autoregressive_one():
    config = tiny_config("llama")
    config.diffusion = {"shift": False}
    adapt.check_fits(load_config(RunConfig, None, ["diffusion.shift=false"]), config, 10)
    with pytest.raises(UserError, match=r"was trained with diffusion\.shift=false; set the same"):
        adapt.check_fits(RunConfig(), config, 10)
    with pytest.raises(UserError, match="shift=false; an autoregressive model has the shift"):
        adapt.check_fits(RunConfig(objective="autoregressive"), config, 10)
    config.diffusion = {"step": 3}  # of a version that did not write the shift: it had it
    with pytest.raises(UserError, match=r"was trained with diffusion\.shift=true"):
        adapt.check_fits(load_config(RunConfig, None, ["diffusion.shift=false"]), config, 10)


def test_which_mask_token_a_base_gets(base_dir):
    """A diffusion base keeps its own; a mask that an autoregressive base's tokenizer happens to have is not one."""
    model = ModelConfig(base=str(base_dir("llama")))
    tokenizer = adapt.load_tokenizer(model)
    assert adapt.add_mask_token(tokenizer, model) == 384 and tokenizer.mask_token == "<|mask|>"
    tokenizer = adapt.load_tokenizer(model)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(17)
    assert adapt.add_mask_token(tokenizer, model, learnt=17) == 17 and len(tokenizer) == 384
    assert adapt.add_mask_token(tokenizer, model, learnt=18) == 384 and tokenizer.mask_token == "<|mask|>"
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(17)
    assert adapt.add_mask_token(tokenizer, ModelConfig(mask_token_id=5), learnt=17) == 5
