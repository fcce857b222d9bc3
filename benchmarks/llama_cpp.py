"""What a conversion to llama.cpp changes: its greedy texts beside ours, and the masked CE of its rounded weights.

    make llama-cpp
    python benchmarks/llama_cpp.py runs/demo

In: RUN_DIR of a LLaMA- or Qwen2-shaped run. Each file type is converted by llama.cpp's own script. Texts: greedy, one
token a step from left to right, from the beginnings of tales; of a text that differs, how many characters it has in
common with ours. Masked CE: our model with the weights of the GGUF file, on tales and
one fixed noise. Writes benchmarks/llama_cpp.md.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.decoding import TALES
from common.cli import command, make_parser
from common.errors import UserError
from tools.decoding import load
from tools.export import export

ROOT = Path(__file__).resolve().parents[1]
LLAMA_CPP = ROOT / ".llama.cpp"
CLI = LLAMA_CPP / "build" / "bin" / "llama-diffusion-cli"
TYPES = {"f32": ["-fa", "off"], "f16": [], "q8_0": []}  # -fa off: keys and values are not rounded to 16 bits
LENGTH, PROMPT_TOKENS, EVALUATED = 64, 16, 256  # tokens
TRIES = 20

# GGUF's names of Dream's tensors, as in llama.cpp's gguf-py, and ours
NAMES = {
    "token_embd.": "model.embed_tokens.",
    "output_norm.": "model.norm.",
    "output.": "lm_head.",
    "blk.": "model.layers.",
    "attn_norm.": "input_layernorm.",
    "attn_output.": "self_attn.o_proj.",
    "ffn_norm.": "post_attention_layernorm.",
}


def our_name(name: str) -> str:
    """The name in our model of a tensor in a GGUF file."""
    for theirs, ours in NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\1{ours}", name)
    name = re.sub(r"\.attn_([qkv])\.", r".self_attn.\1_proj.", name)
    return re.sub(r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj.", name)


def gguf_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a GGUF file in fp32 under our names."""
    from gguf import GGUFReader, dequantize

    tensors = GGUFReader(path).tensors
    return {our_name(t.name): torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in tensors}


def convert(folder: Path, out: Path, kind: str) -> Path:
    script = [sys.executable, str(LLAMA_CPP / "convert_hf_to_gguf.py"), str(folder)]
    subprocess.run([*script, "--outfile", str(out), "--outtype", kind], check=True, capture_output=True)
    return out


def their_text(gguf: Path, prompt: str, masks: int, flags: list[str]) -> str:
    """What llama-diffusion-cli writes after the prompt."""
    schedule = ["--diffusion-steps", str(masks), "--diffusion-block-length", str(LENGTH), "--diffusion-algorithm", "4"]
    ask = [str(CLI), "-m", str(gguf), "-p", prompt, "-ub", str(LENGTH), *schedule, "--temp", "0", "--top-k", "1"]
    for _ in range(TRIES):  # its logger may end before the text is written
        said = subprocess.run([*ask, *flags], check=True, capture_output=True, text=True, errors="replace")
        parts = re.split(r"total time: .*\n\S+ I \n", said.stdout + said.stderr)
        if len(parts) == 2:
            return parts[1]
    raise UserError(f"llama-diffusion-cli printed no text in {TRIES} tries")


def common_start(a: str, b: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def masked_ce(model: Any, rows: torch.Tensor) -> float:
    """Mean nats a masked token with a half of the tokens masked, on noise that is always the same."""
    masked = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    masked[:, 0] = False
    logits = model(rows.masked_fill(masked, model.config.mask_token_id), logits_at=masked).logits
    return torch.nn.functional.cross_entropy(logits, rows[masked]).item()


@torch.no_grad()
def compared(model: Any, tokenizer: Any, folder: Path, prompts: list[list[int]], rows: torch.Tensor) -> list[str]:
    """The lines of the table."""
    ours = []
    for prompt in prompts:
        ids = model.diffusion_generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH - len(prompt), temperature=0, order="left_to_right",
            eos_token_id=-1,
        )  # fmt: skip
        ours.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    lines = [f"| ours | | {masked_ce(model, rows):.4f} | |"]
    names = set(model.state_dict())
    for kind, flags in TYPES.items():
        gguf = convert(folder, folder.parent / f"{kind}.gguf", kind)
        shared = []
        for prompt, text in zip(prompts, ours):
            found = their_text(gguf, tokenizer.decode(prompt), LENGTH - len(prompt), flags)
            shared.append(None if found.strip() == text else common_start(found.strip(), text))
        weights = gguf_weights(gguf)
        unknown = sorted(weights.keys() - names)
        if unknown:
            raise UserError(f"{gguf} holds tensors of unknown names, first {unknown[0]}")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights, strict=False)
        ce = masked_ce(model, rows)
        model.load_state_dict(before)
        differ = [str(count) for count in shared if count is not None]
        others = f"; the others differ after {', '.join(differ)} characters" if differ else ""
        lines.append(
            f"| llama.cpp, {kind} | {gguf.stat().st_size / 1e6:.0f} | {ce:.4f} | "
            f"{shared.count(None)} of {len(shared)}{others} |"
        )
    return lines


@command
def main(argv: list[str] | None = None) -> int:
    """Compare, and write the table."""
    parser = make_parser("benchmarks/llama_cpp.py", __doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not CLI.exists():
        raise UserError(f"{CLI} not found: make llama-cpp")
    with tempfile.TemporaryDirectory() as temporary:
        ours = export(args.run_dir, Path(temporary) / "ours", dtype="fp32")
        theirs = export(args.run_dir, Path(temporary) / "theirs", dtype="fp32", target="llama.cpp")
        model, tokenizer = load(str(ours), device="cpu")
        tales = [json.loads(line)["text"] for line in TALES.read_text(encoding="utf-8").splitlines()][-args.texts :]
        ids = [tokenizer(tale, add_special_tokens=False).input_ids for tale in tales]
        rows = torch.tensor([row[:EVALUATED] for row in ids])
        prompts = [row[:PROMPT_TOKENS] for row in ids]
        same = [tokenizer(tokenizer.decode(p), add_special_tokens=False).input_ids == p for p in prompts]
        assert all(same), "a prompt whose text has other tokens compares nothing"
        lines = compared(model, tokenizer, theirs, prompts, rows)
        step = model.config.diffusion["step"]
    text = "\n".join(
        [
            f"`python benchmarks/llama_cpp.py` wrote this: {Path(args.run_dir).name} after {step} steps, {len(tales)} "
            f"greedy texts of {LENGTH} tokens with their prompts of {PROMPT_TOKENS}.",
            "",
            "| weights | MB | masked CE, nats | texts equal to ours |",
            "| --- | --- | --- | --- |",
            *lines,
        ]
    )
    print(text)
    args.write.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
