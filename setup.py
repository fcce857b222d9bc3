"""`pip install .` gives data_prep, pretrain, tools and the ready-made configurations."""

from pathlib import Path

from setuptools import setup

setup(
    name="diffullama",
    version="0.1.0",
    description="Turn pretrained autoregressive language models into masked diffusion language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["common", "data_prep", "pretrain", "pretrain.model", "tools", "ds_configs"],
    package_data={
        "data_prep": ["configs/*.yaml", "demo/*"],
        "pretrain": ["configs/*.yaml"],
        "ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5.0",
        "deepspeed>=0.18",
        "accelerate",
        "datasets",
        "safetensors",
        "sentencepiece",
        "pyarrow>=15",
        "orjson",
        "fsspec",
        "zstandard",
        "numpy",
        "omegaconf>=2.4",
        "wandb",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.6", "liger-kernel"],
        "eval": ["lm-eval>=0.4.9"],
        "fast": ["gigatoken-cachefix"],
        "dev": ["gigatoken-cachefix", "pytest", "pytest-xdist", "hypothesis", "ruff", "build", "setuptools>=77"],
        "demo": ["gguf"],
    },
    entry_points={
        "console_scripts": [
            "diffullama-data-prep = data_prep.__main__:main",
            "diffullama-pretrain = pretrain.main:main",
            "diffullama-export = tools.export:main",
            "diffullama-generate = tools.generate:main",
            "diffullama-health = tools.health:main",
        ]
    },
    classifiers=["Programming Language :: Python :: 3"],
)
