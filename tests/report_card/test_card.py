"""The report card of a model: figures, page, and clear errors for what cannot be measured."""

import copy
import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import brightness, tiny_model
from report_card.bad_endpoint import GOOD_MARKS, bad_endpoint
from transformers import PreTrainedTokenizerFast

from tinystories_slm import grammar
from tinystories_slm.config import parse
from tinystories_slm.config.command_args.reports import ReportCardArgs
from tinystories_slm.data.source_stories import in_validation
from tinystories_slm.data.sources import builtin
from tinystories_slm.data.sources.file_formats import END_OF_TEXT
from tinystories_slm.data.tokenizer import train_bpe
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.training_data import TrainingData
from tinystories_slm.grammar.grammar import StoryParser
from tinystories_slm.grammar.stories import run_grammar
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.report_card import card as card_module
from tinystories_slm.report_card import judge as judge_module
from tinystories_slm.report_card import sections
from tinystories_slm.report_card.card import HELD_OUT, report_card
from tinystories_slm.report_card.card_prompts import read_card_prompts
from tinystories_slm.report_card.measures import MEASURES
from tinystories_slm.report_card.page import render_page

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = train_bpe(list(grammar.generate_corpus(30, seed=1)), 400)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, model_max_length=96)


@pytest.fixture(scope="module")
def model(tokenizer):
    """An untrained model that states training stories: the first 300 of the built-in corpus, 5% held out."""
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0, max_position_embeddings=96)
    record = TrainingData(
        source="builtin",
        revision="grammar 1",
        validation_split="auto",
        validation_fraction=0.05,
        max_stories=300,
    )
    model.config.training_data = [record.to_dict()]
    return model


@pytest.fixture(scope="module")
def model_folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tales"
    save_model_folder(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def stories_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    texts = list(grammar.generate_corpus(50, seed=8))
    (folder / "train.txt").write_text("<|endoftext|>".join(texts[:30]), encoding="utf-8")
    (folder / "validation.txt").write_text("<|endoftext|>".join(texts[30:]), encoding="utf-8")
    return folder


def make_args(model_folder, output, **options) -> ReportCardArgs:
    return ReportCardArgs(
        model=str(model_folder), output=output / "card.html", num_stories=20, max_new_tokens=24, **options
    )


@pytest.fixture(scope="module")
def written(model_folder, stories_file, tmp_path_factory):
    """Folder of a card with a second model, and the contents of its JSON file."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(model_folder, folder / "other")
    args = make_args(model_folder, folder, baseline=[str(folder / "other")], data=str(stories_file))
    returned = report_card(args)
    found = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(returned))
    return folder, found


def test_prompts_start_stories_of_the_built_in_corpus():
    prompts = read_card_prompts()
    assert len(prompts) == len(set(prompts)) == 20
    for prompt in prompts:
        with pytest.raises(ValueError, match=f"at character {len(prompt)}, "):
            run_grammar(StoryParser(prompt))


def test_card_has_every_measure_of_every_set_with_its_uncertainty(written):
    _, card = written
    model, other, held_out = [one["name"] for one in card["sets"]]
    assert held_out == HELD_OUT and model.endswith("/tales") and other.endswith("/other")
    names = [measure["name"] for measure in card["measures"]]
    assert names == [*(measure.name for measure in MEASURES), "longest_run", "run_share", "rouge_l"]
    by_name = {measure["name"]: measure["by_set"] for measure in card["measures"]}
    assert by_name["words"][model]["count"] == 20
    for one in by_name.values():
        assert one[model] == one[other]  # a copy of the model
        for estimate in filter(None, one.values()):
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    # Held-out stories close their quotation marks, repeat little, and are no copies.
    assert by_name["quotations_closed"][held_out]["value"] == by_name["ended"][held_out]["value"] == 1.0
    assert 0.4 < by_name["rouge_l"][held_out]["value"] < 0.9
    assert by_name["ended"][model]["difference"]["high"] < 0  # 24 tokens are too few for an end
    assert card["memorization"]["num_training_stories"] == 30
    assert not card["memorization"]["is_recorded"]
    seeds = [story["seed"] for story in card["sets"][0]["stories"]]
    assert seeds == list(range(20)) and card["prompts_version"] == "1"


def test_card_names_no_path_of_this_machine(written, model_folder, stories_file):
    folder, _ = written
    for name in ("card.html", "card.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert str(model_folder.parent) not in text and str(stories_file.parent) not in text


def test_page_escapes_what_a_model_writes(written):
    _, card = written
    card = json.loads(json.dumps(card))
    card["sets"][0]["stories"][0]["text"] = "<script>alert(1)</script>"
    page = render_page(card)
    assert "&lt;script&gt;alert(1)" in page and "<script>alert" not in page


def test_data_are_by_default_what_the_model_was_trained_on(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sections, "MEASURES", MEASURES[:2])
    monkeypatch.setattr(builtin, "BUILTIN_STORIES", 500)  # 40,000 take seconds
    card = report_card(make_args(model_folder, tmp_path))
    expected = {"source": "builtin", "split": "validation", "num_training_stories": 0}
    assert card["data"] == card["data"] | expected
    held_out = {story["text"] for story in card["sets"][-1]["stories"]}
    corpus = list(grammar.generate_corpus(300))
    trained_on = [text for text in corpus if not in_validation(text, 0.05)]
    by_name = {measure["name"]: measure["by_set"] for measure in card["measures"]}
    assert by_name["grammar_accepted"]["held-out stories"]["value"] == 1.0
    [model_name, _] = by_name["grammar_accepted"]
    assert by_name["grammar_accepted"][model_name]["value"] == 0.0
    assert 0.02 < by_name["grammar_correct"][model_name]["value"] < 0.9  # at least the prompt is right
    assert by_name["entropy_distance"][model_name]["low"] > 1.0  # untrained
    found = card["grammar"][model_name]
    assert sum(found["breaks"].values()) == 20
    assert sum(plot["num_stories"] for plot in found["by_plot"].values()) == 20
    page = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "First broken constraint" in page and next(iter(found["breaks"])) in page
    assert len(held_out) == 20 and not held_out & set(trained_on)
    memorization = card["memorization"]
    assert memorization["num_training_stories"] == len(trained_on) and memorization["is_recorded"]


def test_judge_marks_the_stories_and_its_answers_stay_off_the_page(
    model_folder, stories_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sections, "MEASURES", MEASURES[:1])
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-of-the-test")

    def answer(messages):
        is_pair = "Story A" in messages[1]["content"]
        return "<script>alert(1)</script>" + (
            '{"better": "A", "note": "<b>x</b>"}' if is_pair else GOOD_MARKS
        )

    with bad_endpoint(answer) as server:
        options = {
            "data": str(stories_file), "memorization": False, "judge": "grader", "judge_url": server.url,
            "judge_key_env": "JUDGE_KEY", "judge_stories": 3, "judge_requests_per_minute": 10**6,
        }  # fmt: skip
        estimate = report_card(make_args(model_folder, tmp_path, judge_estimate=True, **options))
        num_requests = 2 * 3 * 2 + 2 * (3 + 24)
        assert estimate["judge_estimate"]["num_requests"] == num_requests and not server.requests
        assert f"judge grader: {num_requests} requests (0 more have an answer)" in capsys.readouterr().out
        assert not list(tmp_path.iterdir())

        card = report_card(make_args(model_folder, tmp_path, **options))
        assert len(server.requests) == num_requests
        report_card(make_args(model_folder, tmp_path, **options))
        assert len(server.requests) == num_requests
        # Without the endpoint, the answers on disk are enough; for other stories the card has no judge.
        options["judge_stories"] = 4
        monkeypatch.setattr(judge_module, "_MAX_RETRIES", 0)
        server.faults = ["500"] * 99
        (tmp_path / "card.html").unlink()
        with pytest.raises(UserError, match="status 500"):
            report_card(make_args(model_folder, tmp_path, **options))
        assert "judge" not in json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
        assert (tmp_path / "card.html").is_file()
        options["judge_stories"], num_requests = 3, len(server.requests)
        report_card(make_args(model_folder, tmp_path, **options))
        assert len(server.requests) == num_requests
    assert card["judge"]["planted_found"]["value"] == 0.0 and card["judge"]["first_preferred"]["value"] == 1.0
    by_name = {measure["name"]: measure["by_set"] for measure in card["measures"]}
    assert by_name["judge_consistency"][HELD_OUT]["value"] == 7.0
    for path in tmp_path.iterdir():
        assert "sk-secret" not in path.read_text(encoding="utf-8"), path
    page = (tmp_path / "card.html").read_text(encoding="utf-8")
    assert "alert(1)" not in page and "planted faults found" in page
    assert page.count('panel unreliable"') == 5 and "This judge is not reliable." in page
    assert "It finds 0 of 24 planted faults, and a judge that guesses finds about 6." in page
    assert server.keys == {"Bearer sk-secret-of-the-test"}


def test_errors_name_the_option_and_the_fix(model_folder, stories_file, tmp_path, monkeypatch):
    config = json.loads((model_folder / "config.json").read_text())
    shutil.copytree(model_folder, tmp_path / "silent")
    [record] = config.pop("training_data")
    (tmp_path / "silent" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data is missing: nothing states what .* set --data"):
        report_card(make_args(tmp_path / "silent", tmp_path))
    record |= {"source": "mine.txt", "revision": "sha256:00"}
    (tmp_path / "silent" / "config.json").write_text(json.dumps(config | {"training_data": [record]}))
    with pytest.raises(UserError, match=r"data is missing: .* mine.txt, which was a local file; set --data"):
        report_card(make_args(tmp_path / "silent", tmp_path))
    with pytest.raises(UserError, match=r"baseline \(.*tales\): must differ"):
        report_card(make_args(model_folder, tmp_path, baseline=[str(model_folder)], data="builtin"))
    with pytest.raises(UserError, match=r"num_stories \(3\): must be at least 10; use 300"):
        ReportCardArgs(model="m", num_stories=3)
    with pytest.raises(UserError, match=r"output \(card.txt\): must be the path of a page"):
        ReportCardArgs(model="m", output=Path("card.txt"))

    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer \(.*broken\) cannot be loaded"):
        report_card(make_args(broken, tmp_path, data=str(stories_file)))

    def without_textstat(name):
        if name == "textstat":
            raise ImportError(name)
        return importlib.import_module(name)

    monkeypatch.setattr(card_module, "import_module", without_textstat)
    with pytest.raises(
        UserError, match=r"textstat is not installed; pip install 'tinystories_slm\[report\]'"
    ):
        report_card(make_args(model_folder, tmp_path))
    assert not (tmp_path / "card.html").exists()


def test_weights_that_are_no_numbers_are_an_error(model, tokenizer, stories_file, tmp_path):
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters())[0, 0] = float("nan")
    save_model_folder(model, tokenizer, tmp_path / "nan")
    with pytest.raises(UserError, match=r"model \(.*nan\): weights must be finite, .* another checkpoint"):
        report_card(make_args(tmp_path / "nan", tmp_path, data=str(stories_file)))


@pytest.mark.parametrize(
    "flags",
    [
        ["--baseline", "a", "b", "--seed", "1"],
        ["--baseline=a", "--baseline=b", "--seed=1"],
        ["--baseline=[a,b]", "--seed=1"],
        ["--seed", "1", "--baseline", "a", "--baseline", "b"],
    ],
)
def test_baselines_may_be_listed_or_repeated(flags):
    args = parse(ReportCardArgs, ["--model", "m", *flags])
    assert (args.model, args.baseline, args.seed) == ("m", ["a", "b"], 1)
    assert dataclasses.replace(args, baseline=[]) == parse(ReportCardArgs, ["--model", "m", "--seed", "1"])


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "height", "scheme"), [(1280, 900, "light"), (390, 844, "dark")], ids=["desk", "phone"]
)
def test_page_renders_on_a_desk_and_on_a_phone(written, browser, width, height, scheme):
    folder, card = written
    errors, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "card.html").as_uri())
    assert page.locator("h1").inner_text().startswith("Report card: ")
    assert page.locator("h2").all_inner_texts() == ["Stories", "Memorization", "Generated stories"]
    assert page.locator(".panel").count() == len(card["measures"])
    assert page.locator(".panel .line").count() == 3 * len(card["measures"])
    for track in page.locator(".panel").first.locator(".track").all():
        box = track.bounding_box()
        assert box["width"] > 200 and box["x"] >= 0 and box["x"] + box["width"] <= width
    text, back = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(text) > brightness(back)) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not errors and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()
