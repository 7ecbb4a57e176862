"""Training: the loop, the optimizer, checkpoints and the record of a run."""

from tinystories_slm.training.loop import train
from tinystories_slm.training.report import write_report
from tinystories_slm.training.run import finished

__all__ = ["finished", "train", "write_report"]
