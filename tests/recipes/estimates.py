"""Memory and GPU hours of the recipes for the paper's experiments, as their headers state them.

`python -m tests.recipes.estimates` writes the lines anew. The memory is that of `--check` for the GPUs that
the header's SLURM command asks for; the hours are the floating-point operations of the training over an
assumed share of the peak.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from models.cost import train_step_flops
from trainer.config.load import load_recipe
from trainer.dry_run import ASSUMED_GPU, ASSUMED_MFU, gpu_hours
from trainer.engine.batch_plan import choose_batch_plan
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryModel
from trainer.setup.preparation import model_config

RECIPES = Path(__file__).parents[2] / "recipes"

# Paper, table 10: training videos and classes.
DATASETS = {
    "k710": (658_340, 710),
    "k400": (240_436, 400),
    "k600": (366_006, 600),
    "k700": (529_573, 700),
    "mit": (802_244, 339),
    "ssv1": (86_017, 174),
    "ssv2": (168_913, 174),
    "anet": (10_024, 200),
    "hacs": (37_452, 200),
}
_LINE = re.compile(r"^#   Estimate: .*\n", re.MULTILINE)
_SLURM = re.compile(r"^# SLURM: .* --nodes (\d+) --gpus-per-node (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Estimate:
    """What a recipe needs on H100 GPUs of 80 GB."""

    gpus: int
    micro_batch: int
    recomputed_blocks: int
    gib: float
    """Memory of each GPU."""
    gpu_hours: float

    @property
    def line(self) -> str:
        recomputed = f", {self.recomputed_blocks} recomputed blocks" if self.recomputed_blocks else ""
        clips = f"{self.micro_batch} clip{'s' * (self.micro_batch > 1)}"
        hours = float(f"{self.gpu_hours:.2g}")  # two digits
        return (
            f"#   Estimate: {self.gpus} H100 with {self.gib:.0f} GiB each ({clips}{recomputed}), "
            f"{hours:,g} GPU hours at {ASSUMED_MFU:.0%} of their peak.\n"
        )


def gpus_of(text: str) -> int:
    """Nodes times GPUs of the command for SLURM in a recipe's header."""
    found = _SLURM.search(text)
    assert found is not None, "the header has no SLURM command"
    return int(found[1]) * int(found[2])


def estimate(path: Path) -> Estimate:
    recipe = load_recipe(path)
    videos, classes = DATASETS[path.stem.split("_")[0]]
    gpus = gpus_of(path.read_text())
    available = AvailableMemory("cuda", ASSUMED_GPU)
    plan = choose_batch_plan(
        recipe, model_config(recipe, classes), gpus, precision="bf16", available=available
    )
    config = model_config(recipe, classes, plan.recomputed_blocks)
    model = MemoryModel.of(recipe, config, ranks=gpus, precision="bf16", kind="cuda")
    memory = model.estimate(
        zero_stage=plan.zero_stage, micro_batch=plan.micro_batch, recomputed_blocks=plan.recomputed_blocks
    )
    clips = videos * recipe.sampling.repeats * (recipe.optimisation.epochs or 0)
    hours = gpu_hours(clips * train_step_flops(config))
    return Estimate(gpus, plan.micro_batch, plan.recomputed_blocks, memory.total / GIB, hours)


def experiments() -> list[Path]:
    """The recipes of the paper's experiments."""
    return [path for path in sorted(RECIPES.glob("[!_]*.yaml")) if path.stem.split("_")[0] in DATASETS]


def with_line(text: str, line: str) -> str:
    """The recipe with this line before its command for a check, instead of the line that is there."""
    before, check, after = _LINE.sub("", text).partition("# Check:")
    return f"{before}{line}{check}{after}"


if __name__ == "__main__":
    for experiment in experiments():
        experiment.write_text(with_line(experiment.read_text(), estimate(experiment).line))
