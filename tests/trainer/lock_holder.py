"""Who holds a run folder, from its lock files."""

from pathlib import Path

from trainer.resilience.lock_record import HolderState, LockRecord, read_lock


def find_holder(run_dir: Path) -> LockRecord | None:
    """The holder; None without one, or if it is gone."""
    for file in sorted((run_dir / "lock").glob("[0-9]*.json"), reverse=True):
        record, _ = read_lock(file)
        return None if record is None or record.state(file) is HolderState.GONE else record
    return None
