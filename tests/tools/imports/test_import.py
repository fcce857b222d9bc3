"""Others' checkpoints: what this project computes from an import, against forward passes written here anew.

The tensors are made under the others' names, and the expected logits come from those tensors by plain torch.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, launch
from others_models import (
    LAYERS,
    MASK,
    MODELS,
    WIDTH,
    Model,
    Tensors,
    diffugpt_shapes,
    expected_logits,
    llama_config,
    llama_shapes,
    made_up,
    random_tensors,
    some_ids,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.errors import UserError
from pretrain.runtime.metrics import read_metrics
from tools import layouts
from tools.decoding import load
from tools.import_checkpoint import import_checkpoint, main


@pytest.mark.parametrize("kind", MODELS)
def test_the_import_computes_what_their_code_would(kind, written, imported):
    model, _ = written(kind)
    ids = some_ids(model.mask)
    ours, tokenizer = load(str(imported(kind)), device="cpu")
    with torch.no_grad():
        logits = ours(ids).logits
    expected = expected_logits(model, ids)
    assert expected.std() > 0.3  # far from uniform, so that a wrong weight shows
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert ours.config.mask_token_id == tokenizer.mask_token_id == model.mask
    assert ours.config.diffusion["shift"] is model.shift and ours.config.diffusion["eps"] == 1e-3


@pytest.mark.parametrize("kind", ["diffugpt", "dream", "a2d-qwen3"])
def test_it_is_complete_for_plain_transformers(kind, written, imported):
    """The shipped code, the names of the base architecture, defaults of decoding, a card; it generates."""
    model, folder = written(kind)
    out = imported(kind)
    ours, info = AutoModel.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = some_ids(model.mask)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, expected_logits(model, ids), rtol=1e-5, atol=1e-5)
    filled = ours.diffusion_generate(ids, steps=3, generator=torch.Generator().manual_seed(0))
    assert not (filled == model.mask).any() and torch.equal(filled[:, 11:], ids[:, 11:])
    assert ours.diffusion_generate(max_new_tokens=4, eos_token_id=-1).shape == (1, 5)
    assert ours.generation_config.order == "left_to_right"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    before = AutoTokenizer.from_pretrained(folder) if kind == "diffugpt" else None
    if before is not None:
        assert tokenizer("Once upon a time").input_ids == before("Once upon a time").input_ids
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and f"| mask | {model.mask} " in card


def test_dreams_tokenizer_is_qwen2s(imported, tokenizer_dir):
    """The same ids from vocab.json and merges.txt as from the tokenizer that they were written from."""
    tokenizer = AutoTokenizer.from_pretrained(imported("dream"))
    text = "Once upon a time, there was a wolf"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(tokenizer_dir)(text).input_ids
    assert tokenizer("a<|mask|>").input_ids[1:] == [387] and tokenizer.bos_token_id == 386
    config = json.loads((imported("dream") / "config.json").read_text())
    assert config["diffusion"]["start_token_id"] == 386 and config["model_type"] == "qwen2"


# And back


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "diffullama_wrapped"])
def test_back_in_their_layout_the_tensors_are_the_same(kind, written, imported, tmp_path):
    model, _ = written(kind)
    back = tmp_path / "back"
    assert main([str(imported(kind)), str(back), "--to", model.layout]) == 0
    found = load_file(back / "model.safetensors")
    weights = {name: tensor for name, tensor in model.tensors.items() if not name.endswith(".attn.bias")}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    config = json.loads((back / "config.json").read_text())
    for key, value in model.config.items():
        if key not in ("auto_map", "architectures", "transformers_version"):
            assert config[key] == value, key
    assert config["architectures"][0] in layouts.LAYOUTS[model.layout].classes.values()
    assert config.get("right_shift_logits", True) is (model.shift if model.layout == "a2d" else True)
    assert "diffusion" not in config and "rope_parameters" not in config
    settings = json.loads((back / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] in ("PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")
    assert not isinstance(settings.get("extra_special_tokens"), list)
    if kind == "dream":  # their from_pretrained fails without it
        assert json.loads((back / "generation_config.json").read_text())["mask_token_id"] == model.mask
    again = import_checkpoint(back, tmp_path / "again", layout=model.layout)  # and in once more, without its flags
    assert again["mask"].startswith(f"{model.mask} ") and again["shift"] == ("yes" if model.shift else "no")
    first, second = (load_file(f / "model.safetensors") for f in (imported(kind), tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_layout_cannot_hold_is_not_written(imported, tmp_path, capsys, tiny_checkpoint):
    def refused(source: Path, to: str, *flags: str) -> str:
        assert main([str(source), str(tmp_path / "x"), "--to", to, *flags]) == 2
        assert not (tmp_path / "x").exists()
        return capsys.readouterr().err

    assert "is a gpt2; dream takes qwen2. This one fits diffugpt" in refused(imported("diffugpt"), "dream")
    other = tmp_path / "no_shift"
    shutil.copytree(imported("diffugpt"), other)
    config = json.loads((other / "config.json").read_text())
    config["diffusion"]["shift"] = False
    (other / "config.json").write_text(json.dumps(config))
    assert "diffusion.shift=false, but diffugpt's code always shifts" in refused(other, "diffugpt")
    assert "the mask token" in refused(imported("diffullama"), "a2d")
    config["mask_token_id"] = 7
    (other / "config.json").write_text(json.dumps(config | {"diffusion": {"shift": True}}))
    assert "mask_token_id 300 in its tokenizer, but 7 in config.json" in refused(other, "diffugpt")
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "is not in this project's layout" in refused(other, "diffugpt")
    assert "--base is for an import" in refused(imported("diffugpt"), "diffugpt", "--base", "x")
    assert main([str(tiny_checkpoint), str(tmp_path / "dry"), "--to", "a2d", "--dry_run"]) == 0
    assert not (tmp_path / "dry").exists() and "would be written" in capsys.readouterr().out


# Files


def test_pickles_shards_and_dtypes(written, tmp_path, tokenizer_dir):
    """.bin is read as tensors, several files as one, fp16 as fp32, bf16 as it is."""
    model, _ = written("diffullama")
    half = {name: tensor.half() for name, tensor in model.tensors.items()}
    folder = replace(model, tensors={}).write(tmp_path / "half", tokenizer_dir)
    (folder / "model.safetensors").unlink()
    torch.save(half | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"not a pickle")
    printed = import_checkpoint(folder, tmp_path / "a", layout="diffullama", mask_token_id=MASK)
    assert printed["dtype"] == "float16 → float32"
    assert (
        printed["tensors"] == f"{len(half)} taken, 1 buffers ignored (model.layers.0.self_attn.rotary_emb.inv_freq, …)"
    )
    found = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in half.items())

    folder = replace(model, tensors={}).write(tmp_path / "sharded", tokenizer_dir)
    (folder / "model.safetensors").unlink()
    brain = {name: tensor.bfloat16() for name, tensor in model.tensors.items()}
    names = sorted(brain)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: brain[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    save_file({"stray": torch.ones(1)}, folder / "stray.safetensors")  # not in the index
    settings = {"layout": "diffullama", "mask_token_id": MASK}
    printed = import_checkpoint(folder, tmp_path / "b", max_shard_size="20KB", **settings)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2 and printed["dtype"] == "bfloat16 → bfloat16"
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == brain.keys() and all(torch.equal(found[name], brain[name]) for name in brain)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists model-00002-of-00002\.safetensors, which is not there"):
        import_checkpoint(folder, tmp_path / "c", **settings)


def test_a_pickle_with_code_in_it_does_not_run(written, tmp_path, tokenizer_dir):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = replace(written("diffullama")[0], tensors={}).write(tmp_path / "evil", tokenizer_dir)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="is no dictionary of tensors"):
        import_checkpoint(folder, tmp_path / "a", layout="diffullama")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "a").exists()


def test_a_dry_run_writes_nothing(written, tmp_path, capsys):
    model, folder = written("diffugpt")
    assert main([str(folder), str(tmp_path / "x"), *model.flags, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for line in (
        "layout      diffugpt (gpt2)", "mask        300 ", "shift       yes", "2 buffers ignored (denoise_model.h.0",
        "vocabulary  384 rows in the embedding, 384 tokens", "files       model.safetensors", "of 64 tokens",
        f"parameters  {sum(t.numel() for n, t in model.tensors.items() if not n.endswith('.attn.bias')):,}",
    ):  # fmt: skip
        assert line in printed, printed


def test_an_import_that_is_cut_short_leaves_nothing(written, tmp_path, monkeypatch):
    model, folder = written("a2d-qwen3")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.shipping.generation_defaults", killed)
    assert main([str(folder), str(tmp_path / "x"), *model.flags]) == 130
    assert not list(tmp_path.iterdir())


def test_the_licence_and_the_name_of_a_source_on_the_hub(written, tmp_path, monkeypatch):
    _, folder = written("a2d-qwen3")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(folder, snapshot)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Theirs\n")
    monkeypatch.setattr("tools.source_folder.snapshot_download", lambda name, allow_patterns: str(snapshot))
    import_checkpoint("someone/a-model", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"| mask | 384 '<\|mask\|>' |" in card
    assert 'license: "apache-2.0"' in card and "base_model: someone/a-model" in card and "# someone/a-model" in card


# LoRA


def test_layouts_that_are_not_known(written, imported, tmp_path, tokenizer_dir):
    def refused(folder: Path, message: str, **settings) -> None:
        with pytest.raises(UserError, match=message):
            import_checkpoint(folder, tmp_path / "x", **settings)
        assert not (tmp_path / "x").exists()

    bert = Model("x", {"model_type": "bert"}, {"a.weight": torch.ones(2), "b.weight": torch.ones(2)})
    folder = bert.write(tmp_path / "bert", tokenizer_dir)
    refused(folder, r"model_type 'bert', 2 tensors: a\.weight, b\.weight, …; expected diffugpt \(model_type gpt2")
    refused(folder, "model_type 'bert'; --layout a2d expects a2d-llama or a2d-qwen2 or a2d-qwen3", layout="a2d")
    refused(written("diffullama")[1], "this layout is not known: model_type 'llama'")  # 384 tokens
    refused(imported("diffugpt"), "is already in this project's layout")
    refused(tmp_path / "nowhere", "is no folder; expected one, or a name on the Hub")
    refused(Path("org/name"), "is no folder, and the Hub does not give it")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"config\.json not found")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", "is no JSON")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "Dream"}')
    refused(tmp_path / "empty", r"holds no weights; expected one of \*\.safetensors")
    llama = replace(made_up("diffullama"), config=llama_config("llama", quantization_config={"quant_method": "awq"}))
    refused(llama.write(tmp_path / "awq", tokenizer_dir), "is quantised", layout="diffullama")


def test_tensors_that_do_not_fit(written, tmp_path, tokenizer_dir):
    def refused(name: str, kind: str, change, message: str) -> None:
        model = made_up(kind)
        change(model.tensors)
        folder = model.write(tmp_path / name, tokenizer_dir)
        with pytest.raises(UserError, match=message):
            import_checkpoint(folder, tmp_path / "x", layout=model.layout, mask_token_id=MASK)
        assert not (tmp_path / "x").exists()

    def drop(tensors: Tensors) -> None:
        for i in range(LAYERS):
            del tensors[f"model.layers.{i}.mlp.up_proj.weight"]

    refused("missing", "diffullama", drop, r"2 missing, first model\.layers\.0\.mlp\.up_proj\.weight")
    refused("more", "a2d-qwen3", lambda t: t.update(z=torch.ones(1), y=torch.ones(1)), "2 unexpected, first y")
    refused(
        "shape", "a2d-llama", lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        r"1 of another shape, first model\.norm\.weight \(7,\), expected \(32,\)",
    )  # fmt: skip
    refused(
        "untied", "diffugpt", lambda t: t.update({"lm_head.weight": t["embed_tokens.weight"] + 1}),
        "lm_head.weight differs from transformer.wte.weight",
    )  # fmt: skip
    refused(
        "twice", "diffugpt", lambda t: t.update({"transformer.ln_f.bias": torch.ones(WIDTH)}),
        r"denoise_model\.ln_f\.bias and transformer\.ln_f\.bias are the same weight twice",
    )  # fmt: skip
    refused("bare", "diffugpt", lambda t: t.pop("embed_tokens.weight"), r"no tensor for transformer\.wte\.weight")
    refused(
        "int8", "diffullama", lambda t: t.update({"model.norm.weight": torch.ones(WIDTH, dtype=torch.int8)}),
        "1 weights are no floats",
    )  # fmt: skip
    tied = made_up("diffugpt")
    tied.tensors["lm_head.weight"] = tied.tensors["embed_tokens.weight"].clone()
    import_checkpoint(tied.write(tmp_path / "tied", tokenizer_dir), tmp_path / "ok", mask_token_id=MASK)
    assert "lm_head.weight" not in load_file(tmp_path / "ok" / "model.safetensors")


def test_masks_and_tokenizers_that_do_not_fit(written, tmp_path, tokenizer_dir, dream_tokenizer, capsys):
    def refused(folder: Path, message: str, **settings) -> None:
        with pytest.raises(UserError, match=message):
            import_checkpoint(folder, tmp_path / "x", **settings)
        assert not (tmp_path / "x").exists()

    _, gpt = written("diffugpt")
    refused(gpt, "the mask is not known: .* no diffugpt of 384 tokens was published; .* --mask_token_id N")
    refused(gpt, "the mask is 384 in --mask_token_id, outside the vocabulary", mask_token_id=384)
    refused(gpt, "the mask is -1 in", mask_token_id=-1)
    refused(gpt, "--right_shift_logits is for a2d", mask_token_id=MASK, right_shift_logits=True)
    bare = made_up("diffugpt").write(tmp_path / "bare", None)
    refused(bare, "has no tokenizer .* --tokenizer", mask_token_id=MASK)
    import_checkpoint(bare, tmp_path / "ok", tokenizer=tokenizer_dir, mask_token_id=MASK)
    refused(gpt, "has 388 tokens, more than the 384 rows", tokenizer=dream_tokenizer)
    llama = replace(made_up("a2d-llama"), tensors=random_tensors(llama_shapes(VOCABULARY)))
    refused(llama.write(tmp_path / "full", tokenizer_dir), "has 385 tokens, more than the 384 rows")
    dream = replace(made_up("dream"), config=made_up("dream").config | {"mask_token_id": 386})
    refused(dream.write(tmp_path / "dream", dream_tokenizer), "mask is 386 in config.json, 387 in the tokenizer's")
    moved = tmp_path / "moved"
    shutil.copytree(dream_tokenizer, moved)
    text = (moved / "tokenizer_config.json").read_text()
    (moved / "tokenizer_config.json").write_text(text.replace('"387"', '"390"'))
    refused(tmp_path / "dream", r"'<\|mask\|>' is token 390, but transformers reads it as", tokenizer=moved)
    remote = tmp_path / "remote"
    shutil.copytree(dream_tokenizer, remote)
    (remote / "tokenizer_config.json").write_text(text.replace('"DreamTokenizer"', '"OtherTokenizer"'))
    refused(tmp_path / "dream", "cannot be loaded: The repository", tokenizer=remote)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "mine").write_text("keep")
    with pytest.raises(UserError, match="is not empty"):
        import_checkpoint(gpt, tmp_path / "y", mask_token_id=MASK)


# Published sizes


def test_the_published_masks():
    """By the rows of the embeddings: what the authors of each say."""
    published = {name: layout.masks for name, layout in layouts.LAYOUTS.items()}
    assert published["diffugpt"] == {50257: 10541, 50258: 50257} and published["diffullama"] == {32000: 811}
    assert set(published["dream"].values()) == {151666} and published["a2d"] == {}
    shifts = {name: layout.shift for name, layout in layouts.LAYOUTS.items()}
    assert shifts == {"diffugpt": True, "diffullama": True, "dream": True, "a2d": None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list, expected an object"),
        ("{", "is no JSON"),
        ({"n_head": 0}, "describes no gpt2 model"),
        ({"n_head": 5}, "describes no gpt2 model"),
        ({"activation_function": "nonesuch"}, "describes no gpt2 model"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_one_line(content, message, written, tmp_path):
    _, folder = written("diffugpt")
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    if isinstance(content, dict):
        content = json.dumps({**json.loads((folder / "config.json").read_text()), **content})
    (other / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint(other, tmp_path / "out", mask_token_id=MASK)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_another_models_tokenizer_is_refused(written, tmp_path, tokenizer_dir):
    _, folder = written("diffugpt")
    small = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    kept = dict(list(small["model"]["vocab"].items())[:300])
    small["model"] |= {"vocab": kept, "merges": []}
    other = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    (other / "tokenizer.json").write_text(json.dumps(small))
    with pytest.raises(UserError, match="300 tokens for 384 rows of the embedding, which is another model's"):
        import_checkpoint(folder, tmp_path / "out", tokenizer=other, mask_token_id=17)


def test_diffugpt_s_is_gpt2_small():
    """Every name and shape one to one, on no storage; and the published masks."""
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    layout = layouts.LAYOUTS["diffugpt"]
    theirs = diffugpt_shapes(50257, 768, 12, 1024)
    assert {layouts.renamed(name, layout.reads): shape for name, shape in theirs.items()} == expected
    assert {layouts.renamed(name, layout.writes): shape for name, shape in expected.items()} == theirs
    assert sum(math.prod(shape) for shape in theirs.values()) == 124_439_808
    assert layout.masks == {50257: 10541, 50258: 50257} and layouts.LAYOUTS["diffullama"].masks == {32000: 811}
    plain = {"model_type": "llama", "vocab_size": 32000}
    assert layouts.recognise(plain, ["model.norm.weight"], Path()).name == "diffullama"


# Further training


@pytest.mark.slow
def test_an_import_trains_on(imported, tmp_path, tiny_run):
    """From the same weights, with the mask that it was trained on, at the NELBO of the import."""
    from held_out import held_out_nelbo

    arguments, folder = tiny_run("imported", **{"model.base": imported("diffugpt"), "train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert json.loads((folder / "model" / "config.json").read_text())["mask_token_id"] == MASK
    expected = held_out_nelbo(imported("diffugpt"), folder)
    assert read_metrics(folder)[0]["val_nelbo"] == pytest.approx(expected, rel=1e-5)
