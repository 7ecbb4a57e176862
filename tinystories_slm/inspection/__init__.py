"""Examine a run: the stories that a step read, the loss of each token, the exposure of canaries."""
