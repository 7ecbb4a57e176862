"""Training: the loop, the optimizer, checkpoints and the record of a run."""

from tinystories_slm.training.loop import train
from tinystories_slm.training.run import finished
from tinystories_slm.training.watching.report import write_report

__all__ = ["finished", "train", "write_report"]
