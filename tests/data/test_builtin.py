"""The built-in corpus: every story is read back with the probability it was told with."""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinystories_slm.data.builtin import (
    entropy,
    log_prob,
    num_stories,
    tell_stories,
    tell_story,
)
from tinystories_slm.data.builtin.grammar import CarefulTeller, Reader, Teller
from tinystories_slm.data.builtin.plots import PLOTS, courage, friends, home, outdoors
from tinystories_slm.data.builtin.stories import OPENINGS, shape, tell_story_to
from tinystories_slm.data.builtin.words import FRIENDS, HEROES, NAMES

NUM_STORIES = 4_000


class WatchedTeller(CarefulTeller):
    """Checks every choice for options a reader could confuse, and notes what is taken."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        super().__init__(choose)
        self.taken: list[tuple[tuple, object]] = []

    def pick(self, options: Sequence, render: Callable = str) -> object:
        option = super().pick(options, render)
        self.taken.append((tuple(options), option))
        return option


@pytest.fixture(scope="module")
def told() -> list[tuple[str, WatchedTeller]]:
    """Plot name and teller of many stories, each told with every choice checked."""
    stories = []
    for index in range(NUM_STORIES):
        teller = WatchedTeller(random.Random(f"test/{index}").randrange)
        stories.append((tell_story_to(teller).name, teller))
    return stories


story_index = st.integers(min_value=0, max_value=2**40)


@given(story_index, story_index)
def test_a_story_is_read_back_with_the_probability_it_was_told_with(seed: int, index: int) -> None:
    story = tell_story(seed, index)
    assert story == tell_story(seed, index)
    assert log_prob(story.text) == pytest.approx(story.log_prob, abs=1e-12)


def test_all_stories_of_a_plot_have_the_same_options_to_count(told) -> None:
    by_name = {plot.name: plot for plot in PLOTS}
    assert all(tuple(teller.counts) == shape(by_name[name]) for name, teller in told)
    assert {name for name, _ in told} == set(by_name)


def test_careful_and_plain_tellers_tell_the_same_stories() -> None:
    for index in range(20):
        careful = CarefulTeller(random.Random(f"7/{index}").randrange)
        tell_story_to(careful)
        assert careful.text == tell_story(7, index).text


def test_a_choice_a_reader_could_confuse_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot tell apart 'a ball' and 'a balloon'"):
        CarefulTeller(lambda _: 0).pick(("a ball", "a kite", "a balloon"))
    with pytest.raises(RuntimeError, match="two options"):
        Reader("a balloon").pick(("a ball", "a kite", "a balloon"))


def test_every_option_is_reached(told) -> None:
    # A list of options may depend on earlier choices, so fixed wordings are counted by their place
    # in the plot, and lists of things, which are the same tuples every time, by themselves.
    places: dict[tuple[str, int], set[int]] = defaultdict(set)
    lists: dict[tuple, set] = defaultdict(set)
    for name, teller in told:
        for number, (options, option) in enumerate(teller.taken):
            places[name, number].add(options.index(option))
            if not isinstance(option, str):
                lists[options].add(option)
    for (name, number), reached in places.items():
        count = shape(next(plot for plot in PLOTS if plot.name == name))[number]
        if count < len(OPENINGS):
            assert reached == set(range(count)), (name, number)
    for options, reached in lists.items():
        assert reached == set(options)


def test_entropy_is_the_mean_surprise(told) -> None:
    surprises = [-teller.log_prob for _, teller in told]
    variance = math.fsum((s - entropy()) ** 2 for s in surprises) / len(surprises)
    error = 4 * math.sqrt(variance / len(surprises))
    assert math.fsum(surprises) / len(surprises) == pytest.approx(entropy(), abs=error)
    assert 35 < entropy() < 70  # nats per story


def test_probabilities_sum_to_one() -> None:
    """A plot's stories share the plot's probability: their number times the probability of one."""
    per_plot = [math.prod(shape(plot)) * len(plot.openings) // len(OPENINGS) for plot in PLOTS]
    assert sum(per_plot) == num_stories() >= 10**15
    shares = [
        count * math.exp(-math.fsum(map(math.log, shape(plot))))
        for plot, count in zip(PLOTS, per_plot, strict=True)
    ]
    assert shares == pytest.approx([1 / len(PLOTS)] * len(PLOTS))
    # Within a plot all stories are as likely: its entropy is the log of their number.
    mean_log_count = math.fsum(map(math.log, per_plot)) / len(PLOTS)
    assert entropy() == pytest.approx(mean_log_count + math.log(len(PLOTS)))


def test_stories_differ_and_stream_in_order() -> None:
    stories = list(tell_stories(10_000, seed=3))
    assert len(set(stories)) == 10_000
    assert stories[9_999] == tell_story(3, 9_999).text
    assert next(tell_stories(10**12)) == tell_story(0, 0).text


@given(story_index, st.data())
def test_a_corrupted_story_is_refused(index: int, data: st.DataObject) -> None:
    text = tell_story(0, index).text
    words = list(re.finditer(r"[A-Za-z]+", text))
    word = data.draw(st.sampled_from(words))
    end = data.draw(st.integers(0, len(text) - 1))
    for corrupted in (
        f"{text[: word.start()]}xyzzy{text[word.end() :]}",
        text[:end],
        text + " The end.",
        text + " ",
        text.replace("\n\n", " ", 1),
    ):
        with pytest.raises(ValueError, match=r"no option fits at character \d+"):
            log_prob(corrupted)


def test_the_error_says_where() -> None:
    text = tell_story(0, 0).text
    place = text.rindex(" ") + 1
    with pytest.raises(ValueError, match=f"at character {place}, in .*xyzzy"):
        log_prob(text[:place] + "xyzzy.")


def test_another_name_later_in_the_story_is_refused() -> None:
    refused = 0
    for text in tell_stories(100):
        name = re.search(r"named (\w+)\.", text)[1]
        other = "Mia" if name != "Mia" else "Zoe"
        last = text.rindex(name)
        with pytest.raises(ValueError, match="no option fits"):
            log_prob(text[:last] + other + text[last + len(name) :])
        refused += 1
    assert refused == 100


def test_stories_are_well_formed(told) -> None:
    for _, teller in told:
        text = teller.text
        paragraphs = text.split("\n\n")
        assert 3 <= len(paragraphs) <= 6
        assert 110 <= len(text.split()) <= 210
        assert text.isascii()
        assert not re.search(r"  |\n\n\n|(?<!\n)\n(?!\n)|[{}_]| [.,!?]", text), text
        for paragraph in paragraphs:
            assert paragraph == paragraph.strip()
            assert paragraph.count('"') % 2 == 0
            assert re.search(r'[.!?]"?$', paragraph), paragraph
            for quoted in paragraph.split('"')[1::2]:
                assert re.search(r"^[A-Z].*[.,!?]$", quoted), quoted
                assert not re.search(r"[.!?] [a-z]", quoted), quoted
            outside = re.sub(r'"[^"]*"', '"', paragraph)
            assert not re.search(r"[.!?] [a-z]", outside), paragraph
            assert re.match(r'["A-Z]', paragraph)
        assert not re.search(r'\." [a-z]', text), text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\b(\w+) \1\b", text), text


def test_what_is_introduced_is_used(told) -> None:
    things = {
        "lost_thing": outdoors.LIGHT_THINGS,
        "hurt_animal": outdoors.PET_NAMES,
        "race": courage.PRIZES,
        "sharing": friends.TREATS,
        "giant_root": friends.ROOTS,
        "broken": home.PIECES,
        "present": [craft.made for craft in home.CRAFTS],
    }
    for name, teller in told:
        paragraphs = teller.text.split("\n\n")
        hero = re.search(r"named (\w+)\.", paragraphs[0])[1]
        carer = re.search(r"with (?:his|her) (\w+)\.", paragraphs[0])[1]
        assert hero in paragraphs[-1], teller.text
        assert any(carer in p.lower() for p in paragraphs[1:]), teller.text
        picked = [option for _, option in teller.taken]
        for thing in set(picked) & set(things.get(name, ())):
            assert sum(thing in paragraph for paragraph in paragraphs) >= 2, teller.text
        for friend in set(picked) & set(FRIENDS):
            assert sum(friend.name in paragraph for paragraph in paragraphs) >= 2, teller.text


def test_pronouns_agree_with_the_hero(told) -> None:
    """Before anyone else comes in, only the hero's pronouns occur."""
    heroes = {(hero.kind, hero.name): hero for hero in HEROES}
    for _, teller in told:
        kind, name = re.search(r"(\w+) named (\w+)\.", teller.text).groups()
        hero = heroes[kind, name]
        sentence = teller.text.split(". ")[1]
        assert sentence.startswith(f"{hero.They} lived in")
        assert f"with {hero.their} " in sentence


def test_names_belong_to_one_character() -> None:
    everyone = [[c.name for c in HEROES], [c.name for c in FRIENDS], NAMES, outdoors.PET_NAMES]
    everyone.append([rival.name for rival in courage.RIVALS])
    assert all(len(set(names)) == len(names) for names in everyone)
    assert not any(set(a) & set(b) for a, b in combinations(everyone, 2))


def test_openings_are_those_of_tiny_stories(told) -> None:
    first_words = Counter(teller.text.split(",")[0] for _, teller in told)
    assert first_words["Once upon a time"] > NUM_STORIES / 2


def test_the_same_story_on_every_platform() -> None:
    digest = sha256("\n".join(tell_stories(100)).encode()).hexdigest()
    assert digest[:16] == "02a5d61fdc3a672c", "a story has changed: raise VERSION and pin the new digest"


def test_a_teller_may_be_led_by_hand() -> None:
    teller = Teller(lambda _: 0)
    teller.say("One", "Two")
    teller.paragraph()
    assert teller.pick((1, 2, 3), lambda number: f"{number}.") == 1
    assert teller.text == "One\n\n1."
    assert teller.log_prob == pytest.approx(-math.log(6))
