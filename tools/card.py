"""The model card of an export: README.md with the Hub's front matter. Not a verb."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedModel

from common.errors import UserError
from data_prep.shards import Manifest
from pretrain.config import ModelConfig
from pretrain.model.reading import uses_shift
from pretrain.model.stock import BIDIRECTIONAL

from .figures import draw_runs
from .run_folder import RunFolder

EVALUATION = "evaluation.md"  # in RUN_DIR: a table that the card takes in


def write_card(folder: Path, run: RunFolder, model: PreTrainedModel, about: dict, target: str) -> None:
    """Write README.md and, where the run has trained by then, loss.png. `target`: what the folder is for.

    `about`: the step and tokens that the weights have seen.
    """
    until = replace(run, metrics=[m for m in run.metrics if m["step"] <= about["step"]])
    figure = ""
    if any(m.get(run.reported.training) is not None for m in until.finished_steps):
        draw_runs([until], folder / "loss.png")
        figure = "![training and held-out loss over tokens](loss.png)\n"
    (folder / "README.md").write_text(model_card(until, model, about, target, figure), encoding="utf-8")


def model_card(run: RunFolder, model: PreTrainedModel, about: dict, target: str, figure: str) -> str:
    """README.md of the folder, with the Hub's front matter."""
    base = run.config.model
    fresh = base.init == "random"
    licence = None if fresh else licence_of(base)
    evaluation = run.path / EVALUATION
    facts = {
        "origin": f"A new model with the tokenizer of {Path(base.base).name}" if fresh else Path(base.base).name,
        "how": "pretraining" if fresh else "continual pretraining",
        "trained": f"{about['step']:,} steps, {about['tokens']:,} tokens",
        "architecture": f"`{model.config.model_type}`, {model.num_parameters() / 1e6:.1f}M parameters",
        "recipe": _recipe(run),
        "data": _data(run.config.data.path),
        "figure": figure,
        "evaluation": f"## Evaluation\n\n{evaluation.read_text(encoding='utf-8')}\n" if evaluation.exists() else "",
        "licence": f"The base model's is `{licence}`."
        if licence
        else "That of the base model and of the training data.",
    }
    data = {"library_name": "transformers", "license": licence}
    if not fresh and is_hub_name(base.base):
        data["base_model"] = base.base
    if run.config.objective == "autoregressive":
        facts["table"] = _table(run.metrics, {run.reported.held_out: "cross-entropy"})
        data |= {"pipeline_tag": "text-generation"}
        card = CAUSAL_CARD
    else:
        facts["table"] = _table(run.metrics, {"val_nelbo": "NELBO", "val_masked_ce": "masked CE"})
        if target != "autoregressive":
            data |= {"tags": ["diffusion", "masked-diffusion", "text-diffusion"]}
        facts["use"] = _use(model, target)
        card = DIFFUSION_CARD
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{card.format(**facts)}"


def is_hub_name(base: str) -> bool:
    """Whether a base can be `name` or `org/name` on the Hub, and is no folder here."""
    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return not Path(base).exists()


def licence_of(base: ModelConfig) -> str | None:
    """`license` in the base's model card, in its folder or on the Hub; None where it is not said or not reached."""
    card = Path(base.base) / "README.md"
    if card.exists():
        data: Any = ModelCard.load(card, ignore_metadata_errors=True).data
    elif is_hub_name(base.base):
        try:
            data = HfApi().model_info(base.base, revision=base.revision, timeout=5).card_data
        except Exception:  # whatever hinders it, the export goes on
            return None
    else:
        return None
    return getattr(data, "license", None)


def _recipe(run: RunFolder) -> str:
    """Markdown of the settings that decide what was trained."""
    config = run.config
    train, optimizer, annealing = config.train, config.optimizer, config.annealing
    rows = {
        "objective": config.objective,
        "rows of tokens": str(train.seq_len) if train.seq_len else "as prepared",
        "global batch": f"{train.global_batch_size} rows",
        "learning rate": f"{optimizer.lr:g}, {optimizer.schedule}, {optimizer.warmup_steps:,} steps of warm-up",
        "AdamW": f"betas {tuple(optimizer.betas)}, weight decay {optimizer.weight_decay:g}",
        "seed": str(train.seed),
    }
    if config.objective == "masked_diffusion":
        annealed = f"{annealing.form}, {annealing.schedule} over {annealing.steps:,} steps"
        rows |= {
            "attention": "bidirectional at once" if annealing.form == "none" else f"annealed: {annealed}",
            "times": f"t in ({config.diffusion.eps:g}, 1), {config.diffusion.time_sampling}",
            "shift": "yes" if config.diffusion.shift else "no",
        }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", *lines])


def _data(path: str) -> str:
    """Markdown of what the corpus holds; one line where it is no longer there."""
    try:
        manifest = Manifest.load(path)
    except UserError:
        return f"The corpus `{Path(path).name}`."
    lines = [f"| source of `{Path(path).name}` | weight | rows of {manifest.seq_len} tokens |", "| --- | --- | --- |"]
    for source in manifest.sources:
        lines.append(f"| {source.name} | {source.weight:g} | {sum(shard.rows for shard in source.train):,} |")
    return "\n".join(lines)


def _table(metrics: list[dict], columns: dict[str, str]) -> str:
    """Markdown of the validations among `metrics`; `columns` maps their names in metrics.jsonl to titles."""
    lines = [f"| step | tokens | {' | '.join(columns.values())} |", "| --- " * (2 + len(columns)) + "|"]
    for m in metrics:
        if all(m.get(key) is not None for key in columns):
            losses = " | ".join(f"{m[key]:.3f}" for key in columns)
            lines.append(f"| {m['step']} | {m['tokens']:,} | {losses} |")
    return "\n".join(lines)


def _use(model: Any, target: str) -> str:
    """How to load and ask the model."""
    if target == "llama.cpp":
        return LLAMA_CPP
    if target == "autoregressive":
        return CAUSAL_AGAIN
    reads = SHIFTED if uses_shift(model.config) else NOT_SHIFTED
    stock = STOCK.format(row="i + 1" if uses_shift(model.config) else "i")
    return TRANSFORMERS.format(reads=reads, stock=stock if model.config.model_type in BIDIRECTIONAL else "")


UNKNOWN_LICENCE = "That of the base model and of the training data."
SHIFTED = "the shift from the autoregressive model is done inside."
NOT_SHIFTED = "hidden state i gives them: there is no shift, and the first token may be a mask too."

TRANSFORMERS = """
```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
text = "Once upon a time there was a" + tokenizer.mask_token * 6 + " who lived in a castle."
ids = tokenizer(text, return_tensors="pt").input_ids
print(tokenizer.decode(model.diffusion_generate(ids, temperature=0)[0]))
```

`generation_config.json` holds the defaults: one token a step, from left to right. `order` (also entropy, confidence,
random), `block_length`, `threshold`, `entropy_bound`, `cache="window"`, `streamer` and others are in the docstring.

`forward(input_ids).logits[:, i]` predict token i; {reads}
{stock}"""

STOCK = """
### Without remote code

`config.json` says `"is_causal": false`, so transformers' own class is bidirectional too, with eager and sdpa attention:

```python
model = AutoModelForCausalLM.from_pretrained(path)
logits = model(ids, use_cache=False).logits  # row i predicts token {row}
```

Fill masks by `model.generate(ids, custom_generate=path, trust_remote_code=True)`, which runs the code of this folder.
"""

LLAMA_CPP = """
For llama.cpp, whose own tools take this folder:

```bash
python convert_hf_to_gguf.py PATH --outfile model.gguf --outtype q8_0
llama-diffusion-cli -m model.gguf -p "Once upon a time" -ub 64 --diffusion-steps 64 --diffusion-block-length 64 \\
    --diffusion-algorithm 4 --temp 0 --top-k 1
```

`-ub` is the length of prompt and text together. `--top-k 1` is greedy and fills from left to right.
"""

CAUSAL_AGAIN = """
These are the weights in the base's own architecture and vocabulary: causal attention, no mask token. As an
autoregressive model it is not what was trained; it is for comparison, and for training on.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(path)
```
"""

DIFFUSION_CARD = """
# A masked diffusion language model

{origin}, trained as a masked diffusion model by {how}
(["Scaling Diffusion Language Models via Adaptation from Autoregressive Models"](https://arxiv.org/abs/2410.17891))
for {trained}.
Architecture {architecture}.

## Use
{use}
## Training

{recipe}

{data}

## Held-out loss

NELBO in nats a token (an upper bound of the negative log-likelihood), masked cross-entropy in nats a
masked token, both on noise that is the same for every row of the table.

{table}

{figure}
{evaluation}
## Licence

{licence}
"""

CAUSAL_CARD = """
# An autoregressive language model

{origin}, trained on next-token prediction by {how} for {trained}.
Architecture {architecture}, causal. It is a plain model of transformers: no code beside the weights, nothing to mask.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))
```

## Training

{recipe}

{data}

## Held-out loss

In nats a token.

{table}

{figure}
{evaluation}
## Licence

{licence}
"""
