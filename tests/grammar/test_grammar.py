"""Built-in corpus: the parser recovers each story's probability, and the stories are well formed."""

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

from tinystories_slm.grammar import (
    entropy,
    generate_corpus,
    generate_story,
    log_prob,
    num_stories,
    parse_story,
)
from tinystories_slm.grammar.grammar import PrefixFreeGenerator, StoryGenerator, StoryParser
from tinystories_slm.grammar.plots import PLOTS, courage, friends, home, outdoors
from tinystories_slm.grammar.stories import OPENINGS, branching_factors, run_grammar
from tinystories_slm.grammar.words import FRIENDS, HEROES, NAMES

NUM_STORIES = 4_000
# Words of summaries that are not in their stories.
CONNECTING = (
    "But Later Then afraid after against asked be before brought but buy came could did do either end for "
    "found glued grew had he helped it join kept like made needs not nothing of on out planted played "
    "practice promised pull ran shared she that they time tired to together told truth waiting want wanted "
    "was went who won word worked"
)


class RecordingGenerator(PrefixFreeGenerator):
    """Reject ambiguous options at every choice, and record the options and the chosen one."""

    def __init__(self, draw_index: Callable[[int], int]) -> None:
        super().__init__(draw_index)
        self.choices: list[tuple[tuple, object]] = []

    def choose(self, options: Sequence, render: Callable = str) -> object:
        option = super().choose(options, render)
        self.choices.append((tuple(options), option))
        return option


@pytest.fixture(scope="module")
def generated() -> list[tuple[str, RecordingGenerator]]:
    """Plot name and generator of 4,000 stories; ambiguous options raise an error."""
    stories = []
    for index in range(NUM_STORIES):
        generator = RecordingGenerator(random.Random(f"test/{index}").randrange)
        stories.append((run_grammar(generator).name, generator))
    return stories


story_index = st.integers(min_value=0, max_value=2**40)


@given(story_index, story_index)
def test_parser_returns_the_probability_of_the_generator(seed: int, index: int) -> None:
    story = generate_story(seed, index)
    assert story == generate_story(seed, index)
    assert log_prob(story.text) == pytest.approx(story.log_prob, abs=1e-12)
    assert parse_story(story.text) == story


def test_all_stories_of_a_plot_have_the_same_branching_factors(generated) -> None:
    by_name = {plot.name: plot for plot in PLOTS}
    assert all(tuple(generator.counts) == branching_factors(by_name[name]) for name, generator in generated)
    assert {name for name, _ in generated} == set(by_name)


def test_prefix_free_generator_writes_the_same_stories() -> None:
    for index in range(20):
        generator = PrefixFreeGenerator(random.Random(f"7/{index}").randrange)
        run_grammar(generator)
        assert generator.text == generate_story(7, index).text


def test_options_with_a_common_prefix_are_rejected() -> None:
    with pytest.raises(ValueError, match="'a ball' is a prefix of 'a balloon'"):
        PrefixFreeGenerator(lambda _: 0).choose(("a ball", "a kite", "a balloon"))
    with pytest.raises(RuntimeError, match="two options"):
        StoryParser("a balloon").choose(("a ball", "a kite", "a balloon"))


def test_every_option_occurs(generated) -> None:
    # Wordings may contain earlier choices, so their options are counted by position in the plot.
    # Lists of objects are the same tuples in every story and are counted by list.
    places: dict[tuple[str, int], set[int]] = defaultdict(set)
    lists: dict[tuple, set] = defaultdict(set)
    for name, generator in generated:
        for number, (options, option) in enumerate(generator.choices):
            places[name, number].add(options.index(option))
            if not isinstance(option, str):
                lists[options].add(option)
    for (name, number), reached in places.items():
        count = branching_factors(next(plot for plot in PLOTS if plot.name == name))[number]
        if count < len(OPENINGS):
            assert reached == set(range(count)), (name, number)
    for options, reached in lists.items():
        assert reached == set(options)


def test_entropy_is_the_mean_negative_log_probability(generated) -> None:
    losses = [-generator.log_prob for _, generator in generated]
    variance = math.fsum((s - entropy()) ** 2 for s in losses) / len(losses)
    error = 4 * math.sqrt(variance / len(losses))
    assert math.fsum(losses) / len(losses) == pytest.approx(entropy(), abs=error)
    assert 35 < entropy() < 70  # nats per story


def test_probabilities_sum_to_one() -> None:
    """Number of stories of a plot times the probability of one is the probability of the plot."""
    per_plot = [math.prod(branching_factors(plot)) * len(plot.openings) // len(OPENINGS) for plot in PLOTS]
    assert sum(per_plot) == num_stories() >= 10**15
    shares = [
        count * math.exp(-math.fsum(map(math.log, branching_factors(plot))))
        for plot, count in zip(PLOTS, per_plot, strict=True)
    ]
    assert shares == pytest.approx([1 / len(PLOTS)] * len(PLOTS))
    # All stories of a plot have the same probability, so its entropy is the log of their number.
    mean_log_count = math.fsum(map(math.log, per_plot)) / len(PLOTS)
    assert entropy() == pytest.approx(mean_log_count + math.log(len(PLOTS)))


def test_corpus_has_distinct_stories_in_index_order() -> None:
    stories = list(generate_corpus(10_000, seed=3))
    assert len(set(stories)) == 10_000
    assert stories[9_999] == generate_story(3, 9_999).text
    assert next(generate_corpus(10**12)) == generate_story(0, 0).text


@given(story_index, st.data())
def test_corrupted_story_is_rejected(index: int, data: st.DataObject) -> None:
    text = generate_story(0, index).text
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
        with pytest.raises(ValueError, match=r"no option matches at character \d+"):
            log_prob(corrupted)


def test_parse_error_gives_the_position() -> None:
    text = generate_story(0, 0).text
    place = text.rindex(" ") + 1
    with pytest.raises(ValueError, match=f"at character {place}, in .*xyzzy"):
        log_prob(text[:place] + "xyzzy.")


def test_changed_name_later_in_a_story_is_rejected() -> None:
    rejected = 0
    for text in generate_corpus(100):
        name = re.search(r"named (\w+)\.", text)[1]
        other = "Mia" if name != "Mia" else "Zoe"
        last = text.rindex(name)
        with pytest.raises(ValueError, match="no option matches"):
            log_prob(text[:last] + other + text[last + len(name) :])
        rejected += 1
    assert rejected == 100


def test_stories_are_well_formed(generated) -> None:
    for _, generator in generated:
        text = generator.text
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


def test_introduced_objects_and_characters_recur(generated) -> None:
    things = {
        "lost_thing": outdoors.LIGHT_THINGS,
        "hurt_animal": outdoors.PET_NAMES,
        "race": courage.PRIZES,
        "sharing": friends.TREATS,
        "giant_root": friends.ROOTS,
        "broken": home.PIECES,
        "present": [craft.made for craft in home.CRAFTS],
    }
    for name, generator in generated:
        paragraphs = generator.text.split("\n\n")
        hero = re.search(r"named (\w+)\.", paragraphs[0])[1]
        carer = re.search(r"with (?:his|her) (\w+)\.", paragraphs[0])[1]
        assert hero in paragraphs[-1], generator.text
        assert any(carer in p.lower() for p in paragraphs[1:]), generator.text
        chosen = [option for _, option in generator.choices]
        for thing in set(chosen) & set(things.get(name, ())):
            assert sum(thing in paragraph for paragraph in paragraphs) >= 2, generator.text
        for friend in set(chosen) & set(FRIENDS):
            assert sum(friend.name in paragraph for paragraph in paragraphs) >= 2, generator.text


def test_pronouns_agree_with_the_hero(generated) -> None:
    """The sentence after the introduction of the hero uses only the hero's pronouns."""
    heroes = {(hero.kind, hero.name): hero for hero in HEROES}
    for _, generator in generated:
        kind, name = re.search(r"(\w+) named (\w+)\.", generator.text).groups()
        hero = heroes[kind, name]
        sentence = generator.text.split(". ")[1]
        assert sentence.startswith(f"{hero.They} lived in")
        assert f"with {hero.their} " in sentence


def test_names_belong_to_one_character() -> None:
    all_names = [[c.name for c in HEROES], [c.name for c in FRIENDS], NAMES, outdoors.PET_NAMES]
    all_names.append([rival.name for rival in courage.RIVALS])
    assert all(len(set(names)) == len(names) for names in all_names)
    assert not any(set(a) & set(b) for a, b in combinations(all_names, 2))


def test_most_stories_open_like_tinystories(generated) -> None:
    first_words = Counter(generator.text.split(",")[0] for _, generator in generated)
    assert first_words["Once upon a time"] > NUM_STORIES / 2


def test_corpus_is_identical_on_every_platform() -> None:
    digest = sha256("\n".join(generate_corpus(100)).encode()).hexdigest()
    assert digest[:16] == "02a5d61fdc3a672c", "a story has changed: increase VERSION and update this digest"


def test_generator_accepts_any_index_source() -> None:
    generator = StoryGenerator(lambda _: 0)
    generator.emit("One", "Two")
    generator.start_paragraph()
    assert generator.choose((1, 2, 3), lambda number: f"{number}.") == 1
    assert generator.text == "One\n\n1."
    assert generator.log_prob == pytest.approx(-math.log(6))


def test_summary_and_features_are_true_of_the_story() -> None:
    """Names, things, places and deeds of a summary are in its story; only words that connect them are not."""
    connecting, features, summaries = set(), Counter(), set()
    for index in range(1000):
        story = generate_story(3, index)
        features.update(story.features)
        summaries.add(story.summary)
        text, summary = (set(re.findall(r"[A-Za-z]+", text)) for text in (story.text, story.summary))
        connecting |= summary - text - {word.capitalize() for word in text}
        assert ("MoralValue" in story.features) == ("learned" in re.split(r"[.!?]\"? ", story.text)[-1])
    assert (features["Dialogue"], set(features)) == (1000, {"Dialogue", "MoralValue", "Conflict", "Twist"})
    assert len(summaries) > 990
    assert connecting <= set(CONNECTING.split())
