"""Records of a run: the run directory, metrics, samples, console, trackers and the report."""
