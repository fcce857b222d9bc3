"""Imported once by the server of forked.py: what takes time to import, and nothing of this project."""

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import omegaconf  # noqa: F401
import pyarrow  # noqa: F401
import scipy.stats  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import transformers.generation.utils
import transformers.integrations.deepspeed
import transformers.models.gpt2.modeling_gpt2
import transformers.models.llama.modeling_llama  # noqa: F401
