"""Kept steps: which steps of a run stay as model folders, and which checkpoints stay."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tinystories_slm.config.sections import CheckpointArgs, ScheduleArgs
from tinystories_slm.errors import UserError
from tinystories_slm.io.units import format_bytes
from tinystories_slm.model_costs import Disk

_DEFAULT_NEWEST = 2
_NUMBER = "[0-9]{1,12}"
_FORMS = "newest:N, every:N, log, all, or a step such as 512, each but newest with :full for its checkpoint"


@dataclass(frozen=True)
class KeepRule:
    """A rule of `train.keep`."""

    keeps: Callable[[int], bool]
    """Whether the model of this optimizer step, from 0, stays in steps/."""
    saves: bool = True
    """Whether it stays although `train.save_every` saves no checkpoint at this step."""
    is_full: bool = False
    """Whether the checkpoint of the step is saved and stays, too."""


def _is_logarithmic(step: int) -> bool:
    return step & (step - 1) == 0


KEEP_RULES: dict[str, KeepRule] = {
    "all": KeepRule(keeps=lambda step: True, saves=False),
    "log": KeepRule(keeps=_is_logarithmic),
}
"""Rules by their name in `train.keep`, beside `newest:N`, `every:N` and steps; docs/extending.md adds one."""


@dataclass(frozen=True)
class KeptSteps:
    """The rules of `train.keep` together."""

    num_newest: int
    """Number of newest checkpoints that stay."""
    rules: tuple[KeepRule, ...]

    @classmethod
    def parse(cls, text: str) -> "KeptSteps":
        """Return the rules in `text`, the value of `train.keep`.

        Raises:
            UserError: a part of the text is no rule.
        """
        num_newest, rules = _DEFAULT_NEWEST, []
        for part in filter(None, map(str.strip, text.split(","))):
            name, _, argument = part.removesuffix(":full").partition(":")
            is_full = part.endswith(":full")
            number = int(argument) if re.fullmatch(_NUMBER, argument) else 0
            if name == "newest" and number and not is_full:
                num_newest = number
            elif name == "every" and number:
                rules.append(KeepRule(lambda step, every=number: step % every == 0, is_full=is_full))
            elif re.fullmatch(_NUMBER, name) and not argument:
                rules.append(KeepRule(int(name).__eq__, is_full=is_full))
            elif name in KEEP_RULES and not argument:
                rule = KEEP_RULES[name]
                rules.append(KeepRule(rule.keeps, rule.saves, is_full))
            else:
                known = ", ".join(name for name in KEEP_RULES if name not in _FORMS)
                raise UserError(
                    f"train.keep ({text}): {part} must be {_FORMS}{', or ' + known if known else ''}; "
                    "use one such as newest:2,log"
                )
        return cls(num_newest, tuple(rules))

    def keeps_model(self, step: int, *, is_saved: bool) -> bool:
        """Whether the model of `step` stays in steps/; `is_saved` if a checkpoint is saved there anyway."""
        return any(rule.keeps(step) and (rule.saves or is_saved) for rule in self.rules)

    def keeps_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of `step` stays, however old it is."""
        return any(rule.is_full and rule.keeps(step) for rule in self.rules)

    def saves_checkpoint(self, step: int) -> bool:
        """Whether a checkpoint is saved at `step`, also between the steps of `train.save_every`."""
        return any(rule.is_full and rule.saves and rule.keeps(step) for rule in self.rules)


def steps_to_delete(steps: list[int], current: int, args: CheckpointArgs) -> list[int]:
    """Return which of the checkpoints at `steps` to delete after the save at step `current`.

    A checkpoint after `current` is damaged, because the run resumed from an earlier one. Counted among the
    newest, it would push out the valid ones.
    """
    kept = KeptSteps.parse(args.keep)
    later = [step for step in steps if step > current]
    older = sorted(step for step in steps if step <= current)[: -kept.num_newest]
    return later + [step for step in older if not kept.keeps_checkpoint(step)]


@dataclass(frozen=True)
class KeptCounts:
    """Numbers of folders of a run at its end, which are also the largest ones."""

    checkpoints: int
    """Checkpoints: the newest, and those that stay for good."""
    models: int
    """Model folders in steps/."""


def count_kept(args: CheckpointArgs, num_steps: int) -> KeptCounts:
    """Return how many folders a run of `num_steps` keeps."""
    kept = KeptSteps.parse(args.keep)
    saved = list(_saved_steps(kept, args.save_every, num_steps))
    older = sum(map(kept.keeps_checkpoint, saved[: -kept.num_newest]))
    is_saved = set(saved)
    models = sum(kept.keeps_model(step, is_saved=step in is_saved) for step in range(num_steps + 1))
    return KeptCounts(min(kept.num_newest, len(saved)) + older, models)


def max_reachable_steps(args: ScheduleArgs, *, step_flops: float, flops_per_second: float) -> int:
    """Return an estimate of the steps from above: `train.max_steps`, or what its time allows at peak FLOP/s.

    A peak that was measured while other programs ran is too low, and so is then the estimate.
    """
    if args.max_minutes is None:
        return args.max_steps
    return min(args.max_steps, math.ceil(60 * args.max_minutes * flops_per_second / step_flops))


def format_kept(counts: KeptCounts, disk: Disk, num_steps: int) -> str:
    """Return the kept folders of a run of `num_steps` and their bytes, as a phrase."""
    return (
        f"{counts.checkpoints} checkpoints of {format_bytes(disk.checkpoint)} and {counts.models} model "
        f"folders of {format_bytes(disk.model_folder)} in steps/ at the end, after {num_steps:,} steps"
    )


def _saved_steps(kept: KeptSteps, save_every: int, num_steps: int) -> Iterator[int]:
    for step in range(num_steps + 1):
        is_due = step > 0 and (step % save_every == 0 or step == num_steps)
        if is_due or kept.saves_checkpoint(step):
            yield step
