"""Tags and note of a run in MLflow: user, command, code version, machines, data."""

import getpass
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.secrets import redacted
from trainer.system.git import git_state


@dataclass(frozen=True)
class RunDescription:
    """Facts about a run at its start."""

    recipe: str
    """Name of the recipe."""
    model: str
    """For example `b16 scene, 8 frames of 224 x 224, 115 M parameters`."""
    data: Sequence[tuple[str, str, int, int]]
    """Use, path, number of videos and number of classes of each manifest."""
    run_dir: Path
    launcher: str
    """The launcher of the ranks, see `Environment.launcher`."""
    ranks: int
    nodes: int
    device: str
    """Name of a rank's GPU, or `cpu`."""
    starts: int
    """Number of starts of the run, including this one."""

    def tags(self, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
        """Tags of the MLflow run. MLflow shows those that begin with `mlflow.` outside its list of tags."""
        job = variables.get("SLURM_JOB_ID")
        git = git_state()
        tags = {
            "mlflow.user": user_name(),
            "mlflow.source.name": os.path.relpath(sys.argv[0]) if sys.argv[0] else "launch/train.py",
            "mlflow.source.type": "JOB" if job else "LOCAL",
            "mlflow.note.content": self.note(),
            "recipe": self.recipe,
            "model": self.model,
            "gpu": self.device,
            "ranks": str(self.ranks),
            "nodes": str(self.nodes),
            "starts": str(self.starts),
        }
        if job:
            tags["slurm_job"] = job
        if git is not None:
            tags["mlflow.source.git.commit"] = git.commit
            tags["mlflow.source.git.branch"] = git.branch
            tags["mlflow.source.git.dirty"] = str(git.dirty).lower()
        return tags

    def note(self) -> str:
        """Model, data and command in Markdown."""
        rows = "\n".join(
            f"| {use} | `{_cell(path)}` | {videos:,} | {classes:,} |"
            for use, path, videos, classes in self.data
        )
        ranks = f"{self.ranks} rank{'s' if self.ranks > 1 else ''} of {self.device}"
        return redacted(
            f"**{self.recipe}**: {self.model}; {ranks}\n\n"
            f"```\n{self.command()}\n```\n\n"
            f"| data | manifest | videos | classes |\n|---|---|---:|---:|\n{rows}\n\n"
            "The command above also continues a stopped run. The run directory is "
            f"`{self.run_dir.absolute()}`; its `recipe.yaml`, also among the artifacts, has every value "
            "used.\n"
        )

    def command(self) -> str:
        """The command that started the run, reconstructed from a rank; for a SLURM job `sbatch SCRIPT`."""
        scripts = sorted((self.run_dir / "slurm").glob("*.sbatch"))
        if self.launcher == "srun" and scripts:
            return f"sbatch {shlex.quote(str(scripts[-1]))}"
        own = [part for part in sys.argv if not re.match(r"--local[_-]rank", part)]
        each = self.ranks // self.nodes
        starters = {
            "deepspeed": ["deepspeed", "--num_gpus", str(each)],
            "torchrun": ["torchrun", "--nnodes", str(self.nodes), "--nproc_per_node", str(each)],
            "srun": ["srun", "--nodes", str(self.nodes), "--ntasks", str(self.ranks), "python"],
            "mpi": ["mpirun", "-n", str(self.ranks), "python"],
        }
        return shlex.join([*starters.get(self.launcher, ["python"]), *own])


def user_name() -> str:
    """The user who started the process; the number if the system has no name for it, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _cell(text: str) -> str:
    """Text for code in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")
