"""Metrics of the server in the text format of Prometheus."""

from tinystories_slm.serving.scheduler import Scheduler

_PREFIX = "tinystories_slm"
_FINISHED = ("stop", "length", "cancelled")


def format_metrics(scheduler: Scheduler) -> str:
    """Return the state of the queue and the counters since the start."""
    counts = scheduler.counts
    finished = [(f'{{reason="{reason}"}}', counts[reason]) for reason in _FINISHED]
    families = [
        ("choices_running", "gauge", "Choices with a slot.", [("", scheduler.num_running)]),
        ("choices_waiting", "gauge", "Choices in the queue.", [("", scheduler.num_waiting)]),
        ("prompt_tokens_total", "counter", "Tokens of admitted prompts.", [("", counts["prompt_tokens"])]),
        ("completion_tokens_total", "counter", "Sampled tokens.", [("", counts["completion_tokens"])]),
        ("choices_finished_total", "counter", "Choices that have ended.", finished),
    ]
    lines = []
    for name, kind, description, values in families:
        lines += [f"# HELP {_PREFIX}_{name} {description}", f"# TYPE {_PREFIX}_{name} {kind}"]
        lines += [f"{_PREFIX}_{name}{labels} {value}" for labels, value in values]
    return "\n".join(lines) + "\n"
