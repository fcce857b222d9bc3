"""A LoRA adapter merged on import: W + scale · B A, or a refusal."""

import json
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY
from others_models import MASK, WIDTH, Tensors
from safetensors.torch import load_file, save_file

from common.errors import UserError
from tools.import_checkpoint import import_checkpoint


def adapter(folder: Path, tensors: Tensors, **changes) -> Path:
    """An adapter folder as peft writes it."""
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": False, "fan_in_fan_out": False, "bias": "none",
        "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
        "base_model_name_or_path": "theirs", "target_modules": ["q_proj"], "modules_to_save": None, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "denoise_model"])
def test_a_lora_is_merged(rslora, wrapped, written, tmp_path):
    """q_proj gets scale · B A, the embedding is replaced; in bf16 the sum is rounded once."""
    model, folder = written("diffullama")
    module = "layers.1.self_attn.q_proj"
    a, b = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    embedding = torch.randn(VOCABULARY, WIDTH)
    outer = "denoise_model." if wrapped else "model."
    tensors = {f"{outer}{module}.lora_A.weight": a, f"{outer}{module}.lora_B.weight": b}
    tensors["embed_tokens.weight" if wrapped else "model.embed_tokens.modules_to_save.default.weight"] = embedding
    gsm = adapter(tmp_path / "gsm", tensors, use_rslora=rslora, modules_to_save=["embed_tokens"])
    settings = {"layout": "diffullama", "mask_token_id": MASK, "base": folder}
    printed = import_checkpoint(gsm, tmp_path / "out", **settings)
    assert printed["adapter"] == "LoRA of rank 4 merged into 1 weights, 1 replaced"
    scale = 6 / 2 if rslora else 6 / 4
    name = f"model.{module}.weight"
    expected = model.tensors | {name: model.tensors[name] + scale * (b @ a), "model.embed_tokens.weight": embedding}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(found[other], tensor) for other, tensor in expected.items() if other != name)
    import_checkpoint(gsm, tmp_path / "half", dtype="bf16", **settings)
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[name], found[name].bfloat16())


def test_a_lora_of_gpt2s_conv1d(written, tmp_path):
    """Its weights are (in, out)."""
    model, folder = written("diffugpt")
    a, b = torch.randn(4, WIDTH), torch.randn(3 * WIDTH, 4)
    module = "denoise_model.h.0.attn.c_attn"
    gsm = adapter(
        tmp_path / "gsm", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, fan_in_fan_out=True
    )  # fmt: skip
    import_checkpoint(gsm, tmp_path / "out", base=folder, mask_token_id=MASK)
    found = load_file(tmp_path / "out" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    torch.testing.assert_close(found, model.tensors[f"{module}.weight"] + 1.5 * (b @ a).T, rtol=1e-6, atol=1e-6)


def test_what_is_not_lora_alone_is_refused(written, tmp_path):
    _, folder = written("diffullama")
    norm = {"model.norm.lora_A.weight": torch.ones(4, WIDTH), "model.norm.lora_B.weight": torch.ones(WIDTH, 4)}
    at = "model.layers.0.self_attn.q_proj.lora_"
    pair = {f"{at}A.weight": torch.ones(4, WIDTH), f"{at}B.weight": torch.ones(WIDTH, 4)}
    cases = [
        ({"use_dora": True}, pair, "use_dora=True, which cannot be merged here"),
        ({"rank_pattern": {"q_proj": 8}}, pair, "rank_pattern="),
        ({"bias": "all"}, pair, "bias='all'"),
        ({"init_lora_weights": "pissa"}, pair, "init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, pair, "peft_type 'LOHA', expected LORA"),
        ({"r": 0}, pair, "r=0, expected a number above 0"),
        ({"r": 8}, pair, r"have shapes \(4, 32\) and \(32, 4\), expected \(8, 32\) and \(32, 8\)"),
        ({}, {f"{at}A.weight": pair[f"{at}A.weight"]}, "has only lora_A for model.layers.0"),
        ({}, pair | {"model.unknown.weight": torch.ones(2)}, "1 tensors .* first model.unknown.weight"),
        ({}, pair | {f"{at}magnitude_vector": torch.ones(2)}, "first base_model.model.model.layers.0"),
        ({}, norm, r"for model\.norm\.weight have shapes \(4, 32\) and \(32, 4\), expected \(4,\) and \(32, 4\)"),
        ({}, {"model.embed_tokens.weight": torch.ones(2, 2)}, r"of shape \(2, 2\), expected \(384, 32\)"),
        ({"alpha_pattern": {"q_proj": 8}}, pair, "alpha_pattern="),
        ({"lora_alpha": float("nan")}, pair, "lora_alpha=nan, expected a number above 0"),
        ({"fan_in_fan_out": True}, pair, "fan_in_fan_out=True, expected False for this base"),
        ({}, {name: tensor.to(torch.int8) for name, tensor in pair.items()}, "no floats of 16 to 64 bits"),
        (
            {},
            pair | {f"{at}A.default.weight": torch.ones(4, WIDTH)},
            "lora_A for model.layers.0.self_attn.q_proj twice",
        ),
    ]
    for i, (changes, tensors, message) in enumerate(cases):
        gsm = adapter(tmp_path / str(i), tensors, **changes)
        with pytest.raises(UserError, match=message):
            import_checkpoint(gsm, tmp_path / "x", base=folder, layout="diffullama", mask_token_id=MASK)
    _, tied = written("a2d-qwen2-tied")
    gsm = adapter(tmp_path / "tied", {"model.embed_tokens.weight": torch.ones(400, WIDTH)})
    with pytest.raises(UserError, match="which the base shares with its head"):
        import_checkpoint(gsm, tmp_path / "x", base=tied)
    with pytest.raises(UserError, match=r"is a LoRA adapter; name the folder .* with --base"):
        import_checkpoint(gsm, tmp_path / "x")
    with pytest.raises(UserError, match=r"has no adapter_config.json; leave --base out"):
        import_checkpoint(folder, tmp_path / "x", base=tied)
    assert not (tmp_path / "x").exists()


# Refusals
