"""Others' checkpoints: what this project computes from an import, against forward passes written here anew.

The tensors are made under the others' names, and the expected logits come from those tensors by plain torch.
"""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import VOCABULARY, launch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from common.errors import UserError
from pretrain.runtime.metrics import read_metrics
from tools import layouts
from tools.decoding import load
from tools.import_checkpoint import import_checkpoint, main

WIDTH, LAYERS, HEADS, GROUPS, INNER, POSITIONS = 32, 2, 4, 2, 64, 256
ROPE = {"a2d-qwen3": 5000.0}
MASK = 300  # a token of the tiny tokenizer

Tensors = dict[str, torch.Tensor]


# Models of others, made up


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Normal numbers, large enough for the logits to differ; gains of norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        gain = len(shape) == 1 and name.endswith("weight")
        made[name] = torch.randn(shape, generator=generator) * (0.2 if len(shape) == 1 else 0.15) + gain
    return made


def diffugpt_shapes(rows: int = VOCABULARY, width: int = WIDTH, layers: int = LAYERS, positions: int = POSITIONS):
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (rows, width),
        "denoise_model.wpe.weight": (positions, width),
    }
    for i in range(layers):
        block = f"denoise_model.h.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for name, into, out in (
            ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width), ("mlp.c_proj", 4 * width, width),
        ):  # fmt: skip
            shapes |= {f"{block}{name}.weight": (into, out), f"{block}{name}.bias": (out,)}
    return shapes | {"denoise_model.ln_f.weight": (width,), "denoise_model.ln_f.bias": (width,)}


def llama_shapes(rows: int, head: int = WIDTH // HEADS, bias: bool = False, norms: bool = False, tied: bool = False):
    """Of LLaMA; with biases of q, k, v, Qwen2; with norms of q and k, Qwen3."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, WIDTH)}
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (heads * head, WIDTH)
            if bias:
                shapes[f"{block}self_attn.{name}_proj.bias"] = (heads * head,)
        shapes[f"{block}self_attn.o_proj.weight"] = (WIDTH, HEADS * head)
        if norms:
            shapes |= {f"{block}self_attn.{name}_norm.weight": (head,) for name in ("q", "k")}
        shapes |= {f"{block}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes |= {f"{block}{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (WIDTH,)
    return shapes if tied else shapes | {"lm_head.weight": (rows, WIDTH)}


def gpt2_config(**changes) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": WIDTH,
        "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "activation_function": "gelu_new",
        "bos_token_id": 1, "eos_token_id": 0, "task_specific_params": {"text-generation": {"max_length": 64}},
        "transformers_version": "4.44.2", **changes,
    }  # fmt: skip


def llama_config(model_type: str, **changes) -> dict:
    """In the spelling of transformers 4, which all these checkpoints were written with."""
    settings = {
        "model_type": model_type, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "max_position_embeddings": POSITIONS,
        "vocab_size": VOCABULARY, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_scaling": None,
        "rope_theta": ROPE.get(model_type, 10000.0), "tie_word_embeddings": False, "torch_dtype": "float32",
    }  # fmt: skip
    return settings | changes


@dataclass
class Model:
    """A layout's tiny stand-in: its config.json and tensors as its own code would write them."""

    layout: str
    config: dict
    tensors: Tensors
    shift: bool = True
    mask: int = MASK
    flags: tuple[str, ...] = ()  # of the command

    def write(self, folder: Path, tokenizer_dir: Path | None) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if tokenizer_dir is not None:
            for path in tokenizer_dir.iterdir():
                shutil.copy(path, folder / path.name)
        return folder


def made_up(kind: str) -> Model:
    """One of the kinds in MODELS."""
    if kind == "diffugpt":
        tensors = random_tensors(diffugpt_shapes())
        ones = torch.ones(1, 1, POSITIONS, POSITIONS, dtype=torch.uint8)
        tensors |= {f"denoise_model.h.{i}.attn.bias": ones.clone() for i in range(LAYERS)}
        return Model(kind, gpt2_config(), tensors, flags=("--mask_token_id", str(MASK)))
    if kind.startswith("diffullama"):
        plain = random_tensors(llama_shapes(VOCABULARY))
        if kind == "diffullama_wrapped":  # as their fine-tuning writes it
            plain = {n.replace("model.embed_tokens", "embed_tokens"): w for n, w in plain.items()}
            plain = {n.replace("model.", "denoise_model."): w for n, w in plain.items()}
        flags = ("--layout", "diffullama", "--mask_token_id", str(MASK))
        return Model("diffullama", llama_config("llama", architectures=["LlamaForCausalLM"]), plain, flags=flags)
    if kind == "dream":
        special = {"mask_token_id": 387, "pad_token_id": 384, "bos_token_id": 384, "eos_token_id": 384}
        config = llama_config("Dream", vocab_size=400, architectures=["DreamModel"], **special)
        config["auto_map"] = {"AutoModel": "modeling_dream.DreamModel"}
        return Model(kind, config, random_tensors(llama_shapes(400, bias=True)), mask=387)
    base, _, options = kind.removeprefix("a2d-").partition("-")
    shift, tied = "shift" in options, "tied" in options
    rows = 385 if base == "llama" else 400
    config = llama_config(f"a2d-{base}", vocab_size=rows, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=0)
    head = 16 if base == "qwen3" else WIDTH // HEADS
    if base == "qwen3":
        config["head_dim"] = head
    tensors = random_tensors(llama_shapes(rows, head, bias=base == "qwen2", norms=base == "qwen3", tied=tied))
    return Model("a2d", config, tensors, shift, mask=384, flags=("--right_shift_logits",) if shift else ())


MODELS = (
    "diffugpt", "diffullama", "diffullama_wrapped", "dream", "a2d-llama", "a2d-qwen2-tied", "a2d-qwen3",
    "a2d-qwen3-shift",
)  # fmt: skip


@pytest.fixture(scope="module")
def dream_tokenizer(tmp_path_factory, tokenizer_dir) -> Path:
    """As Dream ships it: vocab.json, merges.txt and a class of its own code, which must not run."""
    folder = tmp_path_factory.mktemp("dream_tokenizer")
    trained = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(trained["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in trained["merges"]))
    special = ("<|endoftext|>", "<|im_start|>", "<|beginoftext|>", "<|mask|>")
    settings = {
        "added_tokens_decoder": {
            str(VOCABULARY + i): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                  "single_word": False, "special": True}
            for i, token in enumerate(special)
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer", "bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "additional_special_tokens": list(special[1:]),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('remote code ran')\n")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, tokenizer_dir, dream_tokenizer):
    """`written(kind)`: the made-up model and its folder."""
    made: dict[str, tuple[Model, Path]] = {}

    def write(kind: str) -> tuple[Model, Path]:
        if kind not in made:
            model = made_up(kind)
            words = dream_tokenizer if kind == "dream" else tokenizer_dir
            made[kind] = model, model.write(tmp_path_factory.mktemp("theirs") / kind, words)
        return made[kind]

    return write


@pytest.fixture(scope="module")
def imported(written, tmp_path_factory):
    """`imported(kind)`: the folder that the command makes of it."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            model, folder = written(kind)
            made[kind] = tmp_path_factory.mktemp("imported") / kind
            assert main([str(folder), str(made[kind]), *model.flags]) == 0
        return made[kind]

    return run


# What they compute


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every position attends to all; (B, heads, L, D) each, to (B, L, heads * D)."""
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def gpt2_logits(t: Tensors, ids: torch.Tensor) -> torch.Tensor:
    """(B, L) → (B, L, V) of diffugpt's tensors, before the shift."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-5)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embed_tokens.weight"][ids] + t["denoise_model.wpe.weight"][: ids.shape[1]]
    for i in range(LAYERS):
        block = f"denoise_model.h.{i}."
        q, k, v = linear(norm(x, f"{block}ln_1"), f"{block}attn.c_attn").split(WIDTH, dim=-1)
        mixed = attention(split_heads(q, HEADS), split_heads(k, HEADS), split_heads(v, HEADS))
        x = x + linear(mixed, f"{block}attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"{block}mlp.c_proj")
    return norm(x, "denoise_model.ln_f") @ t["embed_tokens.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE on halves; (B, heads, L, D)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)  # (L, D / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def llama_logits(t: Tensors, ids: torch.Tensor, theta: float) -> torch.Tensor:
    """(B, L) → (B, L, V) of LLaMA's, Qwen2's or Qwen3's tensors, before the shift."""
    x = t["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        h = rms_norm(x, t[f"{block}input_layernorm.weight"])
        parts = {}
        for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            at = f"{block}self_attn.{name}_"
            part = split_heads(F.linear(h, t[f"{at}proj.weight"], t.get(f"{at}proj.bias")), heads)
            if f"{at}norm.weight" in t:
                part = rms_norm(part, t[f"{at}norm.weight"])
            parts[name] = part if name == "v" else rotated(part, theta)
        k, v = (parts[name].repeat_interleave(HEADS // GROUPS, dim=1) for name in ("k", "v"))
        x = x + attention(parts["q"], k, v) @ t[f"{block}self_attn.o_proj.weight"].T
        h = rms_norm(x, t[f"{block}post_attention_layernorm.weight"])
        gate, up = (h @ t[f"{block}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ t[f"{block}mlp.down_proj.weight"].T
    return rms_norm(x, t["model.norm.weight"]) @ t.get("lm_head.weight", t["model.embed_tokens.weight"]).T


def expected_logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """(B, L, V), where [:, i] predict token i."""
    if model.layout == "diffugpt":
        logits = gpt2_logits(model.tensors, ids)
    else:
        plain = {n.replace("denoise_model.", "model."): w for n, w in model.tensors.items()}
        plain = {("model." if n.startswith("embed_tokens") else "") + n: w for n, w in plain.items()}
        logits = llama_logits(plain, ids, model.config["rope_theta"])
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if model.shift else logits


def some_ids(mask: int) -> torch.Tensor:
    ids = torch.randint(2, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    ids[:, 5:11] = mask
    return ids


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
    from test_export import held_out_nelbo

    arguments, folder = tiny_run("imported", **{"model.base": imported("diffugpt"), "train.steps": 1})
    outcome = launch(1, arguments)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert json.loads((folder / "model" / "config.json").read_text())["mask_token_id"] == MASK
    expected = held_out_nelbo(imported("diffugpt"), folder)
    assert read_metrics(folder)[0]["val_nelbo"] == pytest.approx(expected, rel=1e-5)
