"""Others' checkpoints, made up: tensors under the others' names, and the logits of plain torch from these tensors."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from helpers import VOCABULARY
from safetensors.torch import save_file

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
