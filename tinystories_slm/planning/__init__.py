"""Plan a run for a number of minutes: a law of the loss, measured speeds, and the choice of every option."""
