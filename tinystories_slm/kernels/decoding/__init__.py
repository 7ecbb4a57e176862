"""Token generation on a CPU: C kernels, called by `generation.decoder`."""
