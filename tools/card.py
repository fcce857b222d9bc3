"""The model card of an export: README.md with the Hub's front matter. Not a verb."""

from pathlib import Path

from transformers import PreTrainedModel

from pretrain.model.modeling_diffullama import DiffusionModel
from pretrain.model.reading import uses_shift

from .run_folder import RunFolder


def model_card(run: RunFolder, model: PreTrainedModel, about: dict) -> str:
    """README.md of the folder, with the Hub's front matter."""
    base = run.config.model.base
    fresh = run.config.model.init == "random"
    parameters = sum(p.numel() for p in model.parameters())
    facts = {
        "origin": f"A new model with the tokenizer of {Path(base).name}" if fresh else Path(base).name,
        "how": "pretraining" if fresh else "continual pretraining",
        "trained": f"{about['step']:,} steps, {about['tokens']:,} tokens, on `{run.config.data.path}`",
        "architecture": f"`{model.config.model_type}`, {parameters / 1e6:.1f}M parameters",
    }
    metrics = [m for m in run.metrics if m["step"] <= about["step"]]
    front_matter = [] if fresh or Path(base).exists() else [f"base_model: {base}"]  # a name on the Hub
    if isinstance(model, DiffusionModel):
        facts["reads"] = SHIFTED if uses_shift(model.config) else NOT_SHIFTED
        facts["table"] = _table(metrics, {"val_nelbo": "NELBO", "val_masked_ce": "masked CE"})
        card = DIFFUSION_CARD
        front_matter = ["pipeline_tag: fill-mask", "tags: [diffusion, masked-diffusion, text-diffusion]", *front_matter]
    else:
        facts["table"] = _table(metrics, {run.reported.held_out: "cross-entropy"})
        card = CAUSAL_CARD
        front_matter = ["pipeline_tag: text-generation", *front_matter]
    return "\n".join(["---", "library_name: transformers", *front_matter, "---", card.format(**facts)])


def _table(metrics: list[dict], columns: dict[str, str]) -> str:
    """Markdown of the validations among `metrics`; `columns` maps their names in metrics.jsonl to titles."""
    lines = [f"| step | tokens | {' | '.join(columns.values())} |", "| --- " * (2 + len(columns)) + "|"]
    for m in metrics:
        if all(m.get(key) is not None for key in columns):
            losses = " | ".join(f"{m[key]:.3f}" for key in columns)
            lines.append(f"| {m['step']} | {m['tokens']:,} | {losses} |")
    return "\n".join(lines)


SHIFTED = "the shift from the autoregressive model is done inside."
NOT_SHIFTED = "hidden state i gives them: there is no shift, and the first token may be a mask too."

DIFFUSION_CARD = """
# A masked diffusion language model

{origin}, trained as a masked diffusion model by {how}
(["Scaling Diffusion Language Models via Adaptation from Autoregressive Models"](https://arxiv.org/abs/2410.17891))
for {trained}.
Architecture {architecture}, bidirectional.

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

## Held-out loss

NELBO in nats a token (an upper bound of the negative log-likelihood), masked cross-entropy in nats a
masked token, both on noise that is the same for every row of the table.

{table}

## Licence

That of the base model and of the training data.
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

## Held-out loss

In nats a token.

{table}

## Licence

That of the base model and of the training data.
"""
