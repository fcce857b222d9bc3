"""A run's checkpoint to a Hugging Face folder that loads without this project.

    python -m tools.export runs/diffugpt_s exports/diffugpt_s
    python -m tools.export runs/diffugpt_s exports/base --step 0     # the base with its mask token, untrained

The folder holds safetensors under the base architecture's own parameter names, config.json with
auto_map, the tokenizer with its mask token, the code that trained, and a model card:

    AutoModel.from_pretrained("exports/diffugpt_s", trust_remote_code=True)

DeepSpeed keeps checkpoints as pickles: export only runs that you trust.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from common.config import load_config
from common.errors import UserError
from pretrain import adapt, checkpoint
from pretrain.config import RunConfig
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.telemetry import read_metrics

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD_BYTES = 4 << 30  # of a file; as much is in memory at once


def export(run_dir: str | Path, out_dir: str | Path, step: int | None = None, dtype: str = "auto") -> Path:
    """Write the checkpoint folder; returns its path.

    `step` None is the newest checkpoint, 0 the base before training. `dtype` "auto" is the one that
    training computed in, which gives the trained model's logits exactly.
    Raises UserError for a folder that is not empty, a run without that checkpoint.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} is not empty; choose another folder or delete it")
    config = load_config(RunConfig, _need(run_dir / "config.yaml"))
    model_config = AutoConfig.from_pretrained(_need(run_dir / "model"))
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    if step == 0:
        base = adapt.base_config(config.model, seq_len=0)
        model = adapt.load_model(config.model, base, model_config.mask_token_id, torch.float32)
        model.config.diffusion, about = model_config.diffusion, {"step": 0, "tokens": 0, "dtype": "fp32"}
        weights = model.state_dict()
    else:
        folder, about = _checkpoint(run_dir, step)
        model = _empty_model(model_config)
        weights = _weights(folder, about["zero_stage"])
    saved_as = DTYPES[about["dtype"] if dtype == "auto" else dtype]
    model.config.dtype, model.config.architectures = saved_as, [type(model).__name__]
    model.config.diffusion = {**model.config.diffusion, "step": about["step"], "tokens": about["tokens"]}

    temporary = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_weights(weights, model, saved_as, temporary)
    model.save_code(temporary)
    model.config.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(model_card(config, model, about, read_metrics(run_dir)), encoding="utf-8")
    if out_dir.exists():
        out_dir.rmdir()
    os.replace(temporary, out_dir)
    return out_dir


def _need(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} not found; expected the run_dir of `deepspeed pretrain/main.py`")
    return path


def _checkpoint(run_dir: Path, step: int | None) -> tuple[Path, dict]:
    found = checkpoint.find(run_dir, step)
    if found is None:
        there = sorted(f.name for f in (run_dir / "checkpoints").glob("step_*")) or ["none"]
        raise UserError(
            f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}; it has {', '.join(there)}"
        )
    return found


def _empty_model(config) -> torch.nn.Module:
    """The architecture without storage, to be filled by assignment."""
    with torch.device("meta"):
        return diffusion_class(type(config))(config)


def _weights(folder: Path, stage: int) -> dict:
    """The fp32 weights of a DeepSpeed checkpoint of any ZeRO stage by name; `.contiguous()` of each reads it."""
    if stage == 0:
        path = folder / "mp_rank_00_model_states.pt"
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)


def save_weights(weights: dict, model: torch.nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Safetensors as transformers writes them, one file at a time in memory.

    `weights` has values with `.contiguous()`; a weight that is tied to another is left out. Raises UserError for a
    name or shape that is not the model's.
    """
    tied = model.all_tied_weights_keys
    files: list[dict[str, torch.Size]] = [{}]
    size = total = 0
    for name, expected in model.state_dict().items():
        if name in tied:
            continue
        found = weights.get(name, weights.get(next((t for t, source in tied.items() if source == name), "")))
        if found is None or found.shape != expected.shape:
            what = (
                "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
            )
            raise UserError(f"the checkpoint does not fit the run's configuration: {name} {what}")
        needed = expected.numel() * dtype.itemsize
        if files[-1] and size + needed > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = found
        size, total = size + needed, total + needed
    index = {}
    for number, part in enumerate(tqdm(files, desc="write", unit="file", disable=len(files) == 1), 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {key: value.contiguous().to(dtype) for key, value in part.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    if len(files) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def model_card(config: RunConfig, model, about: dict, metrics: list[dict]) -> str:
    """README.md of the checkpoint, with the Hub's front matter."""
    validated = [m for m in metrics if "val_nelbo" in m and m["step"] <= about["step"]]
    rows = "\n".join(
        f"| {m['step']} | {m['tokens']:,} | {m['val_nelbo']:.3f} | {m['val_masked_ce']:.3f} |" for m in validated
    )
    count = sum(p.numel() for p in model.parameters())
    hub_name = not Path(config.model.base).exists()
    front = f"base_model: {config.model.base}\n" if hub_name else ""
    return f"""---
library_name: transformers
pipeline_tag: fill-mask
tags: [diffusion, masked-diffusion, text-diffusion]
{front}---

# A masked diffusion language model

{Path(config.model.base).name}, adapted from autoregressive to masked diffusion by continual pretraining
(["Scaling Diffusion Language Models via Adaptation from Autoregressive Models"](https://arxiv.org/abs/2410.17891))
for {about["step"]:,} steps, {about["tokens"]:,} tokens, on `{config.data.path}`.
Architecture `{model.config.model_type}`, {count / 1e6:.1f}M parameters, bidirectional.

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
text = "Once upon a time there was a" + tokenizer.mask_token * 6 + " who lived in a castle."
ids = tokenizer(text, return_tensors="pt").input_ids
print(tokenizer.decode(model.diffusion_generate(ids, steps=6, order="confidence", temperature=0)[0]))
```

`forward(input_ids).logits[:, i]` predict token i; the shift from the autoregressive model is done inside.

## Held-out loss

NELBO in nats a token (an upper bound of the negative log-likelihood), masked cross-entropy in nats a
masked token, both on noise that is the same for every row of the table.

| step | tokens | NELBO | masked CE |
| --- | --- | --- | --- |
{rows}

## Licence

That of the base model and of the training data.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir")
    parser.add_argument("out_dir", help="must be empty or not there")
    parser.add_argument("--step", type=int, help="default: the newest checkpoint; 0: the base before training")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as trained")
    args = parser.parse_args(argv)
    try:
        print(f"wrote {export(args.run_dir, args.out_dir, args.step, args.dtype)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
