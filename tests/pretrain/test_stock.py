"""A checkpoint in the hands of transformers' own classes: the same logits, the same texts, no code unless asked for."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from transformers import AutoModel, AutoModelForCausalLM

from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.stock import BIDIRECTIONAL

MASK, VOCABULARY = 300, 301
FAMILIES = ["llama", "llama_tied", "gpt2", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(family, shift)`: a checkpoint of random weights."""
    made = {}

    def make(family: str, shift: bool = True) -> Path:
        if (family, shift) not in made:
            torch.manual_seed(3)
            config = tiny_config(family, VOCABULARY)
            config.mask_token_id, config.diffusion = MASK, {"shift": shift}
            model = diffusion_class(type(config))._from_config(config, attn_implementation="diffullama")
            with torch.no_grad():  # sharper predictions, so that differences show
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(4)
            made[family, shift] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family, shift])
        return made[family, shift]

    return make


def rows(padding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention mask) of a row of 9 tokens and one of 6, masks among them."""
    ids = torch.tensor([[5, 9, MASK, MASK, 7, MASK, 4, 2, 8], [3, MASK, 6, MASK, MASK, 11, 2, 2, 2]])
    real = torch.ones_like(ids)
    if padding is not None:
        real[1, 6:] = 0
    if padding == "left":
        ids[1], real[1] = ids[1].roll(3), real[1].roll(3)
    return ids, real


def stock_class(path: Path, **settings):
    model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    assert type(model).__module__.startswith("transformers.models.")
    return model


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_stock_class_computes_the_same_one_row_earlier(folder, family, attention, padding):
    path = folder(family)
    ids, real = rows(padding)
    position = (real.cumsum(1) - 1).clamp(min=0)
    stock = stock_class(path, attn_implementation=attention)
    found = stock(ids, attention_mask=real, position_ids=position, use_cache=False).logits
    ours = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    expected = ours(ids, attention_mask=real).logits
    for row, count in enumerate(real.sum(1).tolist()):
        first = int(real[row].argmax())
        predicted = slice(first + 1, first + count)  # nothing predicts a row's first token
        rows_before = slice(first, first + count - 1)
        torch.testing.assert_close(found[row, rows_before], expected[row, predicted], rtol=0, atol=1e-4)
    assert found.std() > 0.1, "all predictions are alike, which shows no difference"


@torch.no_grad()
def test_without_the_shift_it_is_the_same_row(folder):
    path = folder("llama", shift=False)
    ids, _ = rows(None)
    ours = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    torch.testing.assert_close(stock_class(path)(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)


RULES = [{"order": "left_to_right"}, {"order": "entropy", "temperature": 0}, {"threshold": 0.2, "block_length": 2}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_generate_fills_masks_as_our_class_does(folder, family, shift, rule, padding):
    path = folder(family, shift)
    ids, real = rows(padding)
    asked = {"attention_mask": real, **rule, "eos_token_id": -1}
    stock = stock_class(path)
    found = stock.generate(
        ids, custom_generate=str(path), trust_remote_code=True, generator=torch.Generator().manual_seed(1), **asked
    )
    ours = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    expected = ours.diffusion_generate(ids, generator=torch.Generator().manual_seed(1), **asked)
    assert torch.equal(found, expected)
    assert not (found[real.bool()] == MASK).any() and torch.equal(found[ids != MASK], ids[ids != MASK])


def test_generate_of_our_class_is_diffusion_generate(folder):
    """transformers puts the folder's custom_generate in the place of the method."""
    model = AutoModel.from_pretrained(folder("llama"), trust_remote_code=True).eval()
    ids, _ = rows(None)
    found = model.generate(ids, temperature=0, return_dict_in_generate=True, cache="window", block_length=2)
    expected = model.diffusion_generate(
        ids, temperature=0, return_dict_in_generate=True, cache="window", block_length=2
    )
    assert torch.equal(found.sequences, expected.sequences) and torch.equal(found.step_of, expected.step_of)


def test_new_tokens_and_what_a_tokenizer_gives(folder):
    path = folder("llama")
    ids = torch.tensor([[5, 9, 33]])
    stock = stock_class(path)
    call = {"custom_generate": str(path), "trust_remote_code": True, "temperature": 0, "eos_token_id": -1}
    text = stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **call)
    assert text.shape == (1, 7) and torch.equal(text[:, :3], ids) and not (text == MASK).any()


def test_only_code_of_the_folder_that_is_trusted_runs(folder, tmp_path):
    """Weights of one folder, decoding of another: nothing of the first is imported."""
    trusted, other = folder("llama"), tmp_path / "other"
    shutil.copytree(trusted, other)
    for path in other.rglob("*.py"):
        path.write_text("raise SystemExit('code of the wrong folder runs')")
    ids, _ = rows(None)
    call = {"custom_generate": str(trusted), "trust_remote_code": True, "temperature": 0, "eos_token_id": -1}
    call["order"] = "left_to_right"
    a, b = (stock_class(path).generate(ids, use_cache=True, pad_token_id=0, **call) for path in (other, trusted))
    assert torch.equal(a, b) and not (a == MASK).any()


def test_it_says_what_needs_our_class(folder, tmp_path):
    path = folder("llama")
    stock = stock_class(path)
    ids, _ = rows(None)
    call = {"custom_generate": str(path), "trust_remote_code": True}
    stronger = ({"cache": "window", "block_length": 2}, {"verify_threshold": 0.5, "threshold": 0.4}, {"compile": True})
    for setting in stronger:
        with pytest.raises(ValueError, match=r"needs AutoModel\.from_pretrained"):
            stock.generate(ids, **setting, **call)
    with pytest.raises(TypeError, match="takes no num_beams"):
        stock.generate(ids, num_beams=2, **call)
    with pytest.raises(ValueError, match="trust_remote_code=True"):  # no code of a folder runs unasked
        stock.generate(ids, custom_generate=str(path))
    stock.config.is_causal = True
    with pytest.raises(ValueError, match="attends causally"):
        stock.generate(ids, **call)


def test_only_known_architectures_are_said_to_be_bidirectional(folder):
    for family in FAMILIES:
        config = json.loads((folder(family) / "config.json").read_text())
        assert config["is_causal"] is False and config["model_type"] in BIDIRECTIONAL
    path = folder("olmo2")
    assert "is_causal" not in json.loads((path / "config.json").read_text())
    ids, _ = rows(None)
    with pytest.raises(ValueError, match="attends causally"):
        stock_class(path).generate(ids, custom_generate=str(path), trust_remote_code=True)


@torch.no_grad()
def test_a_compiled_a_placed_and_a_bf16_model(folder):
    path = folder("llama")
    ids, _ = rows(None)
    stock = stock_class(path)
    expected = stock(ids).logits
    torch.testing.assert_close(torch.compile(stock, backend="aot_eager")(ids).logits, expected, rtol=0, atol=1e-4)
    assert torch.equal(stock_class(path, device_map="auto")(ids).logits, expected)
    half = stock_class(path, dtype=torch.bfloat16)(ids).logits
    assert half.dtype == torch.bfloat16 and 0 < (half.float() - expected).abs().mean() < 0.05 * expected.std()
    placed = AutoModel.from_pretrained(path, trust_remote_code=True, device_map="auto", dtype="auto").eval()
    loaded = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
    assert torch.equal(placed(ids).logits, loaded(ids).logits)
    half = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.bfloat16).eval()
    assert half(ids).logits.dtype == torch.bfloat16
    compiled = torch.compile(loaded, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, loaded(ids).logits, rtol=0, atol=1e-4)


def test_training_on_from_such_a_checkpoint_is_autoregressive_again_if_asked(folder):
    """`is_causal` in the base must not stay in what an autoregressive run ships."""
    from pretrain import adapt

    config = AutoModel.from_pretrained(folder("llama"), trust_remote_code=True).config
    adapt.describe_model(config, {})
    assert not {"is_causal", "diffusion", "mask_token_id"} & set(config.to_dict())


def test_no_code_is_imported_where_none_is_asked_for(folder):
    before = {name for name in sys.modules if name.startswith("transformers_modules")}
    stock_class(folder("qwen3"))
    assert {name for name in sys.modules if name.startswith("transformers_modules")} == before
