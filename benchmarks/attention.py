"""Attention and loss beside the plain ways, forward and backward on this machine; writes benchmarks/attention.md.

    python benchmarks/attention.py            # CPU: ratios in one run
    python benchmarks/gpu.py                  # CUDA: TFLOP/s of each backend, a 7B block, sampling

Shapes are SmolLM2-135M's: 9 query and 3 key-value heads of 64, width 576, vocabulary 49,152.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common.cli import command, make_parser
from pretrain.model.attention import AttentionPlan, attend, prepare_attention
from pretrain.model.forms import Bernoulli, Causal, Full, Window
from pretrain.model.loss import select_loss
from pretrain.model.visibility import Visibility

LENGTH, HEADS, GROUPS, HEAD, WIDTH, VOCABULARY = 2048, 9, 3, 64, 576, 49_152
PARTS = [512, 256, 128, 384, 256, 192, 64, 256]  # eight documents


def medians(passes: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each pass; they take turns, and the first turn does not count."""
    times = {name: [] for name in passes}
    for turn in range(repeats + 1):
        for name, run in passes.items():
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def attention(repeats: int) -> list[str]:
    """The table of attention: a dense mask beside what the product does."""
    documents = torch.repeat_interleave(torch.arange(len(PARTS)), torch.tensor(PARTS))[None]
    shapes = [(1, n, LENGTH, HEAD) for n in (HEADS, GROUPS, GROUPS)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    lines = ["| rows of 2,048 tokens | dense mask | ours | ours / dense |", "| --- | --- | --- | --- |"]
    for title, visibility in (
        ("8 isolated documents, full", Visibility(Full(), documents)),
        ("8 isolated documents, causal", Visibility(Causal(), documents)),
        ("8 isolated documents, window of 64", Visibility(Window(64), documents)),
        ("8 isolated documents, Bernoulli 0.5", Visibility(Bernoulli(0.5), documents)),
        ("one document, full", Visibility()),
        ("one document, causal", Visibility(Causal())),
        ("one document, window of 64", Visibility(Window(64))),
    ):
        position = torch.arange(LENGTH)
        dense = visibility.dense(LENGTH, "cpu")
        if dense is None:
            dense = torch.ones_like(position[:, None] + position, dtype=torch.bool)[None, None]

        def run(made):
            out, _ = attend(torch.nn.Identity(), q, k, v, None, attention_plan=made)
            torch.autograd.grad(out.sum(), (q, k, v))

        ours = prepare_attention(visibility, 1, LENGTH, torch.device("cpu"), torch.float32)
        passes = {"dense": lambda d=dense: run(AttentionPlan("sdpa", mask=d)), "ours": lambda p=ours: run(p)}
        found = medians(passes, repeats)
        lines.append(
            f"| {title} | {found['dense'] * 1e3:.0f} ms | {found['ours'] * 1e3:.0f} ms | "
            f"{found['ours'] / found['dense']:.2f} |"
        )
    return lines


def full_logits(hidden, weight, targets, masked, weights) -> torch.Tensor:
    """Logits of every token, then the loss where masked: what a Trainer with labels does."""
    nll = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    return (nll * masked * weights).sum()


def selected(hidden, weight, targets, masked, weights, how="chunked") -> torch.Tensor:
    """The product's loss, of the masked alone."""
    where = masked.nonzero()[:, 0]
    loss_of = select_loss(how, hidden.device)
    return loss_of(hidden[where], weight, None, targets[where], weights[where])[0]


def torchs_own(hidden, weight, targets, masked, weights) -> torch.Tensor:
    """torch.nn.functional.linear_cross_entropy in chunks, of the masked; it takes no weights a token."""
    where, options = masked.nonzero()[:, 0], torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden[where], weight, targets[where], reduction="sum", options=options)


def products(hidden, weight, targets, masked, weights) -> torch.Tensor:
    """The three matrix products of the masked half alone: the floor."""
    states = hidden[masked.nonzero()[:, 0]]
    with torch.no_grad():
        for part in states.split(256):
            logits = torch.mm(part, weight.T)
            torch.mm(logits, weight)
            torch.mm(logits.T, part)
    return hidden.sum() + weight.sum()


LOSSES = {
    "full": (full_logits, "logits of all tokens (plain)"),
    "selected": (lambda *a: selected(*a, how="plain"), "logits of masked tokens (model.loss=plain)"),
    "torch": (torchs_own, "torch's linear_cross_entropy, masked tokens, unweighted"),
    "ours": (selected, "**chunks of masked tokens (model.loss=chunked)**"),
    "floor": (products, "the matrix products of masked tokens alone"),
}


def inputs() -> tuple[torch.Tensor, ...]:
    """(hidden, weight, targets, masked, weights) of one row, half of it masked."""
    torch.manual_seed(0)
    hidden = torch.randn(LENGTH, WIDTH, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH) / 24).requires_grad_()
    masked = torch.rand(LENGTH) < 0.5
    return hidden, weight, torch.randint(0, VOCABULARY, (LENGTH,)), masked, torch.rand(LENGTH)


def loss(repeats: int) -> list[str]:
    """The table of losses: time here, memory each in a process of its own."""
    data = inputs()
    passes = {name: lambda f=f: torch.autograd.grad(f(*data), data[:2]) for name, (f, _) in LOSSES.items()}
    seconds = medians(passes, repeats)
    memory = {}
    for name in LOSSES:
        outcome = subprocess.run(
            [sys.executable, __file__, "--memory", name], text=True, capture_output=True, check=True
        )
        memory[name] = float(outcome.stdout.split()[-1])
    lines = [
        "| loss of 2,048 tokens, half masked | time | of full | peak memory | of full |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, (_, title) in LOSSES.items():
        lines.append(
            f"| {title} | {seconds[name] * 1e3:.0f} ms | {seconds[name] / seconds['full']:.2f} | "
            f"{memory[name]:.0f} MB | {memory[name] / memory['full']:.2f} |"
        )
    return lines


def peak_memory(name: str) -> float:
    """MB that one forward and backward add to a process that holds the inputs."""
    data = inputs()
    small = [x[:64] if x.shape[0] == LENGTH else x for x in data]
    LOSSES[name][0](*small).detach()  # libraries, threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held now
    before = _status("VmHWM")
    gradients = torch.autograd.grad(LOSSES[name][0](*data), data[:2])
    del gradients
    return _status("VmHWM") - before


def _status(field: str) -> float:
    """MB, from Linux."""
    return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if field in x) / 1024


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, and write the tables."""
    parser = make_parser("benchmarks/attention.py", __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_suffix(".md"), help="default: %(default)s")
    parser.add_argument("--memory", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        print(peak_memory(args.memory))
        return 0
    about = (
        f"fp32, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}; "
        f"forward and backward, medians of {args.repeats} that take turns."
    )
    found = "\n".join([about, "", *attention(args.repeats), "", *loss(args.repeats)]) + "\n"
    print(found)
    args.write.write_text(f"`python benchmarks/attention.py` wrote this.\n\n{found}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
