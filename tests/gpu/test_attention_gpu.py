"""The CUDA backends against a dense fp64 reference, forward and gradients. `make gpu-check` runs these."""

import math

import pytest
import torch

from pretrain.model import attention
from pretrain.model.attention import attend, plan
from pretrain.model.loss import linear_cross_entropy
from pretrain.model.visibility import Visibility

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTH = 384
PARTS = [[100, 28, 256], [5, 379, 0]]  # documents of the two rows
CASES = [
    ("full", 0, 0),
    ("causal", 0, 0),
    ("window", 1, 0),
    ("window", 100, 0),
    ("block", 16, 0),
    ("bernoulli", 0, 0.3),
]


def backends(form: str) -> list[str]:
    return [name for name, forms in attention.BACKENDS.items() if form in forms]


def reference(q, k, v, visible):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    ("backend", "form", "width", "ratio"), [(b, *case) for case in CASES for b in backends(case[0])]
)
def test_equals_the_dense_reference(backend, form, width, ratio, isolated, heads):
    if backend == "flash_attn" and attention._flash_attn() is None:
        pytest.skip("the package flash-attn is not installed")
    torch.manual_seed(0)
    documents = None
    if isolated:
        documents = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(p)) for p in PARTS]).cuda()
    visibility = Visibility(form, ratio, width, (1, 2), documents)
    shapes = [(2, n, LENGTH, 64) for n in (heads[0], heads[1], heads[1])]
    mine = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    theirs = [x.detach().double().requires_grad_() for x in mine]
    made = plan(visibility, 2, LENGTH, torch.device("cuda"), torch.bfloat16, backend)
    assert made.backend == backend
    got, _ = attend(None, *mine, None, attention_plan=made)
    dense = visibility.dense(LENGTH, "cuda")
    want = reference(*theirs, torch.ones(1, 1, 1, 1, dtype=torch.bool, device="cuda") if dense is None else dense)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    weights = torch.randn_like(want)
    found = torch.autograd.grad((got * weights.bfloat16()).sum(), mine)
    for a, b in zip(found, torch.autograd.grad((want * weights).sum(), theirs)):
        error = (a.double() - b).norm() / b.norm()
        assert error < 2e-2, error


@pytest.mark.parametrize("how", ["chunked", "liger"])
def test_losses_equal_the_plain_one(how):
    if how == "liger":
        pytest.importorskip("liger_kernel", reason="the package liger-kernel is not installed")
    torch.manual_seed(0)
    hidden = torch.randn(3000, 256, device="cuda")
    weight = torch.randn(32_000, 256, device="cuda") / 16
    targets = torch.randint(0, 32_000, (3000,), device="cuda")
    weights = 1 / torch.rand(3000, device="cuda").clamp(min=1e-3)
    results = []
    for path in ("plain", how):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
        total, nll, *_ = linear_cross_entropy(*inputs, None, targets, weights, path)
        results.append([total, nll, *torch.autograd.grad(total, inputs)])
    for plain, other in zip(*results):
        assert (plain - other).norm() / plain.norm() < 1e-4
