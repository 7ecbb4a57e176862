import pytest
import torch
from conftest import tiny_model

from tinystories_slm.generation import (
    GenerationResult,
    SamplingParams,
    TextStream,
    generate_batch,
    prepare_requests,
)


class ScriptedHead(torch.nn.Module):
    """An lm_head that predicts the tokens of a given text, one per call."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        super().__init__()
        self.ids, self.vocab_size, self.num_calls = ids, vocab_size, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*hidden.shape[:2], self.vocab_size)
        logits[:, -1, self.ids[min(self.num_calls, len(self.ids) - 1)]] = 100.0
        self.num_calls += 1
        return logits


def scripted_model(tokenizer, text: str, *, stops: bool = False, context: int = 500):
    """A model that completes any prompt with `text`, and with the stop token after it if `stops`."""
    model = tiny_model(vocab_size=len(tokenizer), family="llama", tie_word_embeddings=False)
    model.lm_head = ScriptedHead(tokenizer(text).input_ids + [0] * stops, len(tokenizer))
    model.config.max_position_embeddings = context
    return model


def scripted_generation(
    tokenizer, text: str, *, stops: bool = False, finish_sentence: bool = True
) -> tuple[list[str], GenerationResult]:
    """Pieces and result of "The fox" completed with `text`, where a stop token or the limit ends it."""
    sampling = SamplingParams(max_new_tokens=len(tokenizer(text).input_ids) + stops)
    model = scripted_model(tokenizer, text, stops=stops)
    [request] = prepare_requests(model, tokenizer, ["The fox"], [0], sampling)
    stream = TextStream(model, tokenizer, request, sampling, finish_sentence=finish_sentence)
    pieces = list(stream)
    model.lm_head.num_calls = 0
    [result] = generate_batch(
        model, tokenizer, [request], sampling, batch_size=1, finish_sentence=finish_sentence
    )
    assert stream.result == result and "".join(pieces) == result.text
    return pieces, result


def test_finish_sentence_cuts_after_the_last_complete_sentence(tokenizer):
    text = ' ran. "Hi!" said Mr. Owl. He was'
    pieces, result = scripted_generation(tokenizer, text)
    assert result.text == 'The fox ran. "Hi!" said Mr. Owl.' and result.finish_reason == "length"
    assert result.num_new_tokens == len(tokenizer(text).input_ids)
    assert pieces == ["The ", "fox", " ran.", ' "Hi!" said Mr. Owl.']  # whole sentences after the prompt


def test_finish_sentence_keeps_text_that_a_stop_token_ended(tokenizer):
    text = ' ran. "Hi!" said Mr. Owl. He was'
    assert scripted_generation(tokenizer, text, stops=True)[1].text == "The fox" + text
    assert scripted_generation(tokenizer, text, finish_sentence=False)[1].text == "The fox" + text


def test_finish_sentence_keeps_text_without_a_complete_sentence(tokenizer):
    assert scripted_generation(tokenizer, " was in the")[1].text == "The fox was in the"


def test_pieces_do_not_split_characters(tokenizer):
    text = " saw Zoë 🦊🦊 and\n 狐狸 é"
    pieces, result = scripted_generation(tokenizer, text, finish_sentence=False)
    assert result.text == "The fox" + text
    assert len(pieces) >= 5 and not any("\ufffd" in piece for piece in pieces)
    assert any(piece.endswith("狐") for piece in pieces)  # text without blanks is emitted per character


def test_closing_the_iterator_stops_the_model(tokenizer):
    model = scripted_model(tokenizer, " ran" * 30, context=20_000)
    sampling = SamplingParams(max_new_tokens=10_000)
    [request] = prepare_requests(model, tokenizer, ["The fox"], [0], sampling)
    pieces = iter(TextStream(model, tokenizer, request, sampling))
    assert next(pieces) == "The "
    pieces.close()
    assert model.lm_head.num_calls < 5000


def test_iterator_raises_the_errors_of_the_model(model_with_tokenizer, tokenizer, monkeypatch):
    [request] = prepare_requests(model_with_tokenizer, tokenizer, ["The fox"], [0], SamplingParams())

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model_with_tokenizer, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(TextStream(model_with_tokenizer, tokenizer, request, SamplingParams()))
