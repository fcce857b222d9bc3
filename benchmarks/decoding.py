"""How fast text is written, and how good it is: each rule and cache beside the authors' loop, AR and dLLM's sampler.

    python benchmarks/decoding.py runs/demo/step_39 --base runs/base/SmolLM2-135M-Instruct
    python benchmarks/decoding.py CHECKPOINT --base AR --dllm path/to/dllm --llama_cpp path/to/llama-diffusion-cli

One text at a time, on this machine's cores. Each row writes the same prompts with the same sampling (--temperature,
--top_p). Of its texts: tokens a second (median), model calls (NFE), tokens a call, nats a token under the base (the
judge) with its standard error, and distinct-2, the share of pairs of neighbouring tokens that are different.
Then infilling: gaps of 10 tokens in tales, greedy, by each order. Writes decoding.md and decoding.png to runs/, or
where --output says.
"""

import argparse
import importlib
import json
import math
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.decoding_report import Row, figure, table
from tools.decoding import load

HERE = Path(__file__).resolve().parent
TALES = HERE.parent / "data_prep" / "demo" / "tales.jsonl"
PROMPT_TOKENS = 16
AUTHORS_STEPS = 64  # their default, whatever the length

# name in the table: settings of diffusion_generate; with tokens_a_step, so many fewer steps than tokens. Algorithm 2 is
# at one step less than masks: from as many on, one mask a step is committed.
RULES: dict[str, dict[str, Any]] = {
    "random, Algorithm 2": {"order": "random", "steps": AUTHORS_STEPS - 1},
    "random, one a step": {"order": "random"},
    "confidence": {"order": "confidence"},
    "margin": {"order": "margin"},
    "entropy": {"order": "entropy"},
    "left to right": {"order": "left_to_right"},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.5": {"threshold": 0.5},
    "factor 1": {"factor": 1.0},
    "entropy bound 0.5": {"entropy_bound": 0.5},
    "entropy bound 2": {"entropy_bound": 2.0},
    "KLASS 0.5, 0.05": {"threshold": 0.5, "kl_threshold": 0.05},
    "WINO 0.5, 0.6": {"threshold": 0.5, "verify_threshold": 0.6},
    "remasking 0.3": {"order": "entropy", "remasking": 0.3, "steps": 96},
    "entropy, 2 a step": {"order": "entropy", "tokens_a_step": 2},
    "entropy, 4 a step": {"order": "entropy", "tokens_a_step": 4},
    "entropy, blocks of 16": {"order": "entropy", "block_length": 16},
    "… window cache": {"order": "entropy", "block_length": 16, "cache": "window"},
    "… a full pass every 4": {"order": "entropy", "block_length": 16, "cache": "window", "refresh_every": 4},
    "… window cache, 2 a step": {"order": "entropy", "block_length": 16, "cache": "window", "tokens_a_step": 2},
    "… window cache, 4 a step": {"order": "entropy", "block_length": 16, "cache": "window", "tokens_a_step": 4},
    "… window cache, entropy bound 2": {"entropy_bound": 2.0, "block_length": 16, "cache": "window"},
    "left to right, blocks of 4, window cache": {"order": "left_to_right", "block_length": 4, "cache": "window"},
}
LONG = (
    "random, Algorithm 2", "entropy, 4 a step", "… window cache", "… window cache, 2 a step",
    "… window cache, 4 a step", "left to right, blocks of 4, window cache",
)  # fmt: skip


Writer = Callable[[list[int], int, int], tuple[list[int], float]]  # (prompt, length, seed) -> (new tokens, calls)


def authors_loop(model: Any, temperature: float, top_p: float) -> Writer:
    """The authors' sampler, written anew from their description: all logits, top-p, a draw for every position.

    At step k of T each masked token is revealed with probability 1/k.
    """

    def write(prompt: list[int], length: int, seed: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        mask = model.config.mask_token_id
        x = torch.tensor([prompt + [mask] * length])
        for k in range(AUTHORS_STEPS, 0, -1):
            masked = x == mask
            logits = model(input_ids=x).logits.float()
            logits[..., mask] = -torch.inf
            probability = (logits / temperature).softmax(-1)
            if top_p < 1:
                ordered, index = probability.sort(dim=-1, descending=True)
                ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
                probability = torch.zeros_like(probability).scatter(-1, index, ordered)
            drawn = torch.multinomial(probability[0], 1).T
            reveal = masked & (torch.rand(x.shape) < 1 / k)
            x = torch.where(reveal, drawn, x)
        return x[0, len(prompt) :].tolist(), AUTHORS_STEPS

    return write


def ours(model: Any, temperature: float, top_p: float, settings: dict[str, Any]) -> Writer:
    """diffusion_generate with these settings."""
    settings = dict(settings)
    a_step = settings.pop("tokens_a_step", None)

    def write(prompt: list[int], length: int, seed: int) -> tuple[list[int], float]:
        steps = {"steps": math.ceil(length / a_step)} if a_step else {}
        out = model.diffusion_generate(
            torch.tensor([prompt]),
            max_new_tokens=length,
            temperature=temperature,
            top_p=top_p,
            eos_token_id=-1,
            generator=torch.Generator().manual_seed(seed),
            return_dict_in_generate=True,
            **{**steps, **settings},
        )
        return out.sequences[0, len(prompt) :].tolist(), float(out.nfe[0])

    return write


def autoregressive(base: Any, temperature: float, top_p: float) -> Writer:
    """The base with its KV cache, by transformers' generate."""

    def write(prompt: list[int], length: int, seed: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt])
        out = base.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_p=top_p, top_k=0,
            max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist(), length

    return write


def dllm(model: Any, tokenizer: Any, path: str, temperature: float) -> Writer:
    """dLLM's MDLM sampler with its defaults from a checkout of github.com/ZHZisZZ/dllm; it has no top-p."""
    package = Path(path) / "dllm"
    for name in ("dllm", "dllm.core"):  # without what else their __init__ files import
        module = types.ModuleType(name)
        module.__path__ = [str(package.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    sampler = importlib.import_module("dllm.core.samplers.mdlm").MDLMSampler(model, tokenizer)

    def write(prompt: list[int], length: int, seed: int) -> tuple[list[int], float]:
        torch.manual_seed(seed)
        out = sampler.sample(
            [prompt], max_new_tokens=length, steps=length, block_size=min(length, 128), temperature=temperature
        )
        return out[0, len(prompt) : len(prompt) + length].tolist(), length

    return write


def measure(name: str, write: Writer, prompts: list[list[int]], length: int) -> Row:
    """Write all prompts once, after a short one that warms up."""
    row = Row(name, [], [], [])
    write(prompts[0], 4, 0)
    for seed, prompt in enumerate(prompts):
        began = time.perf_counter()
        tokens, calls = write(prompt, length, seed)
        row.seconds.append(time.perf_counter() - began)
        row.tokens.append(tokens)
        row.calls.append(calls)
    return row


def llama_cpp(binary: str, model_file: str, positions: int, steps: int = 32) -> float:
    """Milliseconds a step of llama.cpp's diffusion program over so many positions, greedy."""
    command = [
        binary, "-m", model_file, "-p", "Once upon a time", "-ub", str(positions), "-c", str(positions),
        "--diffusion-steps", str(steps), "--diffusion-eps", "0.001", "--diffusion-algorithm", "4", "--temp", "0",
        "--top-k", "1", "-t", str(torch.get_num_threads()),
    ]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in (printed.stderr + printed.stdout).splitlines():
        if "time per step" in line:
            return float(line.split("time per step:")[1].split("ms")[0])
    raise SystemExit(f"{binary} printed no time per step")


@torch.no_grad()
def step_table(model: Any, positions: int, gguf: tuple[str, str] | None, repeats: int = 9) -> list[tuple[str, float]]:
    """(what, milliseconds) of one greedy step over `positions` masks, the parts of ours and the others'."""
    mask = model.config.mask_token_id
    ids = torch.tensor([[1] + [mask] * (positions - 1)])
    at = ids == mask

    def timed(act: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        return 1e3 * statistics.median(times[2:])

    def loop(compiled: bool) -> float:
        began = time.perf_counter()
        model.diffusion_generate(ids, order="entropy", temperature=0, eos_token_id=-1, steps=32, compile=compiled)
        return 1e3 * (time.perf_counter() - began) / 32

    products = [m for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    chances = torch.rand(positions, model.config.vocab_size)
    inputs = {m.in_features: torch.randn(positions, m.in_features) for m in products}
    rows = [
        ("matrix products of the blocks alone", timed(lambda: [m(inputs[m.in_features]) for m in products])),
        ("forward with the head on every position", timed(lambda: model(input_ids=ids).logits)),
        (
            "forward with the head on half of them",
            timed(lambda: model(input_ids=ids, logits_at=at & (at.cumsum(1) % 2 == 0)).logits),
        ),
        ("a draw for every position by torch.multinomial", timed(lambda: torch.multinomial(chances, 1))),
        ("a step of diffusion_generate, 32 steps", statistics.median(loop(False) for _ in range(5))),
    ]
    loop(True)
    rows.append(("… with compile=True", statistics.median(loop(True) for _ in range(5))))
    if gguf:
        rows.append(("a step of llama.cpp, 32 steps", statistics.median(llama_cpp(*gguf, positions) for _ in range(5))))
    return rows


def prompts_of(tokenizer: Any, path: Path, count: int) -> list[list[int]]:
    """The first tokens of `count` tales, spread over the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(lines[k * len(lines) // count])["text"] for k in range(count)]
    return [tokenizer(text)["input_ids"][:PROMPT_TOKENS] for text in texts]


def all_rows(
    args: argparse.Namespace, model: Any, tokenizer: Any, base: Any, length: int
) -> Iterator[tuple[str, Writer]]:
    """The ways of writing texts of this length, the authors' first."""
    sampling = args.temperature, args.top_p
    yield "authors' loop", authors_loop(model, *sampling)
    if args.dllm and length == min(args.lengths):
        yield "dLLM's sampler", dllm(model, tokenizer, args.dllm, args.temperature)
    for name, settings in RULES.items():
        if (length == min(args.lengths) or name in LONG) and (not args.only or name in args.only):
            yield name, ours(model, *sampling, settings)
    yield "AR base with KV cache", autoregressive(base, *sampling)


@torch.no_grad()
def infilling(model: Any, tokenizer: Any, base: Any, path: Path, texts: int = 32, gap: int = 10) -> list[str]:
    """Markdown of gaps between 16 and 22 given tokens, filled greedily one token a step.

    Nats of the base are over the gap and what follows it: text that does not lead to what follows costs there.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(lines[k * len(lines) // texts])["text"])["input_ids"][:48] for k in range(texts)]
    original = torch.tensor([row for row in rows if len(row) == 48])
    masked = original.clone()
    masked[:, 16 : 16 + gap] = model.config.mask_token_id

    def nats(ids: torch.Tensor) -> torch.Tensor:
        log_p = base(ids).logits[:, :-1].float().log_softmax(-1)
        return -log_p.gather(2, ids[:, 1:, None])[:, 15:, 0].mean(1)

    table = [f"### Gaps of {gap} tokens, {len(original)} texts", "", "| order | nats a token | tokens as in the text |"]
    table += ["| --- | --- | --- |", f"| the text itself | {float(nats(original).mean()):.2f} | 1.00 |"]
    for order in ("random", "confidence", "margin", "entropy", "left_to_right"):
        filled = model.diffusion_generate(
            masked, order=order, temperature=0, eos_token_id=-1, generator=torch.Generator().manual_seed(0)
        )
        found, same = nats(filled), (filled == original)[:, 16 : 16 + gap].float().mean()
        error = float(found.std() / math.sqrt(len(found)))
        table.append(f"| {order} | {float(found.mean()):.2f} ± {error:.2f} | {float(same):.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--base", required=True, help="the AR model: it writes too, and judges")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--texts", type=int, nargs="+", default=[8, 3, 2], help="texts for each length")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", help="these rules alone, besides the others' loops")
    parser.add_argument("--dllm", help="a checkout of dLLM")
    parser.add_argument(
        "--llama_cpp", nargs=2, metavar=("BINARY", "GGUF"), help="its program and the converted checkpoint"
    )
    parser.add_argument("--prompts", type=Path, default=TALES, help="JSONL with `text`; default: the demo's tales")
    parser.add_argument("--output", type=Path, default=Path("runs/decoding.md"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(args.checkpoint, device="cpu")
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    lines = [
        f"`python benchmarks/decoding.py {' '.join(sys.argv[1:])}`, {torch.get_num_threads()} threads, fp32, "
        f"temperature {args.temperature}, top-p {args.top_p}, prompts of {PROMPT_TOKENS} tokens.",
    ]
    for length, count in zip(args.lengths, args.texts, strict=True):
        prompts, rows, points = prompts_of(tokenizer, args.prompts, count), [], []
        for name, write in tqdm(list(all_rows(args, model, tokenizer, base, length)), desc=f"{length} tokens"):
            rows.append(measure(name, write, prompts, length))
        lines += ["", f"### {length} new tokens, {count} texts", "", *table(rows, base, prompts, points)]
        print("\n".join(lines[-len(rows) - 4 :]), flush=True)
        if length == min(args.lengths):
            figure(points, length, args.output.with_suffix(".png"))
    lines += ["", *infilling(model, tokenizer, base, args.prompts)]
    gguf = tuple(args.llama_cpp) if args.llama_cpp else None
    lines += ["", "### One step over 64 positions", "", "| | ms |", "| --- | --- |"]
    lines += [f"| {name} | {ms:.0f} |" for name, ms in step_table(model, 64, gguf)]
    args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
