"""A training step on a CPU: PyTorch's matrix products, and kernels of our own for all that lies between them.

Beside the products of a small model most of a step is spent going over its activations, once for each of
PyTorch's operations. `fuse` puts layers in a model's place that go over them once, forward and backward. They
compute what the model computes; tests/training/test_fused.py holds the two together.
"""

from tinystories_slm.training.fused.layers import fuse, why_not_fused

__all__ = ["fuse", "why_not_fused"]
