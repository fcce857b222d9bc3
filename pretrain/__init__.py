"""Adapt an autoregressive language model into a masked diffusion one: `deepspeed pretrain/main.py`."""
