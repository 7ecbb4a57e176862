"""Training: the loop, the optimizers and the checkpoints of a run."""

from tinystories_slm.runs.report import write_report
from tinystories_slm.training.loop import train
from tinystories_slm.training.restore import restore_finished_run
from tinystories_slm.training.run import is_finished

__all__ = ["is_finished", "restore_finished_run", "train", "write_report"]
