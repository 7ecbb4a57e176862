"""Blind comparison of stories in the terminal; votes on disk with a Bradley-Terry estimate."""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from tinystories_slm.io.file_errors import translate_write_errors

_ANSWERS = {"a": 1.0, "b": 0.0, "t": 0.5}
_QUIT = ("q", "")
_NUM_ITERATIONS = 200
_NUM_RESAMPLES = 200
# Half of it won, half lost, against an average opponent: else a set that always wins has no estimate.
_PRIOR_GAMES = 1.0


@dataclass(frozen=True)
class Vote:
    """A comparison: `score` is 1 if the first story is better, 0 if the second is, 0.5 for a tie."""

    pair: str
    """Hash of the two texts, so that no pair is shown twice."""
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class _Pair:
    names: tuple[str, str]
    texts: tuple[str, str]

    @property
    def key(self) -> str:
        return pair_key(self.texts)


def pair_key(texts: tuple[str, str]) -> str:
    """Return `Vote.pair` of two texts, the same for both orders."""
    return hashlib.sha256(json.dumps(sorted(texts)).encode()).hexdigest()[:16]


def run_arena(
    sets: Sequence[tuple[str, Sequence[str]]],
    path: Path,
    *,
    seed: int,
    read_line: Callable[[str], str] = input,
) -> list[Vote]:
    """Show pairs of stories without their names, and append each vote to the JSON Lines file `path`.

    `q` or the end of input ends the comparison; the next one goes on with other pairs.

    Raises:
        UserError: the file cannot be written.
    """
    votes = read_votes(path)
    seen = {vote.pair for vote in votes}
    for pair in _shuffled_pairs(sets, seed):
        if pair.key in seen:
            continue
        print(f"\n--- Story A ---\n{pair.texts[0]}\n\n--- Story B ---\n{pair.texts[1]}\n")
        answer = _read_answer(read_line)
        if answer is None:
            break
        votes.append(Vote(pair.key, *pair.names, answer))
        append_vote(path, votes[-1])
        print(f"A: {pair.names[0]}, B: {pair.names[1]}")
    return votes


def read_votes(path: Path) -> list[Vote]:
    """Return the votes of the file, without damaged lines; none if it does not exist."""
    votes = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found = Vote(**json.loads(line))
        except (ValueError, TypeError):
            continue  # half a line of a killed process
        if found.score in _ANSWERS.values():
            votes.append(found)
    return votes


def append_vote(path: Path, vote: Vote) -> None:
    """Append `vote` to the JSON Lines file and flush it to disk.

    Raises:
        UserError: the file cannot be written.
    """
    with translate_write_errors("output", path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(vars(vote), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def bradley_terry(votes: Sequence[Vote]) -> dict[str, dict[str, Any]]:
    """Return the share of comparisons that each set wins against an average opponent, with its interval.

    The strengths p of the Bradley-Terry model, P(i beats j) = p_i / (p_i + p_j), are fitted by the iteration
    of Hunter (2004), where a tie is half a win. The interval (95%) resamples votes.
    """
    if not votes:
        return {}
    names = sorted({name for vote in votes for name in (vote.first, vote.second)})
    index = {name: number for number, name in enumerate(names)}
    games = np.array([(index[v.first], index[v.second], v.score) for v in votes]).reshape(-1, 3)
    shares = _fit(games, len(names))
    rng = np.random.default_rng(0)
    draws = rng.integers(len(games), size=(_NUM_RESAMPLES, len(games)))
    resampled = np.stack([_fit(games[draw], len(names)) for draw in draws])  # (resamples, sets)
    return {
        name: {
            "value": float(shares[at]),
            "low": float(np.percentile(resampled[:, at], 2.5)),
            "high": float(np.percentile(resampled[:, at], 97.5)),
            "count": sum(name in (vote.first, vote.second) for vote in votes),
        }
        for name, at in index.items()
    }


def _fit(games: np.ndarray, num_sets: int) -> np.ndarray:
    """Return p / (p + 1) of each set; an average opponent has strength 1."""
    wins = np.full(num_sets, _PRIOR_GAMES / 2)
    played = np.zeros((num_sets, num_sets))
    first, second = games[:, 0].astype(int), games[:, 1].astype(int)
    np.add.at(wins, first, games[:, 2])
    np.add.at(wins, second, 1 - games[:, 2])
    np.add.at(played, (first, second), 1)
    np.add.at(played, (second, first), 1)
    strength = np.ones(num_sets)
    for _ in range(_NUM_ITERATIONS):
        pairwise = (played / (strength[:, None] + strength)).sum(axis=1)
        strength = wins / (pairwise + _PRIOR_GAMES / (strength + 1))
        strength /= np.exp(np.log(strength).mean())
    return strength / (strength + 1)


def _shuffled_pairs(sets: Sequence[tuple[str, Sequence[str]]], seed: int) -> Iterator[_Pair]:
    """Yield story i of each two sets, in a fixed random order of stories and of first and second."""
    rng = random.Random(seed)
    pairs = [
        ((name, other), (text, other_text))
        for (name, texts), (other, other_texts) in combinations(sets, 2)
        for text, other_text in zip(texts, other_texts, strict=False)
    ]
    rng.shuffle(pairs)
    for names, texts in pairs:
        yield _Pair(names, texts) if rng.random() < 0.5 else _Pair(names[::-1], texts[::-1])


def _read_answer(read_line: Callable[[str], str]) -> float | None:
    """Return the score of the first story; None at the end."""
    while True:
        try:
            answer = read_line("better: a, b, t (tie) or q (quit): ").strip().lower()
        except EOFError:
            return None
        if answer in _ANSWERS:
            return _ANSWERS[answer]
        if answer in _QUIT:
            return None
