"""The CUDA backends against a dense fp64 reference, forward and gradients. `make gpu-check` runs these."""

import math

import pytest
import torch

from pretrain.model import attention
from pretrain.model.attention import BACKENDS, FLASH, attend, prepare_attention
from pretrain.model.forms import Bernoulli, Block, Causal, Form, Full, Window
from pretrain.model.loss import select_loss
from pretrain.model.visibility import Visibility

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
LENGTH = 384
PARTS = [[100, 28, 256], [5, 379, 0]]  # documents of the two rows
FORMS = [Full(), Causal(), Window(1), Window(100), Block(16), Bernoulli(0.3, (1, 2))]


def backends(form: Form) -> list[str]:
    """Those that can show the form."""
    return [name for name in BACKENDS if name not in FLASH or form.flash_window is not None]


def reference(q, k, v, visible):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["mha", "gqa"])
@pytest.mark.parametrize("isolated", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(("backend", "form"), [(b, form) for form in FORMS for b in backends(form)], ids=str)
def test_equals_the_dense_reference(backend, form, isolated, heads):
    if backend == "flash_attn" and attention._flash_attn() is None:
        pytest.skip("the package flash-attn is not installed")
    torch.manual_seed(0)
    documents = None
    if isolated:
        documents = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(p)) for p in PARTS]).cuda()
    visibility = Visibility(form, documents)
    shapes = [(2, n, LENGTH, 64) for n in (heads[0], heads[1], heads[1])]
    mine = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    theirs = [x.detach().double().requires_grad_() for x in mine]
    made = prepare_attention(visibility, 2, LENGTH, torch.device("cuda"), torch.bfloat16, backend)
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
        total, nll, _ = select_loss(path, "cuda")(*inputs, None, targets, weights)
        results.append([total, nll, *torch.autograd.grad(total, inputs)])
    for plain, other in zip(*results):
        assert (plain - other).norm() / plain.norm() < 1e-4
