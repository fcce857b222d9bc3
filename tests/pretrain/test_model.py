import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config

from common.errors import UserError
from pretrain import adapt
from pretrain.config import ModelConfig
from pretrain.model.forms import Bernoulli, Full
from pretrain.model.modeling_diffullama import IGNORE, diffusion_class

FAMILIES = ["llama", "llama_tied", "gpt2", "qwen3", "mistral"]


def adapted(base, **settings):
    model = ModelConfig(base=str(base), **settings)
    tokenizer = adapt.load_tokenizer(model)
    config = adapt.base_config(model, 32)
    mask = adapt.add_mask_token(tokenizer, model)
    return adapt.load_model(model, config, mask, torch.float32), tokenizer, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_mask_token_is_the_mean_embedding(family, base_dir):
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(base_dir(family))
    model, tokenizer, mask = adapted(base_dir(family))
    assert tokenizer.mask_token == "<|mask|>" and tokenizer.mask_token_id == mask == model.config.mask_token_id == 384
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(stock, get)().weight, getattr(model, get)().weight
        assert torch.equal(new[:384], old) and len(new) == 385
        torch.testing.assert_close(new[384], old.mean(0))
    assert not any(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_an_existing_id_as_mask_changes_no_weight(base_dir):
    from transformers import AutoModelForCausalLM

    model, tokenizer, mask = adapted(base_dir("llama"), mask_token_id=77)
    assert mask == tokenizer.mask_token_id == 77
    stock = AutoModelForCausalLM.from_pretrained(base_dir("llama")).state_dict()
    assert all(torch.equal(value, stock[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match="mask_token_id is 384, the vocabulary has 0 to 383"):
        adapted(base_dir("llama"), mask_token_id=384)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_at_labels_is_that_of_the_logits(family, base_dir):
    """Selecting hidden states before the head gives the loss, and the gradients, of full logits."""
    model, _, mask = adapted(base_dir(family))
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, 384, (3, 24), generator=generator)
    masked = torch.rand(3, 24, generator=generator) < 0.5
    masked[:, 0] = False
    x0[0, 5], masked[0, 5] = mask, False  # the mask's own id as data: no loss there
    xt, labels = torch.where(masked, mask, x0), torch.where(masked, x0, IGNORE)

    by_position = torch.rand(3, 24, generator=generator)
    weights = by_position[masked]
    each = model(input_ids=xt, labels=labels, loss_weights=by_position)
    expected = F.cross_entropy(model(input_ids=xt).logits[masked], x0[masked], reduction="none")
    torch.testing.assert_close(each.nll, expected)
    torch.testing.assert_close(each.loss, (weights * expected).sum())
    torch.testing.assert_close(model(input_ids=xt, labels=labels).loss, expected.mean())
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(each.loss, parameters), torch.autograd.grad((weights * expected).sum(), parameters)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_masked_token_still_reaches_every_parameter(base_dir):
    """Under ZeRO-3 a rank whose batch has no masked token must run the same hooks as the others."""
    model, *_ = adapted(base_dir("llama"))
    ids = torch.zeros(2, 8, dtype=torch.long)
    model(input_ids=ids, labels=torch.full_like(ids, IGNORE)).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": "full"},
        {"activation_checkpointing": "selective"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_and_compiling_change_nothing(base_dir, settings):
    ids = torch.randint(0, 384, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORE)
    labels[:, 3:9] = ids[:, 3:9]
    gradients = []
    for chosen in ({}, settings):
        model, *_ = adapted(base_dir("llama"), **chosen)
        loss = model.train()(input_ids=ids, labels=labels).loss
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_what_needs_a_gpu_is_refused_here_and_says_what_can_be_had():
    def check(*forms, **settings):
        return adapt.check_acceleration(ModelConfig(**settings), list(forms or [Full()]), "cpu", torch.float32)

    random = Bernoulli(0.5)
    assert check(random, Full()) == {"bernoulli": "sdpa", "full": "sdpa"}
    with pytest.raises(UserError, match=r"model\.attention=varlen cannot show the form 'bernoulli'; use sdpa here, or"):
        check(random, attention="varlen")
    with pytest.raises(UserError, match="needs CUDA, not cpu; use sdpa here, or auto"):
        check(attention="varlen")
    with pytest.raises(UserError, match="'flash', expected auto, flash_attn, varlen, flex, sdpa"):
        check(attention="flash")
    with pytest.raises(UserError, match="loss=liger needs CUDA"):
        check(loss="liger")
    with pytest.raises(UserError, match="liger needs CUDA"):
        check(liger=True)


def test_a_label_at_the_first_token_is_refused(base_dir):
    model, *_ = adapted(base_dir("llama"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="which nothing predicts"):
        model(input_ids=ids, labels=ids)


def test_left_to_right_generation_is_refused(base_dir):
    model, *_ = adapted(base_dir("llama"))
    with pytest.raises(TypeError, match="diffusion_generate"):
        model.generate(torch.zeros(1, 4, dtype=torch.long))


def test_what_cannot_be_adapted(base_dir):
    from transformers import BertConfig, Gemma2Config

    adapt.check_adaptable(tiny_config("llama"), 32)
    with pytest.raises(UserError, match="final_logit_softcapping=30"):
        adapt.check_adaptable(Gemma2Config(), 32)
    with pytest.raises(UserError, match="max_position_embeddings=256; prepare shorter rows"):
        adapt.check_adaptable(tiny_config("llama"), 257)
    with pytest.raises(ValueError, match="no causal language model"):
        diffusion_class(type("Nothing", (BertConfig,), {}))
    with pytest.raises(UserError, match="cannot be loaded"):
        adapt.base_config(ModelConfig(base="/nowhere"), 32)
    with pytest.raises(UserError, match=r"has hidden_size=32, but model\.architecture says 64"):
        adapt.base_config(ModelConfig(base=str(base_dir("llama")), architecture={"hidden_size": 64}), 32)
