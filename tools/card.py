"""The model card of an export: README.md with the Hub's front matter. Not a verb."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel

from common.errors import UserError
from pretrain.config import DataConfig, ModelConfig
from pretrain.corpora import folders, load_corpora
from pretrain.model.reading import uses_shift
from pretrain.model.stock import BIDIRECTIONAL

from .figures import draw_runs
from .run_folder import RunFolder
from .shipping import FILL_A_GAP

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
    licence = {} if fresh else licence_of(base)
    evaluation = run.path / EVALUATION
    name = Path(base.base).name
    parameters = f"{model.num_parameters() / 1e6:.1f}M parameters"
    trained = f"{about['step']:,} steps, {about['tokens']:,} tokens"
    facts = {
        "origin": f"A new model with the tokenizer of {name}" if fresh else name,
        "how": f"{'pretraining' if fresh else 'continual pretraining'} for {trained}",
        "architecture": f"`{model.config.model_type}`, {parameters}",
        "use": _use(run, model, target),
        "recipe": _recipe(run),
        "data": _data(run.config.data),
        "figure": figure,
        "evaluation": f"## Evaluation\n\n{evaluation.read_text(errors='replace')}\n" if evaluation.exists() else "",
        "licence": f"The base model's is `{licence['license']}`." if licence else UNKNOWN_LICENCE,
    }
    data = {"library_name": "transformers", "base_model": None if fresh or not on_hub(base) else base.base, **licence}
    if run.config.objective == "autoregressive":
        facts |= {"nats": CAUSAL_NATS, "table": _table(run.metrics, {run.reported.held_out: "cross-entropy"})}
        intro, data["pipeline_tag"] = CAUSAL_INTRO, "text-generation"
    else:
        columns = {"val_nelbo": "NELBO", "val_masked_ce": "masked CE"}
        facts |= {"nats": DIFFUSION_NATS, "table": _table(run.metrics, columns)}
        intro = CAUSAL_AGAIN_INTRO if target == "autoregressive" else DIFFUSION_INTRO
        if target != "autoregressive":
            data |= {"pipeline_tag": "fill-mask", "tags": ["diffusion", "masked-diffusion", "text-diffusion"]}
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n{(intro + CARD).format(**facts)}"


def on_hub(base: ModelConfig) -> bool:
    """Whether the base came from the Hub: no folder, and its configuration is in the cache of what was downloaded."""
    try:
        cached = try_to_load_from_cache(base.base, "config.json", revision=base.revision)
    except HFValidationError:  # it can only be a path
        return False
    return isinstance(cached, str) and not Path(base.base).exists()


def licence_of(base: ModelConfig) -> dict[str, Any]:
    """What the base's model card says of its licence: `license`, and with others their name and link.

    The card is that of its folder or of the Hub. Empty where it does not say, or cannot be reached or read.
    """
    card = Path(base.base) / "README.md"
    try:
        if card.exists():
            data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        elif on_hub(base):
            found = HfApi().model_info(base.base, revision=base.revision, timeout=5).card_data
            data = found.to_dict() if found else {}
        else:
            return {}
    except Exception:  # whatever hinders it, a network or another's front matter: the export goes on
        return {}
    said = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    return said if isinstance(said.get("license"), str) else {}


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


def _data(data: DataConfig) -> str:
    """Markdown of what the corpora hold; one line where one of them is no longer there."""
    names = {folder: f"`{Path(folder).name}`" for folder in folders(data.path)}
    try:
        corpora = load_corpora(data.path)
        weights = corpora.mixture(data.weights)
    except UserError:
        return f"The {'corpus' if len(names) == 1 else 'corpora'} {', '.join(names.values())}."
    of = f" of {next(iter(names.values()))}" if len(names) == 1 else ""
    lines = [f"| source{of} | weight | rows of {corpora.seq_len} tokens |", "| --- | --- | --- |"]
    for name, weight in weights.items():
        source = corpora.sources[name]
        where = "" if of or "/" in name else f" of {names[source.folder]}"
        lines.append(f"| {name}{where} | {float(weight):g} | {source.rows:,} |")
    return "\n".join(lines)


def _table(metrics: list[dict], columns: dict[str, str]) -> str:
    """Markdown of the validations among `metrics`; `columns` maps their names in metrics.jsonl to titles."""
    lines = [f"| step | tokens | {' | '.join(columns.values())} |", "| --- " * (2 + len(columns)) + "|"]
    for m in metrics:
        if all(m.get(key) is not None for key in columns):
            losses = " | ".join(f"{m[key]:.3f}" for key in columns)
            lines.append(f"| {m['step']} | {m['tokens']:,} | {losses} |")
    return "\n".join(lines)


def _use(run: RunFolder, model: Any, target: str) -> str:
    """How to load and ask the model."""
    if run.config.objective == "autoregressive":
        return CAUSAL
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

TRANSFORMERS = f"""
{FILL_A_GAP}
`generation_config.json` holds the defaults: one token a step, from left to right. `order` (also entropy, confidence,
random), `block_length`, `threshold`, `entropy_bound`, `cache="window"`, `streamer` and others are in the docstring.

`forward(input_ids).logits[:, i]` predict token i; {{reads}}
{{stock}}"""

STOCK = """
### Without remote code

`config.json` says `"is_causal": false`, so transformers' own class is bidirectional too, with eager and sdpa attention:

```python
model = AutoModelForCausalLM.from_pretrained(path)
logits = model(ids, use_cache=False).logits  # row i predicts token {row}
filled = model.generate(ids, custom_generate=path, trust_remote_code=True)  # runs the code of this folder
```

Without `custom_generate`, `generate` and `pipeline("text-generation")` write from left to right, which this model has
not learnt: the text means nothing. To save a changed model together with its code, load it by `AutoModel`.
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
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(path)
```
"""

CAUSAL = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))
```
"""

PAPER = (
    '["Scaling Diffusion Language Models via Adaptation from Autoregressive Models"](https://arxiv.org/abs/2410.17891)'
)

DIFFUSION_INTRO = f"""
# A masked diffusion language model

{{origin}}, trained as a masked diffusion model by {{how}}
({PAPER}).
Architecture {{architecture}}, bidirectional.
"""

CAUSAL_AGAIN_INTRO = f"""
# Weights of a masked diffusion language model, in its base's architecture

{{origin}}, trained as a masked diffusion model by {{how}}
({PAPER}).
Architecture {{architecture}}, with the base's vocabulary and causal attention. It was not trained to be causal: it is
for comparison, and for training on.
"""

CAUSAL_INTRO = """
# An autoregressive language model

{origin}, trained on next-token prediction by {how}.
Architecture {architecture}, causal. It is a plain model of transformers: no code beside the weights, nothing to mask.
"""

DIFFUSION_NATS = """NELBO in nats a token (an upper bound of the negative log-likelihood), masked cross-entropy in
nats a masked token, both on noise that is the same for every row of the table."""
CAUSAL_NATS = "In nats a token."

CARD = """
## Use
{use}
## Training

{recipe}

{data}

## Held-out loss

{nats}

{table}

{figure}
{evaluation}
## Licence

{licence}
"""
