"""`make story MORE=10`: the run of the story command is trained on for so many minutes."""

from dataclasses import fields, replace

import pytest

from tinystories_slm.commands.story import run_story
from tinystories_slm.config import RunConfig
from tinystories_slm.config.command_args.run import StoryArgs
from tinystories_slm.errors import UserError
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training.checkpoints import checkpoints, read_progress
from tinystories_slm.training.run import TrainingRun

WSD = ("--train.schedule", "wsd", "--train.decay_fraction", "0.5", "--train.eval_every", "50")


@pytest.fixture
def story(tiny_run, monkeypatch):
    """A function from flags and minutes to the StoryArgs of a tiny run; a step takes one second."""
    monkeypatch.setattr(TrainingRun, "seconds", property(lambda run: float(run.progress.step)))
    monkeypatch.setattr(TrainingRun, "estimated_final_seconds", property(lambda run: 0.0))

    def configure(*flags: str, more: float | None = None) -> StoryArgs:
        config = tiny_run(*flags)
        return StoryArgs(
            **{field.name: getattr(config, field.name) for field in fields(RunConfig)}, more=more
        )

    return configure


@pytest.mark.parametrize(("flags", "first"), [(WSD, 7), ((), 12)], ids=["constant part", "re-warmed"])
def test_minutes_count_from_where_the_run_goes_on(flags, first, story, capsys):
    args = story(*flags)
    run_story(args)
    assert "MORE=10     trains ten minutes more" in capsys.readouterr().out
    run_story(replace(args, more=0.5))
    progress = read_progress(checkpoints(args.output_dir)[-1])
    assert (progress.step, progress.finished, progress.extended_steps) == (first + 30, True, [first])

    before = (args.output_dir / "metrics.jsonl").read_bytes()
    run_story(args)  # the same command without MORE generates a story of the longer run
    assert (args.output_dir / "metrics.jsonl").read_bytes() == before
    run_story(replace(args, more=0.5))
    assert len(RunDir(args.output_dir).read_extensions()) == 2


def test_more_minutes_without_a_run_or_within_the_decay_raise(story):
    args = story(*WSD)
    with pytest.raises(UserError, match=r"more \(10\): must find a finished run in output_dir \(.*\); run"):
        run_story(replace(args, more=10.0))
    assert not args.output_dir.exists()
    with pytest.raises(UserError, match=r"more \(0\): must be a number of minutes above 0; try 10"):
        replace(args, more=0)
    run_story(args)
    with pytest.raises(UserError, match=r"more \(0.05\): must be above the 0.08 minutes of the decay"):
        run_story(replace(args, more=0.05))


def test_finished_run_of_another_length_generates_unless_a_length_is_given(story, capsys):
    args = story(*WSD)
    run_story(args)
    limited = replace(args, train=replace(args.train, max_minutes=4.5))  # as a later version of the preset
    before = (args.output_dir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    run_story(limited)
    assert "bits per byte" in capsys.readouterr().out
    assert (args.output_dir / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"train.max_minutes was None and is 4.5; .*--train.resume extend"):
        run_story(limited, {"train.max_minutes"})
