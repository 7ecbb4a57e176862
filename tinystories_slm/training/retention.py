"""Checkpoint retention: which steps are saved in addition, and which checkpoints stay beside the newest."""

from collections.abc import Callable
from dataclasses import dataclass

from tinystories_slm.config.sections import CheckpointArgs
from tinystories_slm.errors import UserError


@dataclass(frozen=True)
class RetentionRule:
    """A rule of `train.retention`; both functions take an optimizer step, from 1."""

    keeps: Callable[[int], bool]
    """Whether the checkpoint of this step is never deleted."""
    saves: Callable[[int], bool] = lambda step: False
    """Whether a checkpoint is saved at this step, also between the steps of `train.save_every`."""


def _is_power_of_two(step: int) -> bool:
    return step & (step - 1) == 0


RETENTION_RULES: dict[str, RetentionRule] = {
    "newest": RetentionRule(keeps=lambda step: False),
    "all": RetentionRule(keeps=lambda step: True),
    "powers_of_two": RetentionRule(keeps=_is_power_of_two, saves=_is_power_of_two),
}
"""Rules by the name in `train.retention`; docs/extending.md adds one."""


def retention_rule(name: str) -> RetentionRule:
    """Return the entry of `RETENTION_RULES`.

    Raises:
        UserError: there is no rule of that name.
    """
    if name not in RETENTION_RULES:
        raise UserError(f"train.retention ({name}): must be one of {', '.join(RETENTION_RULES)}")
    return RETENTION_RULES[name]


def steps_to_delete(steps: list[int], current: int, args: CheckpointArgs) -> list[int]:
    """Return which of the checkpoints at `steps` to delete after the save at step `current`.

    A checkpoint after `current` is damaged, because the run resumed from an earlier one. Counted among the
    newest `train.keep_checkpoints`, it would push out the valid ones.
    """
    rule = retention_rule(args.retention)
    later = [step for step in steps if step > current]
    older = sorted(step for step in steps if step <= current)[: -args.keep_checkpoints]
    return later + [step for step in older if not rule.keeps(step)]


def max_checkpoints(args: CheckpointArgs, max_steps: int) -> int:
    """Return the largest number of checkpoints of a run of `max_steps` at the end of a save."""
    rule = retention_rule(args.retention)
    saved = [
        step
        for step in range(1, max_steps + 1)
        if step % args.save_every == 0 or step == max_steps or rule.saves(step)
    ]
    kept = sum(map(rule.keeps, saved[: -args.keep_checkpoints]))
    return min(args.keep_checkpoints, len(saved)) + kept
