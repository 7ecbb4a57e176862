import json

import pytest
import torch
from hub.conftest import EVALUATION, STORY
from hub.loopback import metadata_errors
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from tinystories_slm.config import parse_config, save_config
from tinystories_slm.data.chat_template import CHAT_TEMPLATE
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import PROTOCOL
from tinystories_slm.hub.card import CardTarget, is_card_current, render_card, write_card
from tinystories_slm.hub.markdown import escape_markdown
from tinystories_slm.hub.published_run import PublishedRun
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.model_folder import weights_sha256
from tinystories_slm.runs.report import write_report


def card_text(run_dir, **target) -> str:
    text = render_card(PublishedRun.load(run_dir), CardTarget(**target))
    assert metadata_errors(text) == []
    for artifact in ("None", "Undefined", "{{", "{%", "nan"):
        assert artifact not in text, artifact
    return text


def update_json(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def update_config(run_dir, *flags: str) -> None:
    path = run_dir / "config.yaml"
    save_config(parse_config([f"--config={path}", *flags]), path)


def test_card_contains_the_facts_of_the_run_and_no_path(complete_run):
    text = write_card(complete_run).read_text()

    assert text == (complete_run / "best" / "README.md").read_text() == card_text(complete_run)
    for fact in (
        "# tales",
        "35,360 parameters",  # 300 x 32 + 32 x 32 + 24,736 of the blocks
        "2 layers x 32, 4 heads, context of 32 tokens, vocabulary of 300",
        "equivalent to GPT-2",
        "`tales.jsonl`, revision `sha256:",
        "| optimizer | adamw |",
        "| optimizer steps | 5 |",
        "| mixed precision | bf16 |",
        "![Training and validation loss over the optimizer steps](../loss.png)",
        "the validation stories of `tales.jsonl`",
        "8 stories, 99 tokens, 400 bytes",
        "| loss, nats per token | 1.2346 |",
        "| next-token accuracy | 56.7% |",
        escape_markdown(PROTOCOL),
        'Prompt "Once upon a time", temperature 0.8, top-k 50, top-p 0.95, at most 40 new tokens, seed 3:',
        "> Once upon a time, a fox.\n>\n> The end.",
        "An Abacus, 2 cores, 24 GB",
        "torch 2.13.0",
        "`tinystories_slm` 0.7.8",
        "eprint        = {2305.07759}",
    ):
        assert fact in text, fact
    assert "a private place" not in text and "entropy" not in text and "license" not in text


@pytest.mark.parametrize(
    ("file", "facts"),
    [
        ("evaluation.json", ["Evaluation", "model-index", "1.2346", "Protocol", "metrics:"]),
        ("environment.json", ["Abacus", "bf16", "torch 2"]),
        ("stories.jsonl", ["Generated stories", "a fox"]),
        ("metrics.jsonl", ["| optimizer steps |", "training tokens |", "best model"]),
        ("manifest.json", ["revision", "Training split", "Validation split"]),
        ("config.yaml", ["| optimizer |", "Tokenizer:", "| seed"]),
        ("loss.png", ["loss.png"]),
    ],
)
def test_card_omits_the_facts_of_a_missing_file(complete_run, file, facts):
    before = card_text(complete_run)
    (complete_run / file).unlink()
    text = card_text(complete_run)
    assert all(fact in before for fact in facts) and not any(fact in text for fact in facts)
    assert "35,360 parameters" in text


def test_card_requires_only_a_model(complete_run):
    for path in complete_run.iterdir():
        if path.is_file():
            path.unlink()
    text = card_text(complete_run)
    assert "recipe" not in text and "Evaluation" not in text and "35,360 parameters" in text
    (complete_run / "best" / "config.json").unlink()
    with pytest.raises(UserError, match="is not a run directory with a model in best/"):
        PublishedRun.load(complete_run)


def test_card_metadata_contains_the_evaluation(complete_run):
    data = ModelCard(card_text(complete_run, model_id="tester/fox", on_hub=True, license="mit")).data

    assert (data.pipeline_tag, data.library_name, data.license) == ("text-generation", "transformers", "mit")
    assert data.model_name == "fox" and data.base_model is None and data.datasets is None
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        name: EVALUATION[name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }
    assert {(r.dataset_type, r.dataset_split) for r in data.eval_results} == {("tales.jsonl", "validation")}


def test_card_omits_metrics_and_stories_of_other_models(complete_run):
    update_json(complete_run / "evaluation.json", model="runs/tales/last")
    (complete_run / "stories.jsonl").write_text(json.dumps(STORY | {"model": "gpt2"}) + "\n")
    text = card_text(complete_run)
    assert "Evaluation" not in text and "Generated stories" not in text


def test_card_omits_metrics_and_stories_of_other_weights(complete_run, caplog):
    sha256 = weights_sha256(complete_run / "best")
    for weights in (sha256, "0" * 64):
        update_json(complete_run / "evaluation.json", weights_sha256=weights, model="elsewhere")
        (complete_run / "stories.jsonl").write_text(json.dumps(STORY | {"weights_sha256": weights}) + "\n")
        text = card_text(complete_run)
        of_best = weights == sha256
        assert ("| loss, nats per token | 1.2346 |" in text) == ("Generated stories" in text) == of_best
        assert ("evaluation.json is omitted: its weights are not those in best/" in caplog.text) != of_best
        assert ("1.2346" in write_report(complete_run).read_text()) == of_best


def test_card_names_the_weights_and_their_step(complete_run):
    sha256 = weights_sha256(complete_run / "best")
    assert sha256 == file_sha256(complete_run / "best" / "model.safetensors")
    text = card_text(complete_run)
    assert f"The weights are from optimizer step 5. SHA-256 of `model.safetensors`: `{sha256}`." in text
    # Of metrics.jsonl the line of that step counts, not the lowest loss, which may be of fewer stories.
    with (complete_run / "metrics.jsonl").open("a") as file:
        for step, loss in ((4, 0.5), (5, 5.25)):
            line = {"step": step, "tokens": 9, "val/loss": loss, "val/num_stories": step}
            file.write(json.dumps(line) + "\n")
    assert "| best model | step 5, validation loss 5.2500 of 5 stories |" in card_text(complete_run)
    assert "at step 5;" in write_report(complete_run).read_text()


def test_card_is_current_until_weights_metrics_or_stories_change(complete_run):
    assert not is_card_current(complete_run)
    path = write_card(complete_run)
    path.write_text(path.read_text() + "\nA note of the author.\n")
    assert is_card_current(complete_run)
    for change in (
        lambda: update_json(complete_run / "evaluation.json", loss=1.5),
        lambda: (complete_run / "stories.jsonl").write_text(json.dumps(STORY | {"story": "A hen."}) + "\n"),
        lambda: save_file({"a": torch.ones(1)}, complete_run / "best" / "model.safetensors"),
    ):
        write_card(complete_run)
        assert is_card_current(complete_run)
        change()
        assert not is_card_current(complete_run)


def test_card_contains_how_many_scored_stories_were_trained_on(complete_run):
    update_json(complete_run / "evaluation.json", data="builtin", split="train", num_training_stories=7)
    source = "the built-in corpus of tinystories_slm"
    expected = f"On the train stories of {source}, 7 of which the model was trained on: 8 stories"
    assert expected in card_text(complete_run)
    update_json(complete_run / "evaluation.json", split="all", num_training_stories=0)
    assert f"On all stories of {source}: 8 stories" in card_text(complete_run)


def test_card_contains_at_most_three_stories(complete_run):
    lines = [json.dumps(STORY | {"seed": seed}) for seed in range(9)]
    (complete_run / "stories.jsonl").write_text("\n".join(lines))
    text = card_text(complete_run)
    assert "The first 3 of the run's `stories.jsonl`" in text
    assert [seed for seed in range(9) if f"seed {seed}:" in text] == [0, 1, 2]


def test_card_contains_the_corpus_entropy(complete_run):
    update_json(complete_run / "evaluation.json", entropy=0.1794, entropy_bits_per_byte=0.0672)
    assert "entropy of these stories is\n0.1794 nats per token (0.0672 bits" in card_text(complete_run)


@pytest.mark.parametrize(
    ("source", "license"), [("roneneldan/TinyStories", "CDLA-Sharing-1.0"), ("tester/other", None)]
)
def test_card_links_a_hub_dataset_with_commit_and_known_license(complete_run, source, license):
    update_json(complete_run / "manifest.json", source=source, revision="f54c09fd" * 5)
    text = card_text(complete_run)
    assert f"[`{source}`](https://huggingface.co/datasets/{source}), revision `{'f54c09fd' * 5}`" in text
    assert ModelCard(text).data.datasets == [source]
    assert ("license" in text) == (license is not None) and (license or "") in text


def test_card_names_set_configuration_and_mixture(complete_run):
    """Each is a source whose name alone does not identify the stories."""
    manifest, commit = complete_run / "manifest.json", "f54c09fd" * 5
    update_json(manifest, source="tinystories-v2", revision=commit)
    text = card_text(complete_run)
    link = "[`roneneldan/TinyStories`](https://huggingface.co/datasets/roneneldan/TinyStories)"
    assert f"`tinystories-v2`, from {link}, revision `{commit}`" in text
    assert ModelCard(text).data.datasets == ["roneneldan/TinyStories"] and "CDLA-Sharing-1.0" in text

    update_json(manifest, source="tester/other", subset="short")
    text = card_text(complete_run)
    assert "datasets/tester/other) (configuration `short`), revision" in text
    assert {result.dataset_config for result in ModelCard(text).data.eval_results} == {"short"}

    parts = [{"name": "tester/other", "weight": 3}, {"name": "/home/me/my tales.jsonl", "weight": 1}]
    update_json(manifest, source=json.dumps(parts), subset=None, revision=f"{commit} + sha256:{'0' * 64}")
    text = card_text(complete_run)
    assert "a mixture of `tester/other` (weight 3) and `my tales.jsonl` (weight 1), revision" in text
    assert ModelCard(text).data.datasets == ["tester/other"] and "/home/me" not in text


def test_card_names_a_base_model_of_the_hub(complete_run):
    for init_from, base_model in (("tester/first", "tester/first"), (str(complete_run / "best"), None)):
        update_config(complete_run, f"--model.init_from={init_from}")
        text = card_text(complete_run)
        assert ModelCard(text).data.base_model == base_model
        assert ("Training started from" in text) == (base_model is not None)


def test_card_reads_option_names_of_earlier_versions(complete_run):
    expected = card_text(complete_run)
    path = complete_run / "config.yaml"
    text = path.read_text()
    for current, earlier in (
        ("packing: contiguous", "windows: stream"),
        ("family: gpt2", "family: gpt"),
        ("muon_ns_steps:", "ns_steps:"),
    ):
        assert current in text
        text = text.replace(current, earlier)
    path.write_text(text)
    assert card_text(complete_run) == expected


SPECIAL_LINES = [
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


def test_special_characters_do_not_break_the_card(complete_run):
    markdown_it = pytest.importorskip("markdown_it")
    (complete_run / "stories.jsonl").write_text(
        json.dumps(STORY | {"story": "\n\n".join(SPECIAL_LINES), "prompt": "|`"})
    )
    update_json(complete_run / "manifest.json", source="/x/a `b` | {{c}}: - #.jsonl", revision="sha256:0")
    update_json(complete_run / "evaluation.json", protocol="a | b\n---\n`c` {{d}}")
    text = render_card(PublishedRun.load(complete_run), CardTarget())

    assert metadata_errors(text) == []
    assert ModelCard(text).data.eval_results[0].dataset_name == "a `b` | {{c}}: - #.jsonl"
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(text)
    paragraphs = [token for token in tokens if token.type == "inline" and token.level == 2]
    read = ["".join(child.content for child in token.children) for token in paragraphs]
    assert read[-len(SPECIAL_LINES) :] == [" ".join(line.split()) for line in SPECIAL_LINES]
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings[-4:] == ["Generated stories", "Limits and bias", "Hardware and time", "Origin"]


def test_card_omits_metrics_that_are_not_numbers(complete_run):
    (complete_run / "evaluation.json").write_text('{"loss": 1.5, "perplexity": null, "accuracy": NaN}')
    text = card_text(complete_run)
    assert "| loss, nats per token | 1.5000 |" in text
    assert [result.metric_type for result in ModelCard(text).data.eval_results] == ["loss"]
    evaluation = text.split("## Evaluation")[1].split("## Generated")[0]
    for name in ("perplexity", "accuracy", "bits", "bytes"):
        assert name not in evaluation, name


def test_examples_start_the_prompt_as_training_did(complete_run):
    assert card_text(complete_run).count('tokenizer("Once upon a time", return_tensors="pt")') == 1
    update_json(complete_run / "best" / "tokenizer.json", post_processor=None)  # a folder of commit 461afef
    earlier = 'tokenizer("<|endoftext|>Once upon a time", add_special_tokens=False, return_tensors="pt")'
    assert card_text(complete_run).count(earlier) == 1


def test_examples_of_a_model_of_blocks_have_a_block_as_prompt(complete_run):
    template = complete_run / "best" / "chat_template.jinja"
    template.write_text("{{ messages }}")
    assert 'tokenizer("Once upon a time", return_tensors="pt")' in card_text(complete_run)
    template.write_text(CHAT_TEMPLATE)
    prompt = r'"Features: Dialogue\nWords: ball, sad\nStory:"'
    assert f'tokenizer({prompt}, return_tensors="pt")' in card_text(complete_run)


def test_card_names_the_machines_of_earlier_sessions(complete_run):
    path = complete_run / "environment.json"
    newest = json.loads(path.read_text()) | {"first_step": 3}
    earlier = {"first_step": 1, "hardware": "NVIDIA H100"}
    path.write_text(json.dumps(newest | {"earlier_sessions": [earlier]}))
    text = (write_card(complete_run)).read_text()
    assert "from step 1: NVIDIA H100" in text and "from step 3: An Abacus" in text
