"""llama.cpp, unmodified, on our exports: its greedy text is ours, token by token."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, SHARED, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer

from common.errors import UserError
from pretrain import adapt
from pretrain.config import DiffusionConfig, ModelConfig, RunConfig
from pretrain.objectives import make_objective
from pretrain.runtime.resume import write_run
from tools import llama_cpp
from tools.decoding import load
from tools.export import export

LLAMA_CPP = ROOT / ".llama.cpp"
CLI = LLAMA_CPP / "build" / "bin" / "llama-diffusion-cli"
PROMPT, LENGTH = "Once upon a time there was", 40

needs_llama_cpp = pytest.mark.skipif(not CLI.exists(), reason="llama.cpp is not built: make llama-cpp")


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory, tales) -> Path:
    """A tokenizer.model like LLaMA's, of 400 pieces, in the tokenizer of transformers."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tales.txt").write_text("\n".join(tales[:60]), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "tales.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, max_sentence_length=10000, minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def make_base(folder: Path, family: str, tokenizer_dir: Path) -> Path:
    """A causal model of random weights whose likeliest tokens are words, so that its text can be compared."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = tiny_config(family, len(tokenizer))
    config.tie_word_embeddings = False
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}  # not what anyone would guess
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    words = [bool(re.fullmatch(r"[▁Ġ]?[a-zA-Z]+", t)) for t in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)  # so that attention decides, and the text does not repeat itself
        model.lm_head.weight[~torch.tensor(words)] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (tokenizer_dir / "tokenizer.model").exists():
        (folder / "tokenizer.model").write_bytes((tokenizer_dir / "tokenizer.model").read_bytes())
    return folder


def run_that_began(folder: Path, model: ModelConfig, **settings) -> Path:
    """A run before its first step: what export --step 0 needs."""
    config = RunConfig(run_dir=str(folder), model=model, **settings)
    tokenizer = adapt.load_tokenizer(model)
    mask = adapt.add_mask_token(tokenizer, model) if config.objective == "masked_diffusion" else None
    made = adapt.load_model(model, adapt.base_config(model, 32), mask, torch.float32)
    special = {"special_ids": {"eos": 0, "bos": 1}, "add_bos": False}
    adapt.describe_model(made.config, make_objective(config, mask).shipped(special))
    write_run(config, tokenizer, made.config)
    return folder


def convert(folder: Path, out: Path, outtype: str) -> Path:
    command = [sys.executable, str(LLAMA_CPP / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(out)]
    outcome = subprocess.run([*command, "--outtype", outtype], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return out


def greedy_text(gguf: Path, masks: int, length: int) -> str:
    """What llama-diffusion-cli writes after the prompt, one token a step, from left to right.

    Without its flash attention, which rounds keys and values to 16 bits.
    """
    schedule = ["--diffusion-steps", str(masks), "--diffusion-block-length", str(length), "--diffusion-algorithm", "4"]
    greedy = ["--temp", "0", "--top-k", "1", "-fa", "off", "-t", "1"]
    command = [str(CLI), "-m", str(gguf), "-p", PROMPT, "-ub", str(length), *schedule, *greedy]
    for _ in range(20):  # its logger may end before the text is written
        outcome = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=120
        )  # fmt: skip
        assert outcome.returncode == 0, outcome.stderr[-3000:]
        parts = re.split(r"total time: .*\n\S+ I \n", outcome.stdout + outcome.stderr)
        if len(parts) == 2:
            return parts[1].strip()
    raise AssertionError("llama-diffusion-cli printed no text in 20 tries")


@pytest.fixture(
    scope="module", params=["llama-appended", "llama-bos", "llama-existing", "qwen2-existing", "llama-gpt2"]
)
def exported(request, tmp_path_factory, sentencepiece_dir) -> tuple[Path, Path]:
    """(our export, our export for llama.cpp) of one run."""
    family, mask = request.param.split("-")
    tokenizer_dir = SHARED / "data" / "tokenizers" / "gpt2" if mask == "gpt2" else sentencepiece_dir
    if not tokenizer_dir.exists():
        pytest.skip("needs the GPT-2 tokenizer in shared/: llama.cpp knows byte-level vocabularies by their hashes")
    root = tmp_path_factory.mktemp(request.param)
    if mask == "bos":
        tokenizer_dir = Path(shutil.copytree(sentencepiece_dir, root / "tokenizer"))
        LlamaTokenizer.from_pretrained(sentencepiece_dir, add_bos_token=True).save_pretrained(tokenizer_dir)
    base = make_base(root / "base", family, tokenizer_dir)
    model = ModelConfig(base=str(base), mask_token_id=17 if mask == "existing" else None)
    run = run_that_began(root / "run", model)
    ours, theirs = export(run, root / "ours", step=0), export(run, root / "theirs", step=0, target="llama.cpp")
    if family == "qwen2":  # llama.cpp knows the vocabularies of the real ones only: this one gets one that it can read
        tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_dir)
        adapt.add_mask_token(tokenizer, model)
        llama_cpp.write_tokenizer(theirs, tokenizer, sentencepiece_dir / "tokenizer.model")
    return ours, theirs


@needs_llama_cpp
def test_llama_cpp_writes_our_greedy_text(exported, tmp_path):
    ours, theirs = exported
    model, _ = load(str(ours), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    masks = LENGTH - prompt.shape[1]
    call = {"temperature": 0, "order": "left_to_right", "eos_token_id": -1}
    tokens = model.diffusion_generate(prompt, max_new_tokens=masks, **call)[0, prompt.shape[1] :]
    assert len(set(tokens.tolist())) > 4, "a text that shows differences"
    assert (prompt[0, 0].item() == tokenizer.bos_token_id) == ("-bos" in str(ours)), "the case is what it is called"
    expected = tokenizer.decode(tokens).strip()
    found = greedy_text(convert(theirs, tmp_path / "model.gguf", "f32"), masks, LENGTH)
    assert tokenizer.tokenize(found) == tokenizer.tokenize(expected) and found == expected
    half = greedy_text(convert(theirs, tmp_path / "q8.gguf", "q8_0"), masks, LENGTH)
    assert half[:1] == expected[:1], "quantised to 8 bits it begins the same"


def test_the_folder_holds_what_the_converter_reads(exported):
    ours, theirs = exported
    config = json.loads((theirs / "config.json").read_text())
    assert config["architectures"] == ["DreamModel"] and config["model_type"] == "Dream"
    assert config["rope_theta"] > 0 and "auto_map" not in config and "is_causal" not in config
    tokenizer = AutoTokenizer.from_pretrained(theirs)
    assert tokenizer.mask_token_id == config["mask_token_id"] == AutoTokenizer.from_pretrained(ours).mask_token_id
    asked = tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], tokenize=False)
    assert asked == PROMPT, "the prompt stays as it is"
    assert not list(theirs.glob("*.py")) and not (theirs / "generation_config.json").exists()
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    if (theirs / "tokenizer.model").exists():
        added = json.loads((theirs / "added_tokens.json").read_text())
        assert added == ({tokenizer.mask_token: 400} if config["vocab_size"] == 401 else {})
    assert "llama-diffusion-cli" in (theirs / "README.md").read_text()


def test_it_says_why_llama_cpp_cannot_run_others(tmp_path, base_dir):
    model = ModelConfig(base=str(base_dir("llama")))
    out = tmp_path / "out"
    autoregressive = run_that_began(tmp_path / "autoregressive", model, objective="autoregressive")
    with pytest.raises(UserError, match=r"llama\.cpp cannot run this model: this run is autoregressive"):
        export(autoregressive, out, step=0, target="llama.cpp")
    unshifted = run_that_began(tmp_path / "unshifted", model, diffusion=DiffusionConfig(shift=False))
    with pytest.raises(UserError, match="trained without the shift"):
        export(unshifted, out, step=0, target="llama.cpp")
    gpt2 = run_that_began(tmp_path / "gpt2", ModelConfig(base=str(base_dir("gpt2"))))
    with pytest.raises(UserError, match="the shape of llama or qwen2, and this is a gpt2"):
        export(gpt2, out, step=0, target="llama.cpp")
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("qwen3", {}, "qwen3"),
        ("mistral", {}, "mistral"),
        ("llama", {"head_dim": 16}, "heads × head_dim"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_type=llama3"),
        ("llama", {"hidden_act": "gelu"}, "silu"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("llama", {"diffusion": {"shift": False}}, "without the shift"),
    ],
)
def test_reasons(family, changes, reason):
    config = tiny_config(family)
    if not changes:
        assert reason in str(llama_cpp.reason_unsupported(config))
        return
    assert llama_cpp.reason_unsupported(config) is None
    for name, value in changes.items():
        setattr(config, name, value)
    assert reason in str(llama_cpp.reason_unsupported(config))


def test_a_sentencepiece_vocabulary_without_its_file_is_refused(sentencepiece_dir, tmp_path):
    base = make_base(tmp_path / "base", "llama", sentencepiece_dir)
    run = run_that_began(tmp_path / "run", ModelConfig(base=str(base)))
    (base / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"llama.cpp needs the tokenizer\.model of .*base, and it has none"):
        export(run, tmp_path / "out", step=0, target="llama.cpp")
    assert not (tmp_path / "out").exists()
