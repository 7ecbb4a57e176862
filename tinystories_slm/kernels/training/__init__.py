"""A training step on a CPU: PyTorch's matrix products, and C kernels for the operations between them.

Apart from the products, a step of a small model is bound by memory traffic: each PyTorch operation reads and
writes the activations once. `fuse` replaces a model's layers by layers that read and write them once, forward
and backward. The results match the model's; tests/kernels/test_training_kernels.py compares the two.
"""

from tinystories_slm.kernels.training.layers import fuse, unsupported_reason

__all__ = ["fuse", "unsupported_reason"]
