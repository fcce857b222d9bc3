"""What the GPU does: attention backends, a stack of Llama-2-7B blocks with its loss, sampling. Needs CUDA.

    python benchmarks/gpu.py                    # prints tables, and writes benchmarks/gpu.md with the GPU's name

TFLOP/s of attention count visible pairs only: forward 4, backward 10 · head_dim FLOPs a pair and head.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from pretrain.model import attention
from pretrain.model.attention import attend, plan
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.visibility import Visibility

LENGTH, HEADS, HEAD, BATCH = 2048, 32, 128, 8
DOCUMENTS = 8  # a packed row


def median_ms(run, repeats: int = 20) -> float:
    """Milliseconds by CUDA events, after three runs that do not count."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def packed() -> torch.Tensor:
    """(BATCH, LENGTH): DOCUMENTS documents of unequal lengths a row, the same each time."""
    rows, generator = [], torch.Generator().manual_seed(0)
    for _ in range(BATCH):
        cuts = (torch.randperm(LENGTH - 1, generator=generator)[: DOCUMENTS - 1] + 1).sort().values
        rows.append(torch.zeros(LENGTH, dtype=torch.long).index_fill(0, cuts, 1).cumsum(0))
    return torch.stack(rows).cuda()


def attention_table() -> list[str]:
    lines = [
        "| attention, 32 heads x 128, 8 rows of 2,048 | backend | forward TFLOP/s | forward + backward TFLOP/s | ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    grad = torch.randn(BATCH, LENGTH, HEADS, HEAD, device="cuda", dtype=torch.bfloat16)
    for documents in (None, packed()):
        for visibility in (
            Visibility("causal", documents=documents),
            Visibility("full", documents=documents),
            *(Visibility("window", width=w, documents=documents) for w in (64, 512, 1536)),
            Visibility("block", width=64, documents=documents),
            Visibility("bernoulli", 0.5, key=(1, 2), documents=documents),
        ):
            dense = visibility.dense(LENGTH, "cuda")
            rows = BATCH if documents is None else 1
            pairs = BATCH * LENGTH**2 if dense is None else int(dense.sum()) * rows
            for backend, forms in attention.BACKENDS.items():
                if visibility.form not in forms or (backend == "flash_attn" and attention._flash_attn() is None):
                    continue
                made = plan(visibility, BATCH, LENGTH, q.device, q.dtype, backend)
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]

                def forward(made=made, inputs=inputs):
                    return attend(None, *inputs, None, attention_plan=made)[0]

                def both(forward=forward, inputs=inputs):
                    torch.autograd.grad(forward(), inputs, grad)

                try:
                    with torch.no_grad():
                        one = median_ms(forward)
                    two = median_ms(both)
                except torch.cuda.OutOfMemoryError:
                    lines.append(f"| {title(visibility)} | {backend} | out of memory | | |")
                    continue
                flops = HEADS * HEAD * pairs
                lines.append(
                    f"| {title(visibility)} | {backend} | {4 * flops / one / 1e9:.0f} | "
                    f"{14 * flops / two / 1e9:.0f} | {two:.2f} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def title(visibility: Visibility) -> str:
    width = f" {visibility.width}" if visibility.form in ("window", "block") else ""
    return f"{visibility.form}{width}" + ("" if visibility.documents is None else f", {DOCUMENTS} documents a row")


def stack_table(layers: int = 4) -> list[str]:
    """A step of some Llama-2-7B blocks and its whole head, bf16, without an optimizer."""
    lines = [f"| {layers} blocks of Llama-2-7B and its head | ms | tokens/s | MFU |", "| --- | --- | --- | --- |"]
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers, vocab_size=32000
    )
    make = diffusion_class(LlamaConfig)._from_config
    model = make(config, attn_implementation=attention.IMPLEMENTATION, dtype=torch.bfloat16).cuda().train()
    ids = torch.randint(0, 32000, (BATCH, LENGTH), device="cuda")
    labels = torch.where(torch.rand(BATCH, LENGTH, device="cuda") < 0.5, ids, -100)
    labels[:, 0] = -100
    peak = 989e12  # dense bf16 of H100 and H200
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    for name, visibility in (
        ("causal", Visibility("causal")),
        ("window 512", Visibility("window", width=512)),
        ("full", Visibility()),
        ("Bernoulli 0.5", Visibility("bernoulli", 0.5, key=(1, 2))),
    ):

        def step(visibility=visibility):
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=labels, visibility=visibility).loss.backward()

        ms = median_ms(step, 10)
        dense = visibility.dense(LENGTH, "cuda")
        pairs = LENGTH**2 if dense is None else int(dense.sum())
        flops = 6 * BATCH * LENGTH * (matrices + 32000 * 4096 / 2) + 12 * BATCH * layers * 4096 * pairs
        lines.append(f"| {name} | {ms:.1f} | {BATCH * LENGTH / ms * 1e3:,.0f} | {flops / ms / 1e-3 / peak:.1%} |")
    ids[:, 64:192] = 811
    model.eval()
    config.mask_token_id = 811
    began = time.perf_counter()
    model.diffusion_generate(ids[:, :256], steps=32)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    lines.append(f"\nSampling, 8 sequences of 256, 128 masks in 32 steps: {8 * 128 / seconds:,.0f} tokens/s.")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: benchmarks/gpu.py needs a CUDA GPU")
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians."
    found = "\n".join([about, "", *attention_table(), "", *stack_table()]) + "\n"
    print(found)
    Path(__file__).with_suffix(".md").write_text(f"`python benchmarks/gpu.py` wrote this.\n\n{found}")


if __name__ == "__main__":
    main()
