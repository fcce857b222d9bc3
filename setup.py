"""`pip install .` gives common, data_prep, pretrain, tools and the ready-made configurations."""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["common", "data_prep", "pretrain", "tools"]

setup(
    name="diffullama",
    version="0.1.0",
    description="Turn pretrained autoregressive language models into masked diffusion language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=[*ROOMS, *(f"{room}.*" for room in ROOMS)]), "ds_configs"],
    package_data={
        **{room: ["py.typed"] for room in ROOMS},
        "data_prep": ["py.typed", "configs/*.yaml", "demo/*", "unassigned_unicode_14.txt"],
        "pretrain": ["py.typed", "configs/*.yaml"],
        "ds_configs": ["*.json"],
    },
    install_requires=[
        "torch>=2.9",
        "transformers>=5.22",  # the tests run with 5.23; make test-transformers with the newest and with 5.22
        "tokenizers",
        "huggingface_hub",
        "deepspeed>=0.19.8",  # the version that the tests run with; resuming corrects details of its checkpoints
        "accelerate",  # also wanted by transformers for HfDeepSpeedConfig (ZeRO-3), device_map and GGUF files
        "safetensors",
        "sentencepiece",  # transformers reads a tokenizer.model with it
        "pyarrow>=15",
        "orjson",
        "fsspec",
        "zstandard",
        "numpy",
        "scipy",
        "omegaconf>=2.4",
        "PyYAML",
        "wandb",
        "tqdm",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.6", "liger-kernel"],
        "fast": ["gigatoken-cachefix"],
        "eval": ["lm_eval>=0.4.13", "rouge_score"],
        "dev": [
            "gigatoken-cachefix",
            "lm_eval>=0.4.13",
            "rouge_score",
            "datasets",  # an independent reader of our shards, in tests and benchmarks
            "pillow",
            "gradio",
            "playwright",  # drives a chromium that is there already; without one its tests skip
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "pyright[nodejs]",
            "codespell",
            "pre-commit",
            "build",
            "setuptools>=77",
        ],
        "demo": ["gguf"],
        "playground": ["gradio"],
    },
    entry_points={
        "console_scripts": [
            "diffullama-data-prep = data_prep.__main__:main",
            "diffullama-pretrain = pretrain.main:main",
            "diffullama-export = tools.export:main",
            "diffullama-generate = tools.generate:main",
            "diffullama-playground = tools.playground:main",
            "diffullama-health = tools.health:main",
        ]
    },
    classifiers=["Programming Language :: Python :: 3"],
)
