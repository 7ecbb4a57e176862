"""The machine: devices, cores, memory allocator, peak FLOP/s."""
