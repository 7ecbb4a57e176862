"""Chat template of blocks: the text of training, masks of the assistant, and pipelines that take messages."""

import pytest
from conftest import tiny_model
from jinja2 import TemplateError
from transformers import AutoTokenizer, pipeline

from tinystories_slm.config import DataArgs, TokenizerArgs
from tinystories_slm.data.chat_template import has_block_template, set_chat_template
from tinystories_slm.data.instruct import InstructBlock, format_block, prompt_text
from tinystories_slm.data.sources.builtin import generate_block
from tinystories_slm.data.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    train_story_tokenizer,
    train_tokenizer,
)
from tinystories_slm.generation.request import prompt_token_ids
from tinystories_slm.model_folder import load_model_folder, save_model_folder

BLOCK = InstructBlock(
    words=("ball", "sad"), features=("Dialogue",), summary="Tom ran.", story="Tom ran.\n\nHe sat."
)
PROMPT = prompt_text(BLOCK).removesuffix("\nStory:")
EOS = "<|endoftext|>"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizer of blocks, saved as a run saves it."""
    blocks = [format_block(generate_block(0, index)) for index in range(50)]
    tokenizer = train_story_tokenizer(blocks, 400)
    set_chat_template(tokenizer, blocks)
    save_tokenizer(tokenizer, tmp_path_factory.mktemp("tokenizer"))
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0, max_position_embeddings=128)
    return save_model_folder(model, tokenizer, tmp_path_factory.mktemp("run") / "best")


@pytest.fixture(scope="module")
def tokenizer(folder):
    """As any program loads it, without this package."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (PROMPT, PROMPT + "\n"),
        (prompt_text(BLOCK), PROMPT + "\n"),
        (f"  {PROMPT}\n".replace("\n", "\r\n"), PROMPT + "\n"),
        ("A story about\na sad ball", "Summary: A story about a sad ball\n"),
        ("Note: a sad ball", "Summary: Note: a sad ball\n"),
        ("Random sentence: The wind was cold.", "Random sentence: The wind was cold.\n"),
        ("Story:", ""),
        ("", ""),
    ],
)
def test_messages_become_the_text_of_training(tokenizer, content, prompt):
    render = tokenizer.apply_chat_template
    messages = [user(content), assistant("\nTom ran.\n\nHe sat.\n")]
    text = f"{EOS}{prompt}Story:\n\nTom ran.\n\nHe sat.{EOS}"
    assert render(messages, tokenize=False) == text
    # As TRL requires, the prompt is the start of prompt and answer; so are its ids, whatever follows.
    start = render(messages[:1], tokenize=False, add_generation_prompt=True)
    assert start == f"{EOS}{prompt}Story:" and render(messages[:1], tokenize=False) == f"{EOS}{prompt}"
    ids, start_ids = (
        render(value, add_generation_prompt=len(value) == 1)["input_ids"]
        for value in (messages, messages[:1])
    )
    assert ids[: len(start_ids)] == start_ids
    assert ids == tokenizer(text.removeprefix(EOS)).input_ids


def test_template_writes_blocks_of_training(tokenizer):
    """In a chat of several turns, one end token separates the blocks, as in training."""
    blocks = [generate_block(1, index) for index in range(3)]
    messages = [message for block in blocks for message in (user(prompt_text(block)), assistant(block.story))]
    text = EOS + "".join(format_block(block) + EOS for block in blocks)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text


def test_assistant_mask_covers_what_the_model_generates(tokenizer):
    """The mask starts behind `Story:`, as labels of the loss on stories, and includes the end token."""
    messages = [user(PROMPT), assistant("Tom ran."), user("Words: hat"), assistant("A hat.")]
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pieces, previous = [], 0
    for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if mask:
            pieces.append(("" if previous else "|") + tokenizer.decode([token]))
        previous = mask
    assert "".join(pieces) == f"|\n\nTom ran.{EOS}|\n\nA hat.{EOS}"


@pytest.mark.parametrize(
    "messages",
    [
        [assistant("A hat.")],
        [user("Words: hat"), user("Words: cat")],
        [{"role": "system", "content": "Be kind."}, user("Words: hat")],
    ],
)
def test_other_roles_are_an_error(tokenizer, messages):
    with pytest.raises(TemplateError, match="messages must alternate between user and assistant"):
        tokenizer.apply_chat_template(messages, tokenize=False)


def test_pipeline_takes_messages(folder):
    model, tokenizer = load_model_folder(str(folder), device="cpu")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [result] = generate([user(PROMPT)], max_new_tokens=8, do_sample=False)
    *prompt, answer = result["generated_text"]
    assert prompt == [user(PROMPT)] and answer["role"] == "assistant"
    # The same tokens as those of scripts/generate.py.
    ids = prompt_token_ids(model, tokenizer, prompt_text(BLOCK))
    rendered = tokenizer.apply_chat_template([user(PROMPT)], add_generation_prompt=True)
    assert rendered["input_ids"] == ids
    [same] = generate(prompt_text(BLOCK), max_new_tokens=8, do_sample=False)
    assert same["generated_text"] == prompt_text(BLOCK) + answer["content"]


def test_tokenizer_of_blocks_has_the_template_and_others_do_not(tmp_path):
    tokenizer_args = TokenizerArgs(vocab_size=300)
    folders = {}
    for source in ("builtin", "builtin-instruct"):
        data = DataArgs(source=source, data_dir=tmp_path / source, max_stories=60)
        folders[source] = train_tokenizer(data, tokenizer_args)
        assert has_block_template(load_tokenizer(folders[source])) == (source == "builtin-instruct")
    # A tokenizer of blocks that is used for other stories loses it; a foreign template stays.
    tokenizer = load_tokenizer(folders["builtin-instruct"])
    set_chat_template(tokenizer, ["Once upon a time.", "One day."])
    assert tokenizer.chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    set_chat_template(tokenizer, ["Once upon a time."])
    assert tokenizer.chat_template == "{{ messages }}" and not has_block_template(tokenizer)
