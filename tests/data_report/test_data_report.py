"""The report of prepared stories: figures of known stories, the page, the card, and errors in one line."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, SHARED
from runs.test_report import brightness

from tinystories_slm.commands import run
from tinystories_slm.config import parse
from tinystories_slm.config.command_args.reports import DataReportArgs
from tinystories_slm.data.tokenizer import encode_stories, load_tokenizer, train_tokenizer
from tinystories_slm.data_report import report as report_module
from tinystories_slm.data_report import text
from tinystories_slm.data_report.card import render_card
from tinystories_slm.data_report.page import render_page
from tinystories_slm.data_report.report import measure, write_data_report
from tinystories_slm.data_report.vocabularies import Vocabulary, describe_choice
from tinystories_slm.errors import UserError

ANIMALS = ("cat", "dog", "fox", "hen", "owl", "pig", "bee", "ant")
STORIES = [
    f"One day, a little {ANIMALS[n % 8]} met Lily{n % 3 * ' and Tom'}. They saw {n} red kites, {n * 7} blue "
    f"boats and {n * n} green hills. {'The rain fell. ' * (n % 5)}Then Lily went home, and day {n} was over."
    for n in range(150)
]


def write_stories(folder: Path) -> Path:
    """150 stories, 5 of them twice, one with typographic quotes, and 20 others for validation, one leaked."""
    folder.mkdir()
    validation = [story.replace("One day, a", "Once, the").replace("They", "Both") for story in STORIES[:20]]
    train = [*STORIES[20:], *STORIES[20:25], f"\u201cWell,\u201d said the owl. {STORIES[30]}", STORIES[0]]
    for split, stories in (("train", train), ("validation", [*validation, STORIES[0]])):
        lines = [json.dumps({"text": story}) + "\n" for story in stories]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def report_args(source: Path | str, data_dir: Path, *flags: str) -> DataReportArgs:
    options = [f"--data.source={source}", f"--data.data_dir={data_dir}", "--tokenizer.vocab_size=600"]
    return parse(DataReportArgs, [*options, "--data.seq_len=64", *flags])


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataReportArgs:
    folder = tmp_path_factory.mktemp("a private place")
    args = report_args(write_stories(folder / "tales"), folder / "data")
    write_data_report(args)
    return args


@pytest.fixture(scope="module")
def values(config) -> dict:
    return json.loads((config.data.data_dir / "report.json").read_text())


def test_report_has_the_figures_of_known_stories(config, values):
    train = list(report_module.iter_raw_stories(config.data.data_dir, "train"))
    assert values["source"] == values["provenance"]["source"] == "tales"
    assert (values["num_sampled"], values["splits"]["validation"]["num_stories"]) == (137, 21)
    lengths = values["lengths"]["train"]
    assert lengths["characters"]["max"] == max(map(len, train))
    assert lengths["words"]["min"] == min(len(story.split()) for story in train)  # one blank, one word
    assert values["openings"][0] == {"text": "One day a little", "num_stories": 136}
    assert values["names"][:2] == [
        {"text": "Lily", "num_stories": 137},
        {"text": "Tom", "num_stories": sum(" and Tom" in story for story in train)},
    ]
    assert values["growth"][-1][0] == sum(len(text._WORD.findall(story)) for story in train)
    assert values["growth"] == sorted(values["growth"]) and len(values["growth"]) == 60
    assert values["is_english"] and 0 < values["frequent_share"] <= 1


def test_report_counts_faults_that_nothing_removed(values):
    assert values["cleaning"]["is_applied"] is False
    assert values["cleaning"]["counts"]["punctuation"]["num_changed"] == 1
    repeated = values["repeated"]
    assert repeated["is_dropped"] is False
    assert repeated["num_exact"] + repeated["num_near"] + repeated["num_leaks"] >= 7  # planted
    assert repeated["num_exact"] >= 1 and repeated["num_leaks"] >= 1


def test_report_states_what_a_download_removed(tmp_path, values):
    source = write_stories(tmp_path / "tales")
    args = report_args(source, tmp_path / "data", "--data.cleaning=true", "--data.deduplicate=true")
    found = write_data_report(args)
    assert found.cleaning.is_applied and found.cleaning.counts["punctuation"]["num_changed"] == 1
    assert asdict(found.repeated) == values["repeated"] | {"is_dropped": True}  # the quotes change no word
    card = (tmp_path / "data" / "README.md").read_text()
    assert "`punctuation`: 1 stories repaired, 0 dropped" in card and "- Dropped: " in card
    assert "Repaired or dropped, of" in (tmp_path / "data" / "report.html").read_text()


def test_vocabularies_are_those_that_training_gives(config, values):
    """The configured one is that of train_tokenizer, and its figures are those of the encoded stories."""
    folder = train_tokenizer(config.data, config.tokenizer)
    tokenizer = load_tokenizer(folder)
    validation = list(report_module.iter_raw_stories(config.data.data_dir, "validation"))
    num_tokens = sum(map(len, encode_stories(tokenizer, validation)))
    [configured] = [one for one in values["vocabularies"] if one["is_configured"]]
    assert configured["vocab_size"] == len(tokenizer) == 600
    assert configured["bytes_per_token"] == round(sum(map(len, validation)) / num_tokens, 3)
    assert configured["tokens_per_story"] == round(num_tokens / 21 + 1, 1)
    train = list(report_module.iter_raw_stories(config.data.data_dir, "train"))
    lengths = [len(ids) + 1 for ids in encode_stories(tokenizer, train)]
    assert values["lengths"]["train"]["tokens"]["max"] == max(lengths)
    assert values["share_in_window"] == sum(length <= 64 for length in lengths) / len(lengths)
    sizes = [one["vocab_size"] for one in values["vocabularies"]]
    assert (
        sizes[:2] == [512, 600] and sizes == sorted(set(sizes)) and sizes[-1] < 1024
    )  # all merges there are
    assert configured["embedding_parameters"] == 600 * config.model.hidden_size


def test_choice_is_the_first_vocabulary_whose_doubling_is_not_worth_it():
    def vocabulary(size: int, compression: float, num_rare: int = 0) -> Vocabulary:
        return Vocabulary(
            vocab_size=size, is_configured=False, bytes_per_token=compression, tokens_per_story=1.0,
            num_rare=num_rare, embedding_parameters=size * 10, embedding_share=size / 10_000,
        )  # fmt: skip

    three = [vocabulary(1024, 3.0), vocabulary(2048, 3.5), vocabulary(4096, 3.6)]
    assert describe_choice(three) == (
        "Choose 2,048 entries: 4,096 make the text 2.8 % shorter, but add 20,480 parameters to the "
        "embedding (41 % of the model instead of 20 %), and 0 % of the entries occur fewer than 100 times."
    )
    assert describe_choice(three[:2]) == "Choose 2,048 entries: the stories fill no more."
    two = [vocabulary(4096, 3.0), vocabulary(8192, 3.5, num_rare=4096)]
    assert describe_choice(two).startswith("Choose 8,192 entries or more: each doubling still shortens")
    for last in (vocabulary(1024, 3.0, num_rare=768), vocabulary(1000, 3.0, num_rare=750)):
        choice = describe_choice([vocabulary(512, 2.0), vocabulary(600, 2.0), last])
        assert choice.startswith(f"Choose 512 entries: {last['vocab_size']:,} make the text 33.3 % shorter")
        assert choice.endswith("and 75 % of the entries occur fewer than 100 times.")


def test_common_words_are_no_names():
    statistics = text.read_text(["Then, Once came. He saw Tim, and the Sun, and a sun."], 1)
    assert statistics.capitalized.keys() == {"Once", "Tim", "Sun"}
    counts = text.count_lower_words({" sun": 1, " once,": 1, " Tim": 3})
    assert [name["text"] for name in statistics.top_names(counts, 9)] == ["Tim"]


def test_openings_of_a_language_without_blanks_are_cut():
    statistics = text.read_text(["\u4ece\u524d" * 900, "!?", ""], 3)
    assert list(statistics.openings) == ["\u4ece\u524d" * 30, ""]
    assert (statistics.num_words, statistics.growth[-1]) == ([1, 0, 0], (1, 1))


def test_card_describes_the_files_as_the_hub_reads_it(config):
    card = (config.data.data_dir / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    [entry] = metadata["configs"]
    for files in entry["data_files"]:
        table = pq.read_table(config.data.data_dir / files["path"])
        assert (
            table.column_names == ["text"]
            and table.num_rows == {"train": 137, "validation": 21}[files["split"]]
        )
    assert metadata["size_categories"] == "n<1K" and "license" not in metadata
    assert "/private" not in card and str(config.data.data_dir.parent) not in card


def test_card_of_a_named_set_states_license_and_citation(config):
    found = measure(config)
    named = type(found)(**vars(found) | {
        "license": "[CDLA-Sharing-1.0](https://cdla.dev/sharing-1-0/)",
        "dataset_ids": ["roneneldan/TinyStories"], "citations": ["Eldan and Li, 2023"],
    })  # fmt: skip
    card = render_card(named, folder="data", repo_id="tester/tales")
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["license"], metadata["pretty_name"]) == ("cdla-sharing-1.0", "tales")
    assert metadata["source_datasets"] == ["roneneldan/TinyStories"]
    assert "- Citation: Eldan and Li, 2023" in card and 'load_dataset("tester/tales"' in card
    other = render_card(named, folder="data", repo_id="tester/tales", license="mit")
    assert yaml.safe_load(other.split("---\n")[1])["license"] == "mit"


def test_report_of_the_built_in_corpus_in_its_own_folder(tmp_path, monkeypatch, capsys):
    """The first command of docs/data.md, with fewer stories."""
    [block] = re.findall(
        r"```bash\n(python scripts/data_report.*?)```", (ROOT / "docs/data.md").read_text(), re.S
    )
    documented = [line.split()[2:] for line in block.splitlines()]
    assert all(isinstance(parse(DataReportArgs, argv), DataReportArgs) for argv in documented)
    argv = [str(ROOT / word) if word.startswith("configs/") else word for word in documented[0]]
    monkeypatch.chdir(tmp_path)
    run("data_report", [*argv, "--data.max_stories=60", "--tokenizer.vocab_size=300"])
    values = json.loads(Path("data/builtin/report.json").read_text())
    assert values["cleaning"] is None and values["repeated"] is None
    page = Path("data/builtin/report.html").read_text()
    assert "stories are not cleaned" in page and "repeats itself by design" in page
    assert "license: mit" in Path("data/builtin/README.md").read_text()
    assert capsys.readouterr().out.splitlines()[0] == values["choice"]


def test_page_loads_nothing_and_escapes_the_stories(config):
    found = measure(config)
    hostile = "<script>alert(1)</script> {{ 7 * 7 }}"
    page = render_page(type(found)(**vars(found) | {"openings": [{"text": hostile, "num_stories": 1}]}))
    assert "<script>alert" not in page and "{{ 7 * 7 }}" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and len(page) < 100_000


def test_large_sources_are_sampled(config, monkeypatch):
    monkeypatch.setattr(report_module, "MAX_STORIES", 40)
    monkeypatch.setattr(report_module, "find_repeated", lambda *_: None)
    found = measure(config)
    assert found.num_sampled == 40 and len(found.growth) == 40
    assert "measured on 40 of the training stories" in render_page(found)
    assert "Duplicates were not counted" in render_card(found, folder="raw")
    assert "a sample" not in render_card(found, folder="raw") + render_page(found)
    streamed = replace(found, provenance=replace(found.provenance, streaming=True))
    assert "; a sample, the first stories." in render_card(streamed, folder="raw")
    assert "a sample, the first ones" in render_page(streamed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has no train stories"),
        (json.dumps({"text": "One story."}), r"has no (train|validation) stories"),
        (None, r"does not exist"),
    ],
)
def test_bad_input_is_a_one_line_error(tmp_path, content, message):
    source = tmp_path / "tales.jsonl"
    if content is not None:
        source.write_text(content)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        write_data_report(report_args(source, tmp_path / "data"))
    assert not (tmp_path / "data" / "report.html").exists()


def test_options_of_a_push_need_one():
    with pytest.raises(UserError, match=r"private \(True\) has no effect without push; add --push USER/NAME"):
        parse(DataReportArgs, ["--private=true"])
    with pytest.raises(UserError, match=r"push \(tales\) must include the owner; use USER/tales"):
        parse(DataReportArgs, ["--push=tales"])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def test_page_renders_in_a_browser(config, browser, width, scheme):
    errors, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((config.data.data_dir / "report.html").as_uri())
    assert page.locator("h2").all_inner_texts() == [
        "Lengths", "Which vocabulary?", "Words", "Cleaning", "Duplicates and leaks", "Origin",
    ]  # fmt: skip
    charts = page.locator("svg.chart:visible")
    assert [chart.get_attribute("aria-label") for chart in charts.all()] == [
        "stories by length in words", "stories by length in tokens", "Bytes per token",
        "Share of the embedding", "distinct words",
    ]  # fmt: skip
    for label in page.locator("svg.chart:visible").nth(2).locator("text.tick").all():
        assert label.bounding_box()["x"] >= 0
    colors = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    front, back = page.evaluate(colors)
    assert (brightness(front) > brightness(back)) == (scheme == "dark")
    charts.nth(2).scroll_into_view_if_needed()
    box = charts.nth(2).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.locator("#tip").inner_text().startswith("vocabulary of ")
    page.locator("summary").first.click()
    assert page.locator("details p").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors and [url for url in requests if not url.startswith(("file:", "data:"))] == []
    page.close()


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="needs the stories in shared/data")
def test_report_of_real_stories(tmp_path):
    source = tmp_path / "tales.parquet"
    source.symlink_to(SHARED / "data" / "tinystories" / "validation-00000-of-00001.parquet")
    found = write_data_report(report_args(source, tmp_path / "data", "--data.max_stories=500"))
    assert found.openings[0]["text"] == "Once upon a time" and found.is_english
    assert {"Lily", "Tim", "Tom"} <= {name["text"] for name in found.names}
    assert 2 < found.vocabularies[0]["bytes_per_token"] < found.vocabularies[-1]["bytes_per_token"] < 5
    assert (found.repeated.num_exact, found.repeated.num_leaks) == (0, 0)
