"""Text from an exported diffusion model: continue a prompt, or fill gaps.

    python -m tools.generate exports/demo --prompt "Once upon a time" --length 64 --steps 64 --seed 1
    python -m tools.generate exports/demo --infill "There was a [MASK:6] who lived in a castle." --order confidence
    python -m tools.generate exports/demo --length 64 --num_samples 4 --output samples.jsonl

[MASK:n] stands for n unknown tokens; a text may have several.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from common.cli import command, make_parser
from common.errors import UserError
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.sampling import uses_shift

GAP = re.compile(r" ?\[MASK:(\d+)\]")  # the space before a gap belongs to the word to be found


def load(checkpoint: str, trust_remote_code: bool = False, device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of an exported checkpoint, in eval mode. Raises UserError where it is no diffusion model.

    With `trust_remote_code` the code in the checkpoint runs, as with plain transformers. Without, this project's
    own does, which computes the same.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        if getattr(config, "mask_token_id", None) is None:
            kind = ", ".join(config.architectures or [config.model_type])
            raise UserError(
                f"{checkpoint} is an autoregressive model ({kind} without a mask_token_id), which transformers' "
                "generate() continues; expected a masked diffusion model written by `python -m tools.export`"
            )
        if trust_remote_code:
            model = AutoModelForMaskedLM.from_pretrained(checkpoint, trust_remote_code=True)
        else:
            model = diffusion_class(type(config)).from_pretrained(checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} cannot be loaded: {str(error).splitlines()[0]}") from None
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), tokenizer


def encode(text: str, tokenizer: Any, mask_token_id: int, start_token_id: int | None, shift: bool = True) -> list[int]:
    """Ids of a text with [MASK:n] gaps.

    With the shift nothing predicts a first token, so a gap at the front gets the start token before it. Raises
    UserError where there is none.
    """
    parts = GAP.split(text)  # text, n, text, n, ..., text
    ids: list[int] = []
    for i, part in enumerate(parts):
        if i % 2:
            ids += [mask_token_id] * int(part)
        elif part and not ids:
            ids += tokenizer(part)["input_ids"]
            if len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
                ids.pop()  # a tokenizer that ends texts by itself
        elif part:
            ids += _continuation(part, tokenizer)
    if shift and (not ids or ids[0] == mask_token_id):
        if start_token_id is None:
            raise UserError("the text begins with a gap, and the checkpoint names no start token; begin with a word")
        ids.insert(0, start_token_id)
    return ids


def _continuation(text: str, tokenizer: Any) -> list[int]:
    """Ids of text in the middle: sentencepiece tokenizers put a space before a text on its own."""
    before = tokenizer("\n", add_special_tokens=False)["input_ids"]
    joined = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    if joined[: len(before)] == before:
        return joined[len(before) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def complete(
    model: Any, tokenizer: Any, text: str, *, num_samples: int = 1, steps: int = 64, seed: int = 0, **settings: Any
) -> list[str]:
    """`num_samples` completions of a text with [MASK:n] gaps. Raises UserError for a text that is too long."""
    about = getattr(model.config, "diffusion", None) or {}
    start = about.get("start_token_id", tokenizer.bos_token_id)
    ids = encode(text, tokenizer, model.config.mask_token_id, start, uses_shift(model.config))
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and len(ids) > limit:
        raise UserError(f"{len(ids)} tokens with the gaps, but the model takes {limit}")
    batch = torch.tensor([ids] * num_samples, device=model.device)
    generator = torch.Generator(model.device).manual_seed(seed)
    try:
        filled = model.diffusion_generate(batch, steps=steps, generator=generator, **settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    return tokenizer.batch_decode(filled, skip_special_tokens=True)


@command
def main(argv: list[str] | None = None) -> int:
    """Generate; returns the exit code."""
    parser = make_parser("python -m tools.generate", __doc__)
    parser.add_argument("checkpoint", help="a folder written by tools.export, or a name on the Hub")
    parser.add_argument("--prompt", default="", help="text to continue; default: none")
    parser.add_argument("--length", type=int, default=64, help="tokens after the prompt; default: %(default)s")
    parser.add_argument("--infill", action="append", metavar="TEXT", help="text with [MASK:n] gaps; may be repeated")
    parser.add_argument("--steps", type=int, default=64, help="model calls; more is better and slower (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--num_samples", type=int, default=1, help="of each text")
    parser.add_argument(
        "--order",
        choices=["random", "confidence"],
        default="random",
        help="which gaps are filled first; default: random",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable token")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the most probable tokens that hold this share of probability",
    )
    parser.add_argument("--output", help="JSONL file, one object a sample; must not exist")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code in the checkpoint")
    args = parser.parse_args(argv)
    if args.length < 1 or args.num_samples < 1:
        raise UserError("--length and --num_samples must be at least 1")
    if args.output and Path(args.output).exists():
        raise UserError(f"{args.output} exists; choose another name")
    model, tokenizer = load(args.checkpoint, args.trust_remote_code)
    settings = {"steps": args.steps, "order": args.order, "temperature": args.temperature, "top_p": args.top_p}
    records = []
    for text in args.infill or [f"{args.prompt}[MASK:{args.length}]"]:
        for sample in complete(model, tokenizer, text, num_samples=args.num_samples, seed=args.seed, **settings):
            if records and args.num_samples > 1:
                print("---")
            print(sample, flush=True)
            records.append({"request": text, "text": sample, "seed": args.seed, **settings})
    if args.output:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        Path(args.output).write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
