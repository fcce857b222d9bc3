"""Does annealing help? A small language model is trained here, then adapted in each way; writes benchmarks/ablation.*

    python benchmarks/ablation.py TEXT.jsonl [more.jsonl ...] --out runs/ablation

1. A LLaMA of 4 layers x 192 and a BPE of 4,096 tokens are trained autoregressively on the text, once.
2. Every form of annealing, none, and no shift are adapted from it for equal tokens, at three learning
   rates; the best of each (by masked CE at t = 0.5 on held-out text) runs on two more seeds. Variants of
   schedule, warm-up and clipping take the rate of their form.
3. Table and figure: held-out masked CE, gradient norms, distance from the AR weights.

Finished runs are kept in --out and not run again.
"""

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path

import torch

from common.config import load_config
from data_prep.config import PrepareConfig, SourceConfig
from data_prep.prepare import prepare
from pretrain.config import RunConfig
from pretrain.data import TrainData, collate, step_data
from pretrain.diffusion import loss_weights
from pretrain.model.loss import linear_cross_entropy
from pretrain.model.modeling_diffullama import IGNORE, diffusion_class
from pretrain.model.visibility import Visibility
from pretrain.optimization import learning_rate
from pretrain.trainer import visibility_at

LENGTH, ROWS, VOCABULARY = 256, 8, 4096
TIMES = (0.15, 0.5, 0.9)
RATES = (2.5e-4, 7e-4, 2e-3)
SEEDS = (1, 2, 3)
SETTINGS = {
    # name: overrides of the run configuration; annealed over the first half unless said otherwise
    "none": {"annealing.form": "none"},
    "bernoulli": {"annealing.form": "bernoulli"},
    "window": {"annealing.form": "window"},
    "block": {"annealing.form": "block"},
    "none, no shift": {"annealing.form": "none"},
    "window, first eighth": {"annealing.form": "window", "annealing.share": 0.125},
    "window, whole run": {"annealing.form": "window", "annealing.share": 1.0},
    "none, no warm-up": {"annealing.form": "none", "optimizer.warmup_steps": 0},
    "window, no warm-up": {"annealing.form": "window", "optimizer.warmup_steps": 0},
    "none, no clipping": {"annealing.form": "none", "optimizer.max_grad_norm": 1e9},
    "window, no clipping": {"annealing.form": "window", "optimizer.max_grad_norm": 1e9},
}


def corpus(files: list[str], out: Path) -> str:
    """The files' shards, in a vocabulary trained on them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = out / "tokenizer"
    if not folder.exists():
        texts = [json.loads(line)["text"] for file in files for line in open(file, encoding="utf-8")]  # noqa: SIM115
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet)
        backend.train_from_iterator(random.Random(0).sample(texts, min(len(texts), 1000)), trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    config = PrepareConfig([SourceConfig("text", files)], str(folder), seq_len=LENGTH, output_dir=str(out / "shards"))
    prepare(config)
    return config.output_dir


def new_model(state=None):
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY + 1, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = diffusion_class(LlamaConfig)._from_config(config, attn_implementation="diffullama")
    if state is not None:
        model.load_state_dict(state)
        with torch.no_grad():  # the mask begins as the mean of all tokens
            embedding = model.get_input_embeddings().weight
            embedding[VOCABULARY] = embedding[:VOCABULARY].mean(0)
    return model


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)


def update(model, optimizer, loss, rate: float, max_norm: float = 1.0) -> float:
    """One step; returns the gradient norm before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(norm)


def pretrain_ar(shards: str, out: Path, steps: int) -> dict:
    """The autoregressive base: the same class read causally on clean text."""
    path = out / "base.pt"
    if not path.exists():
        model, data = new_model(), TrainData(shards, VOCABULARY, seed=0)
        optimizer = optimizer_of(model)
        config = load_config(RunConfig, None, ["optimizer.lr=3e-3", "optimizer.warmup_steps=50"])
        began = time.monotonic()
        for step in range(steps):
            batch = step_data(data, step, ROWS, ROWS, 0, 1).batches[0]
            x0 = torch.where(batch.labels == IGNORE, batch.xt, batch.labels)
            labels = x0.clone()
            labels[:, 0] = IGNORE
            loss = model(input_ids=x0, labels=labels, visibility=Visibility("causal")).loss
            update(model, optimizer, loss, learning_rate(step, steps, config.optimizer))
            if step % 100 == 0:
                print(
                    f"base: step {step} of {steps}, {loss.item():.3f} nats, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
        torch.save({"state": model.state_dict(), "loss": loss.item()}, path)
    return torch.load(path, weights_only=True)


def save_base(base: dict, out: Path) -> None:
    """out/base: the autoregressive model for `from_pretrained`, for the other benchmarks."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    if not (out / "base").exists():
        model = LlamaForCausalLM(new_model().config)
        model.load_state_dict(base["state"])
        model.save_pretrained(out / "base")
        AutoTokenizer.from_pretrained(out / "tokenizer").save_pretrained(out / "base")


def losses(model, batch, visibility: Visibility, weights, shift: bool):
    """(weighted loss, nll, predicted) at masked positions; without shift hidden state i predicts token i itself."""
    if shift:
        output = model(input_ids=batch.xt, labels=batch.labels, loss_weights=weights, visibility=visibility)
        return output.loss, output.nll, output.predicted
    from pretrain.model.attention import plan

    made = plan(visibility, *batch.xt.shape, batch.xt.device, model.dtype)
    hidden = model.base_model(input_ids=batch.xt, use_cache=False, attention_plan=made).last_hidden_state
    chosen = batch.labels != IGNORE
    head = model.get_output_embeddings()
    return linear_cross_entropy(hidden[chosen], head.weight, None, batch.labels[chosen], weights)


@torch.no_grad()
def validate(model, data: TrainData, shift: bool, rows: int = 192, times=TIMES) -> dict[str, float]:
    """Held-out masked CE and accuracy at `times`, bidirectionally, on noise that never changes."""
    model.eval()
    found = {}
    for t in times:
        samples, total, hits, count = data.validation_samples(rows, t), 0.0, 0, 0
        for first in range(0, len(samples), ROWS):
            batch = collate(samples[first : first + ROWS], False)
            _, nll, predicted = losses(model, batch, Visibility(), torch.ones_like(batch.t), shift)
            hits += int((predicted == batch.labels[batch.labels != IGNORE]).sum())
            total, count = total + nll.sum().item(), count + len(nll)
        found[f"t{t:g}"], found[f"accuracy{t:g}"] = total / count, hits / count
    model.train()
    return found


def adapt(name: str, rate: float, seed: int, shards: str, base: dict, out: Path, steps: int) -> dict:
    """One run, or its result if it is there."""
    path = out / "runs" / f"{name.replace(', ', '-').replace(' ', '_')}-{rate:g}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    settings = {"optimizer.lr": rate, "optimizer.warmup_steps": steps // 10, "train.seed": seed, **SETTINGS[name]}
    share = settings.pop("annealing.share", 0.5)
    settings["annealing.steps"] = max(1, round(share * steps))
    config = load_config(RunConfig, None, [f"{key}={value}" for key, value in settings.items()])
    data = TrainData(shards, VOCABULARY, seed=seed)
    model, shift = new_model(base["state"]), "no shift" not in name
    optimizer, norms, curve = optimizer_of(model), [], []
    began = time.monotonic()
    for step in range(steps):
        if step % max(1, steps // 8) == 0:
            curve.append([step * ROWS * LENGTH, validate(model, data, shift, 48, (0.5,))["t0.5"]])
        part = step_data(data, step, ROWS, ROWS, 0, 1)
        batch = part.batches[0]
        visibility = visibility_at(config, step, LENGTH)
        loss, *_ = losses(model, batch, visibility, loss_weights(batch.t, part.masked), shift)
        rate_now = learning_rate(step, steps, config.optimizer)
        norms.append(update(model, optimizer, loss, rate_now, config.optimizer.max_grad_norm))
    moved = [
        ((p - base["state"][n]).norm() / base["state"][n].norm()).item()
        for n, p in model.state_dict().items()
        if n.endswith("proj.weight")
    ]
    result = {
        "name": name, "lr": rate, "seed": seed, "tokens": steps * ROWS * LENGTH, **validate(model, data, shift),
        "first_norm": norms[0], "max_norm": max(norms), "late_norm": statistics.median(norms[steps // 2 :]),
        "moved": statistics.mean(moved), "minutes": (time.monotonic() - began) / 60,
    }  # fmt: skip
    result["curve"] = [*curve, [result["tokens"], validate(model, data, shift, 48, (0.5,))["t0.5"]]]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))
    print(
        f"{name:<24} lr {rate:g} seed {seed}: "
        + ", ".join(f"{k} {result[k]:.3f}" for k in result if k[0] == "t" and k[1:2].isdigit()),
        flush=True,
    )
    return result


def figure(best: dict[str, list[dict]], path: Path) -> None:
    """Left: held-out loss over tokens, mean and range of the seeds. Right: what each gains over none, by seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (curves, gains) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1, 1.2], constrained_layout=True)
    tuned = [name for name in best if "," not in name or "shift" in name]
    for i, name in enumerate(tuned):
        runs = best[name]
        tokens = [t for t, _ in runs[0]["curve"]]
        values = list(zip(*[[v for _, v in run["curve"]] for run in runs]))
        curves.plot(tokens, [statistics.mean(v) for v in values], color=f"C{i}", label=name)
        curves.fill_between(tokens, [min(v) for v in values], [max(v) for v in values], color=f"C{i}", alpha=0.15)
    curves.set(xlabel="tokens of adaptation", title="held-out CE at masked tokens, t = 0.5 (nats)")
    curves.legend(fontsize=8)
    shown = [name for name in best if name != "none" and "shift" not in name]
    for offset, (key, label) in enumerate((("t0.15", "t = 0.15"), ("t0.5", "t = 0.5"), ("t0.9", "t = 0.9"))):
        points = [
            (run[key] - none[key], row + 0.2 * (offset - 1))
            for row, name in enumerate(shown)
            for run, none in zip(best[name], best["none"])
        ]
        gains.plot(*zip(*points), "o", color=f"C{offset}", markersize=4, label=label)
    gains.axvline(0, color="0.4", linewidth=0.8)
    gains.set_yticks(range(len(shown)), shown, fontsize=8)
    gains.invert_yaxis()
    gains.set(title="CE less that of none, same seed (nats): left is better")
    gains.legend(fontsize=8)
    for axis in (curves, gains):
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", help="JSONL with a field `text`")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--base_steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shards = corpus(args.text, args.out)
    base = pretrain_ar(shards, args.out, args.base_steps)
    save_base(base, args.out)
    best: dict[str, list[dict]] = {}
    for name in SETTINGS:
        like = name.partition(",")[0] if "shift" not in name else name  # variants take the rate of their form
        if like in best:
            rate = best[like][0]["lr"]
        else:
            tried = [adapt(name, rate, SEEDS[0], shards, base, args.out, args.steps) for rate in RATES]
            rate = min(tried, key=lambda run: run["t0.5"])["lr"]
        best[name] = [adapt(name, rate, seed, shards, base, args.out, args.steps) for seed in SEEDS]
    lines = [
        f"An autoregressive LLaMA of 4 layers x 192 ({args.base_steps * ROWS * LENGTH / 1e6:.1f}M tokens, "
        f"{base['loss']:.2f} nats a token at the end), adapted for {args.steps * ROWS * LENGTH / 1e3:.0f}k tokens; "
        f"the best of the learning rates {', '.join(f'{rate:g}' for rate in RATES)} by masked CE at t = 0.5; mean and "
        f"half range of {len(SEEDS)} seeds, held-out text.",
        "",
        "| annealing | lr | CE, t = 0.15 | t = 0.5 | t = 0.9 | CE less that of none, by seed: t = 0.15 | t = 0.5 "
        "| accuracy, t = 0.15 | gradient norm: first, largest, second half | moved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def spread(runs: list[dict], key: str, digits: int = 3) -> str:
        values = [run[key] for run in runs]
        return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"

    def less_none(runs: list[dict], key: str) -> str:
        """Of the same seed, so the same rows and noise."""
        return ", ".join(f"{run[key] - none[key]:+.3f}" for run, none in zip(runs, best["none"]))

    for name, runs in best.items():
        mean = {
            key: statistics.mean(run[key] for run in runs) for key in ("first_norm", "max_norm", "late_norm", "moved")
        }
        lines.append(
            f"| {name} | {runs[0]['lr']:g} | {' | '.join(spread(runs, f't{t:g}') for t in TIMES)} | "
            f"{less_none(runs, 't0.15')} | {less_none(runs, 't0.5')} | {spread(runs, 'accuracy0.15')} | "
            f"{mean['first_norm']:.1f}, {mean['max_norm']:.1f}, {mean['late_norm']:.1f} | {mean['moved']:.2f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    Path(__file__).with_suffix(".md").write_text(f"`python benchmarks/ablation.py` wrote this.\n\n{text}")
    figure(best, Path(__file__).with_suffix(".png"))
    assert all(math.isfinite(run["t0.5"]) for runs in best.values() for run in runs)


if __name__ == "__main__":
    main()
