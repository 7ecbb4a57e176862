import json

import pytest
import yaml
from hub.conftest import EVALUATION, STORY
from hub.loopback import metadata_errors
from huggingface_hub import ModelCard

from tinystories_slm.errors import InputError
from tinystories_slm.hub.card import Publication, render_card, write_card
from tinystories_slm.hub.record import Record


def card_of(run_dir, **publication) -> str:
    text = render_card(Record.load(run_dir), Publication(**publication))
    assert metadata_errors(text) == []
    for slip in ("None", "Undefined", "{{", "{%", "nan"):
        assert slip not in text, slip
    return text


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_card_states_the_runs_own_facts_and_no_path(whole_run):
    text = write_card(whole_run).read_text()

    assert text == (whole_run / "best" / "README.md").read_text() == card_of(whole_run)
    for fact in (
        "# tales",
        "35,360 parameters",  # 300 x 32 + 32 x 32 + 24,736 of the blocks
        "2 layers x 32, 4 heads, context of 32 tokens, vocabulary of 300",
        "those of GPT-2",
        "`tales.jsonl`, revision `sha256:",
        "| optimizer | adamw |",
        "| optimizer steps | 5 |",
        "| mixed precision | bf16 |",
        "![Training and validation loss over the optimizer steps](../loss.png)",
        "the validation stories of `tales.jsonl`",
        "8 stories, 99 tokens, 400 bytes",
        "| loss, nats per token | 1.2346 |",
        "| accuracy of the next token | 56.7% |",
        "float32; sums, then one division",
        'Prompt "Once upon a time", temperature 0.8, top-k 50, top-p 0.95, at most 40 new tokens, seed 3:',
        "> Once upon a time, a fox.\n>\n> The end.",
        "An Abacus, 2 cores, 24 GB",
        "torch 2.13.0",
        "`tinystories_slm` 0.7.8",
        "eprint        = {2305.07759}",
    ):
        assert fact in text, fact
    assert "nobody's business" not in text and "entropy" not in text and "licence" not in text


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("evaluation.json", ["Evaluation", "model-index", "1.2346", "Protocol", "metrics:"]),
        ("environment.json", ["Abacus", "bf16", "torch 2"]),
        ("stories.jsonl", ["Stories it told", "a fox"]),
        ("metrics.jsonl", ["| optimizer steps |", "training tokens |", "these weights"]),
        ("manifest.json", ["revision", "for training", "held out"]),
        ("config.yaml", ["| optimizer |", "Tokenizer:", "| seed"]),
        ("loss.png", ["loss.png"]),
    ],
)
def test_what_is_not_known_is_left_out(whole_run, file, facts):
    whole = card_of(whole_run)
    (whole_run / file).unlink()
    text = card_of(whole_run)
    assert all(fact in whole for fact in facts) and not any(fact in text for fact in facts)
    assert "35,360 parameters" in text


def test_a_model_alone_has_a_card_and_no_model_has_none(whole_run):
    for path in whole_run.iterdir():
        if path.is_file():
            path.unlink()
    text = card_of(whole_run)
    assert "Recipe" not in text and "Evaluation" not in text and "35,360 parameters" in text
    (whole_run / "best" / "config.json").unlink()
    with pytest.raises(InputError, match="no run folder with a model in best/"):
        Record.load(whole_run)


def test_the_figures_are_in_the_metadata_as_results(whole_run):
    data = ModelCard(card_of(whole_run, model_id="tester/fox", on_hub=True, license="mit")).data

    assert (data.pipeline_tag, data.library_name, data.license) == ("text-generation", "transformers", "mit")
    assert data.model_name == "fox" and data.base_model is None and data.datasets is None
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        name: EVALUATION[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {("tales.jsonl", "validation")}


def test_figures_and_stories_of_another_model_are_not_this_ones(whole_run):
    change(whole_run / "evaluation.json", model="runs/tales/last")
    (whole_run / "stories.jsonl").write_text(json.dumps(STORY | {"model": "gpt2"}) + "\n")
    text = card_of(whole_run)
    assert "Evaluation" not in text and "Stories it told" not in text


def test_of_many_stories_three_are_in_the_card(whole_run):
    lines = [json.dumps(STORY | {"seed": seed}) for seed in range(9)]
    (whole_run / "stories.jsonl").write_text("\n".join(lines))
    text = card_of(whole_run)
    assert "The first 3 of the run's `stories.jsonl`" in text
    assert [seed for seed in range(9) if f"seed {seed}:" in text] == [0, 1, 2]


def test_the_grammars_entropy_stands_beside_the_loss(whole_run):
    change(whole_run / "evaluation.json", entropy=0.1794, entropy_bits_per_byte=0.0672)
    assert "own entropy on these stories\nis 0.1794 nats per token (0.0672 bits" in card_of(whole_run)


@pytest.mark.parametrize(
    ("source", "licence"), [("roneneldan/TinyStories", "CDLA-Sharing-1.0"), ("tester/other", None)]
)
def test_a_dataset_of_the_hub_is_named_with_its_commit_and_its_licence_if_known(whole_run, source, licence):
    change(whole_run / "manifest.json", source=source, revision="f54c09fd" * 5)
    text = card_of(whole_run)
    assert f"[`{source}`](https://huggingface.co/datasets/{source}), revision `{'f54c09fd' * 5}`" in text
    assert ModelCard(text).data.datasets == [source]
    assert ("licence" in text) == (licence is not None) and (licence or "") in text


def test_the_base_model_is_told_if_it_is_one_of_the_hub(whole_run):
    path = whole_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for init_from, base_model in (("tester/first", "tester/first"), (str(whole_run / "best"), None)):
        config["train"]["init_from"] = init_from
        path.write_text(yaml.safe_dump(config))
        text = card_of(whole_run)
        assert ModelCard(text).data.base_model == base_model
        assert ("Training started from" in text) == (base_model is not None)


NASTY = [
    "Once `code` and *stars* and _lines_ and | pipes |",
    "# No heading, - no list",
    "---",
    "1. No list: <script>alert(1)</script> &amp; <!-- no comment",
    "{{ card_data }} {% endif %} [no](link) ~~no~~ $no$",
    "> no quote",
    "```python",
    "    indented",
    "=====",
]


def test_stories_of_any_letters_leave_the_card_whole(whole_run):
    markdown_it = pytest.importorskip("markdown_it")
    (whole_run / "stories.jsonl").write_text(
        json.dumps(STORY | {"story": "\n\n".join(NASTY), "prompt": "|`"})
    )
    change(whole_run / "manifest.json", source="/x/a `b` | {{c}}: - #.jsonl", revision="sha256:0")
    change(whole_run / "evaluation.json", protocol="a | b\n---\n`c` {{d}}")
    text = render_card(Record.load(whole_run), Publication())

    assert metadata_errors(text) == []
    assert ModelCard(text).data.eval_results[0].dataset_name == "a `b` | {{c}}: - #.jsonl"
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    paragraphs = [token for token in tokens if token.type == "inline" and token.level == 2]
    read = ["".join(child.content for child in token.children) for token in paragraphs]
    assert read[-len(NASTY) :] == [" ".join(line.split()) for line in NASTY]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[-4:] == ["Stories it told", "Limits and bias", "Hardware and time", "Origin"]


def test_a_figure_that_is_missing_or_no_number_is_left_out(whole_run):
    (whole_run / "evaluation.json").write_text('{"loss": 1.5, "perplexity": null, "accuracy": NaN}')
    text = card_of(whole_run)
    assert "| loss, nats per token | 1.5000 |" in text
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["loss"]
    for name in ("perplexity", "accuracy", "bits", "bytes"):
        assert name not in text.split("## Evaluation")[1].split("## Stories")[0].replace("bytes +", ""), name
