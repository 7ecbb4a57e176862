"""First break of a text with the grammar: planted contradictions are named, and stories have none."""

import re
from collections import Counter

import pytest

from tinystories_slm import grammar
from tinystories_slm.grammar import diagnosis
from tinystories_slm.grammar.diagnosis import diagnose
from tinystories_slm.grammar.plots import PLOTS
from tinystories_slm.grammar.plots.friends import TREATS

STORIES = list(grammar.generate_corpus(60, seed=11))


def plant(story: str, old: str, new: str) -> str:
    """Replace `old` in the second half of a story."""
    half = len(story) // 2
    return story[:half] + re.sub(rf"\b{re.escape(old)}\b", new, story[half:])


def test_stories_have_no_break_and_name_their_plot():
    found = [diagnose(story) for story in STORIES]
    assert {(one.position, one.constraint) for one in found} == {(None, None)}
    assert {one.plot for one in found} == {plot.name for plot in PLOTS}


def test_another_name_in_the_second_half_is_a_contradicted_hero():
    constraints = Counter()
    for story in STORIES:
        name = re.search(r"named (\w+)\.", story)[1]
        planted = plant(story, name, "Mia" if name != "Mia" else "Zoe")
        if planted != story:
            constraints[diagnose(planted).constraint] += 1
    # Some pieces hold both the name and a pronoun, which no other hero explains.
    assert constraints["contradicts the hero"] > 0.7 * constraints.total() > 30


def test_planted_contradictions_are_named():
    sharing = next(story for story in STORIES if diagnose(story).plot == "sharing")
    [treats] = [one for one in TREATS if one in sharing]
    last = [line for line in sharing.split("\n\n") if treats in line][-1]
    planted = sharing.replace(last, last.replace(treats, "plums" if treats != "plums" else "pears"))
    assert diagnose(planted).constraint == "contradicts the treats"
    assert planted[: diagnose(planted).position].count(treats) >= 1

    home = next(home for home in ("house", "cottage", "cabin", "farmhouse", "hut") if home in sharing)
    changed = plant(sharing, home, "castle")
    assert changed == sharing or diagnose(changed).constraint == diagnosis.WORDING


@pytest.mark.parametrize(
    ("make", "constraint"),
    [
        (lambda story: story[: len(story) // 2], diagnosis.ENDS_EARLY),
        (lambda story: story + " The end.", diagnosis.GOES_ON),
        (lambda story: story.replace("lived in", "sat on"), diagnosis.WORDING),
        (lambda story: "", diagnosis.ENDS_EARLY),
        (lambda story: "Once", diagnosis.ENDS_EARLY),
        (lambda story: "A dog ran.", diagnosis.WORDING),
    ],
)
def test_kinds_of_breaks_without_a_contradiction(make, constraint):
    assert {diagnose(make(story)).constraint for story in STORIES[:20]} == {constraint}


def test_another_last_sentence_is_a_moral_that_does_not_fit():
    found = [diagnose(story.rsplit(". ", 1)[0] + ". The fox ate the moon.") for story in STORIES]
    constraints = Counter(one.constraint for one in found)
    assert constraints[diagnosis.MORAL] > 0.5 * len(STORIES), constraints
