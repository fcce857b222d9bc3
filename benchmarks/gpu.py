"""What the GPU does: attention backends, a stack of Llama-2-7B blocks with its loss, sampling. Needs CUDA.

    python benchmarks/gpu.py                    # prints tables, and writes benchmarks/gpu.md with the GPU's name

TFLOP/s of attention count visible pairs only: forward 4, backward 10 · head_dim FLOPs a pair and head.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from common.cli import command, make_parser
from common.errors import UserError
from pretrain.model.attention import BACKENDS, IMPLEMENTATION, attend, prepare_attention, select_backend
from pretrain.model.forms import Bernoulli, Block, Causal, Form, Full, Window
from pretrain.model.modeling_diffullama import diffusion_class
from pretrain.model.visibility import Visibility

LENGTH, HEADS, HEAD, BATCH = 2048, 32, 128, 8
DOCUMENTS = 8  # a packed row
PEAK = 989e12  # dense bf16 FLOP/s of H100 and H200


def median_ms(run: Callable[[], object], repeats: int = 20) -> float:
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
    """Each form, with and without documents, by each backend that can compute it here."""
    lines = [
        "| attention, 32 heads x 128, 8 rows of 2,048 | backend | forward TFLOP/s | forward + backward TFLOP/s | ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    forms: tuple[Form, ...] = (
        Causal(),
        Full(),
        Window(64),
        Window(512),
        Window(1536),
        Block(64),
        Bernoulli(0.5, (1, 2)),
    )
    for documents in (None, packed()):
        for form in forms:
            for backend in BACKENDS:
                try:
                    select_backend(backend, form, "cuda", torch.bfloat16)
                except ValueError:  # not this form, or not here
                    continue
                lines.append(attention_row(Visibility(form, documents), backend))
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def attention_row(visibility: Visibility, backend: str) -> str:
    """One form by one backend."""
    q, k, v = (torch.randn(BATCH, HEADS, LENGTH, HEAD, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    grad = torch.randn(BATCH, LENGTH, HEADS, HEAD, device="cuda", dtype=torch.bfloat16)
    dense = visibility.dense(LENGTH, "cuda")
    rows = BATCH if visibility.documents is None else 1  # that one mask stands for
    pairs = BATCH * LENGTH**2 if dense is None else int(dense.sum()) * rows
    made = prepare_attention(visibility, BATCH, LENGTH, q.device, q.dtype, backend)
    inputs = tuple(x.requires_grad_() for x in (q, k, v))

    def forward() -> torch.Tensor:
        return attend(torch.nn.Identity(), q, k, v, None, attention_plan=made)[0]

    try:
        with torch.no_grad():
            one = median_ms(forward)
        two = median_ms(lambda: torch.autograd.grad(forward(), inputs, grad))
    except torch.cuda.OutOfMemoryError:
        return f"| {title(visibility)} | {backend} | out of memory | | |"
    flops = HEADS * HEAD * pairs
    return (
        f"| {title(visibility)} | {backend} | {4 * flops / one / 1e9:.0f} | {14 * flops / two / 1e9:.0f} | {two:.2f} |"
    )


def title(visibility: Visibility) -> str:
    """The form, its width where it has one, and whether documents are isolated."""
    width = getattr(visibility.form, "width", None)
    name = visibility.form.name + ("" if width is None else f" {width}")
    return name + ("" if visibility.documents is None else f", {DOCUMENTS} documents a row")


def stack_table(layers: int = 4) -> list[str]:
    """A step of some Llama-2-7B blocks and its whole head, bf16, without an optimizer."""
    lines = [f"| {layers} blocks of Llama-2-7B and its head | ms | tokens/s | MFU |", "| --- | --- | --- | --- |"]
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=layers, vocab_size=32000
    )
    make = diffusion_class(LlamaConfig)._from_config
    model = make(config, attn_implementation=IMPLEMENTATION, dtype=torch.bfloat16).cuda().train()
    ids = torch.randint(0, 32000, (BATCH, LENGTH), device="cuda")
    labels = torch.where(torch.rand(BATCH, LENGTH, device="cuda") < 0.5, ids, -100)
    labels[:, 0] = -100
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    for visibility in (
        Visibility(Causal()),
        Visibility(Window(512)),
        Visibility(Full()),
        Visibility(Bernoulli(0.5, (1, 2))),
    ):

        def step(visibility: Visibility = visibility) -> None:
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=labels, visibility=visibility).loss.backward()

        ms = median_ms(step, 10)
        dense = visibility.dense(LENGTH, "cuda")
        pairs = LENGTH**2 if dense is None else int(dense.sum())
        flops = 6 * BATCH * LENGTH * (matrices + 32000 * 4096 / 2) + 12 * BATCH * layers * 4096 * pairs
        lines.append(
            f"| {title(visibility)} | {ms:.1f} | {BATCH * LENGTH / ms * 1e3:,.0f} | {flops / ms / 1e-3 / PEAK:.1%} |"
        )
    ids[:, 64:192] = 811
    model.eval()
    config.mask_token_id = 811
    began = time.perf_counter()
    model.diffusion_generate(ids[:, :256], steps=32)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    lines.append(f"\nSampling, 8 sequences of 256, 128 masks in 32 steps: {8 * 128 / seconds:,.0f} tokens/s.")
    return lines


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, and write the tables."""
    parser = make_parser("benchmarks/gpu.py", __doc__)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("benchmarks/gpu.py needs a CUDA GPU")
    about = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; medians."
    found = "\n".join([about, "", *attention_table(), "", *stack_table()]) + "\n"
    print(found)
    args.write.write_text(f"`python benchmarks/gpu.py` wrote this.\n\n{found}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
