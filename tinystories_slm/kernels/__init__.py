"""CPU kernels: compilation, attention, training and decoding."""
