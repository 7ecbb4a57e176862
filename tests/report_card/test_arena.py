"""The arena: blind pairs, votes that stay, and an estimate that finds the strengths behind the votes."""

import random

import pytest

from tinystories_slm.report_card.arena import Vote, bradley_terry, read_votes, run_arena

SETS = [("good", ["Good 0.", "Good 1.", "Good 2."]), ("bad", ["Bad 0.", "Bad 1.", "Bad 2."])]


def scripted(*answers: str):
    rest = iter(answers)

    def read_line(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read_line


def test_votes_are_kept_and_no_pair_is_shown_twice(tmp_path, capsys):
    path = tmp_path / "card.votes.jsonl"
    [vote] = run_arena(SETS, path, seed=0, read_line=scripted("nonsense", "A ", "q"))
    assert vote.score == 1.0 and {vote.first, vote.second} == {"good", "bad"}
    shown = capsys.readouterr().out
    before_vote = shown[: shown.index("A: ")]
    assert "good" not in before_vote and "bad" not in before_vote  # blind
    with path.open("a") as file:
        file.write('{"pair": "torn')  # a killed process
    path.write_text(path.read_text() + "\n")
    votes = run_arena(SETS, path, seed=0, read_line=scripted("b", "t"))
    assert votes[0] == vote and [one.score for one in votes] == [1.0, 0.0, 0.5]
    assert len({one.pair for one in votes}) == 3
    assert run_arena(SETS, path, seed=5, read_line=scripted()) == votes == read_votes(path)


def test_estimate_finds_the_strengths_behind_the_votes():
    strengths = {"x": 4.0, "y": 1.0, "z": 0.25}
    rng = random.Random(1)
    votes = []
    for number in range(4000):
        first, second = rng.sample(sorted(strengths), 2)
        chance = strengths[first] / (strengths[first] + strengths[second])
        votes.append(Vote(str(number), first, second, float(rng.random() < chance)))
    found = bradley_terry(votes)
    for name, strength in strengths.items():
        assert found[name]["value"] == pytest.approx(strength / (strength + 1), abs=0.03)
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
        assert found[name]["high"] - found[name]["low"] < 0.06


def test_few_or_one_sided_votes_have_a_finite_estimate():
    assert bradley_terry([]) == {}
    always = bradley_terry([Vote(str(i), "x", "y", 1.0) for i in range(10)])
    assert 0.8 < always["x"]["value"] < 1.0 and always["x"]["value"] + always["y"]["value"] == pytest.approx(
        1
    )
    tie = bradley_terry([Vote("1", "x", "y", 0.5)])
    assert tie["x"]["value"] == pytest.approx(0.5) and tie["x"]["count"] == 1
