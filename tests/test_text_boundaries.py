"""Start and end of texts: the same in prompts, scores, exports and other tools, and never doubled."""

import json
import logging
import math

import pytest
import torch
from conftest import SHARED, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tinystories_slm.config.command_args.publish import ExportArgs
from tinystories_slm.data.tokenizer import (
    count_lost_bytes,
    encode_stories,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
    train_story_tokenizer,
)
from tinystories_slm.evaluation.evaluate import format_scores, score_texts
from tinystories_slm.export import export
from tinystories_slm.generation import SamplingParams, generate_texts, prepare_requests
from tinystories_slm.model_folder import load_model_folder, save_model_folder
from tinystories_slm.text_boundaries import TextBoundaries, text_boundaries

STORIES = ["Once upon a time there was a fox. The fox was happy."] * 3
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 48}
VOCAB_SIZE = 281


@pytest.fixture
def story_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as `train_tokenizer` makes it: the end token 0, padding 280."""
    return train_story_tokenizer(STORIES, VOCAB_SIZE)


def bos_eos_tokenizer() -> PreTrainedTokenizerFast:
    """Like that of llama2.c's models: texts start with `<s>` (1) and end with `</s>` (2)."""
    bpe = json.loads(train_bpe(STORIES, 280).to_str())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {token: id_ + 2 for token, id_ in bpe["model"]["vocab"].items() if id_ > 0}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in bpe["model"]["merges"]]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def scaled_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab_size, intermediate_size=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model


def nats_of(model, tokens: list[int]) -> float:
    log_probs = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], dim=-1)
    return -log_probs[range(len(tokens) - 1), tokens[1:]].sum().item()


def test_llama_with_start_and_end_tokens_is_scored_between_them():
    model, tokenizer = scaled_llama(282), bos_eos_tokenizer()
    text = "The fox was happy."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    scores = score_texts(model, tokenizer, [text], batch_size=1)

    assert scores["loss"] * scores["num_tokens"] == pytest.approx(nats_of(model, [1, *ids, 2]), rel=1e-5)
    assert abs(nats_of(model, [1, *ids, 2]) - nats_of(model, [2, *ids, 2])) > 0.1  # the start matters
    assert text_boundaries(model, tokenizer) == TextBoundaries([1], [1], 2, [2])
    [request] = prepare_requests(model, tokenizer, [text], [0], SamplingParams())
    assert request.token_ids == [1, *ids] == tokenizer(text).input_ids
    [request] = prepare_requests(model, tokenizer, ["<s>" + text], [0], SamplingParams())
    assert request.token_ids == [1, *ids]


@pytest.mark.skipif(not (SHARED / "cases" / "bos_tokenizer").exists(), reason="needs shared/cases")
def test_tokenizer_of_the_case_starts_with_s():
    tokenizer = load_tokenizer(SHARED / "cases" / "bos_tokenizer")
    assert text_boundaries(scaled_llama(300), tokenizer) == TextBoundaries([1], [1], 2, [2])


def test_generation_config_names_the_end_that_the_tokenizer_does_not():
    model, tokenizer = scaled_llama(282), bos_eos_tokenizer()
    tokenizer.eos_token = "<unk>"
    assert text_boundaries(model, tokenizer).end_id == 2  # LlamaConfig: eos_token_id 2
    model.generation_config.eos_token_id = [0, 2]
    assert text_boundaries(model, tokenizer).end_id == 0
    model.generation_config.eos_token_id = 77  # no special token
    assert text_boundaries(model, tokenizer) == TextBoundaries([1], [1], 0, [0, 77])


def test_tokenizer_that_loses_text_has_no_bits_per_byte(story_tokenizer):
    vocab = {"[UNK]": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="[UNK]")
    texts = ["ab", "aébé", "zzzz"]
    assert count_lost_bytes(tokenizer, texts, encode_stories(tokenizer, texts)) == [0, 4, 4]

    model = tiny_model(vocab_size=300, family="llama")
    scores = score_texts(model, tokenizer, texts, batch_size=2)
    assert "bits_per_byte" not in scores and scores["loss"] > 0
    assert (scores["lost_bytes"], scores["num_bytes"], scores["num_lossy_stories"]) == (8, 12, 2)
    assert "undefined: the tokenizer loses 66.7% of the bytes, in 2 of 3 stories" in format_scores(scores)
    lossless = score_texts(model, story_tokenizer, [*texts, " <|endoftext|>\n"], batch_size=2)
    assert lossless["bits_per_byte"] > 0 and "lost_bytes" not in lossless


def test_tokenizer_that_only_adds_a_blank_loses_nothing():
    backend = train_bpe(STORIES, 280)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert count_lost_bytes(tokenizer, ["fox"], encode_stories(tokenizer, ["fox"])) == [0]


@pytest.fixture
def story_model():
    """A model whose most probable token is the padding, wherever it is not excluded."""
    model = tiny_model(vocab_size=VOCAB_SIZE, family="llama", pad_token_id=280, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.0)
        for layer in model.model.layers:  # the last hidden state is then that of the embedding
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[280] = 0.0
        model.lm_head.weight[280, 0] = 50.0
    return model


@pytest.mark.parametrize("format", ["custom", "native", "gguf"])
def test_padding_is_never_generated(format, story_model, story_tokenizer, tmp_path):
    ids = story_tokenizer("The fox", return_tensors="pt")
    assert story_model(ids.input_ids).logits[0, -1].argmax() == 280
    for options in ({"temperature": 0.0}, {"seed": 0}, {"temperature": 0.0, "backend": "hf"}):
        [text] = generate_texts(story_model, story_tokenizer, ["The fox"], max_new_tokens=20, **options)
        assert text.startswith("The fox") and "<|pad|>" not in text

    save_model_folder(story_model, story_tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format=format, output=tmp_path / "out"))
    assert json.loads((folder / "generation_config.json").read_text())["suppress_tokens"] == [280]
    if format != "gguf":
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 280
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert 280 not in model.generate(**ids, max_new_tokens=20)[0]


def test_every_form_starts_as_training_did_and_once(story_tokenizer, tmp_path):
    model = tiny_model(vocab_size=VOCAB_SIZE, family="llama", pad_token_id=280)
    plain = story_tokenizer("The fox", add_special_tokens=False).input_ids
    best = save_model_folder(model, story_tokenizer, tmp_path / "best")
    native = export(ExportArgs(model=str(best), format="native", output=tmp_path / "native"))
    gguf = export(ExportArgs(model=str(best), format="gguf", output=tmp_path / "gguf"))
    for folder in (best, native, gguf):
        assert AutoTokenizer.from_pretrained(folder)("The fox").input_ids == [0, *plain]
    [expected] = generate_texts(model, story_tokenizer, ["The fox"], temperature=0.0, max_new_tokens=9)
    for folder in (best, native):
        for prompt in ("The fox", "<|endoftext|>The fox"):
            loaded = load_model_folder(str(folder), device="cpu")
            [request] = prepare_requests(*loaded, [prompt], [0], SamplingParams())
            assert request.token_ids == [0, *plain]
        [generated] = pipeline("text-generation", model=str(folder))(
            "The fox", max_new_tokens=9, do_sample=False
        )
        assert generated["generated_text"] == expected
    assert encode_stories(story_tokenizer, ["The fox"]) == [plain]  # as in train.bin


def test_native_form_starts_with_the_end_token_although_the_tokenizer_has_another(tmp_path):
    tokenizer = bos_eos_tokenizer()  # as in a folder of commit 461afef
    model = tiny_model(vocab_size=282, family="llama", eos_token_id=2, bos_token_id=2)
    best = save_model_folder(model, tokenizer, tmp_path / "best")
    native = export(ExportArgs(model=str(best), format="native", output=tmp_path / "native"))
    for folder in (best, native):
        [request] = prepare_requests(
            *load_model_folder(str(folder), device="cpu"), ["The fox"], [0], SamplingParams()
        )
        assert request.token_ids == [2, *tokenizer("The fox", add_special_tokens=False).input_ids]
    assert AutoTokenizer.from_pretrained(native)("The fox").input_ids == request.token_ids


def test_folder_of_an_earlier_commit_is_not_doubled_or_changed(tmp_path):
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_bpe(STORIES, 280), **special)
    best = save_model_folder(tiny_model(vocab_size=280), tokenizer, tmp_path / "best")
    model, loaded = load_model_folder(str(best), device="cpu")
    plain = tokenizer("The fox").input_ids

    assert loaded("The fox").input_ids == plain and loaded("<|endoftext|>The fox").input_ids == [0, *plain]
    for prompt in ("The fox", "<|endoftext|>The fox"):
        [request] = prepare_requests(model, loaded, [prompt], [0], SamplingParams())
        assert request.token_ids == [0, *plain]
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.generation_config.suppress_tokens is None


def test_native_gpt2_does_not_warn_and_has_an_unknown_token(story_tokenizer, tmp_path, caplog):
    best = save_model_folder(
        tiny_model(vocab_size=VOCAB_SIZE, pad_token_id=280), story_tokenizer, tmp_path / "b"
    )
    folder = export(ExportArgs(model=str(best), format="native", output=tmp_path / "native"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|endoftext|>",) * 3
    assert "max_length" not in json.loads((folder / "generation_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            model.generate(**tokenizer("The fox", return_tensors="pt"), max_new_tokens=5)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not caplog.records, caplog.text


def fine_tuned_end_probability(tokenizer, collator, rows) -> float:
    """Return the probability of the end token after a story, after fine-tuning in the usual way."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=0
        )
    )
    arguments = TrainingArguments(
        output_dir="unused", max_steps=60, per_device_train_batch_size=2, learning_rate=1e-2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    ids = torch.tensor([tokenizer(STORIES[0]).input_ids])
    return model.eval()(ids).logits[0, -1].softmax(dim=-1)[tokenizer.eos_token_id].item()


def test_fine_tuning_with_the_collator_of_transformers_keeps_the_end(story_tokenizer):
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    earlier = PreTrainedTokenizerFast(tokenizer_object=train_bpe(STORIES, 280), **special)

    def rows(tokenizer, **columns):
        ids = [tokenizer(text + tokenizer.eos_token).input_ids for text in (STORIES[0], STORIES[0][:34])]
        return [{"input_ids": row} | {name: row for name in columns} for row in ids] * 2

    own = DataCollatorForLanguageModeling(story_tokenizer, mlm=False)
    labels = own(rows(story_tokenizer))["labels"]
    assert labels[0, -1] == 0 and (labels == -100).sum() > 0
    assert fine_tuned_end_probability(story_tokenizer, own, rows(story_tokenizer)) > 0.5
    masked = DataCollatorForLanguageModeling(earlier, mlm=False)
    assert fine_tuned_end_probability(earlier, masked, rows(earlier)) < 0.05
    kept = DataCollatorForSeq2Seq(earlier)  # docs/exports.md
    assert fine_tuned_end_probability(earlier, kept, rows(earlier, labels=True)) > 0.5


def test_small_vocabulary_has_no_room_for_padding():
    tokenizer = train_story_tokenizer(STORIES, 257)
    assert (len(tokenizer), tokenizer.pad_token_id) == (257, 0)
    assert len(train_story_tokenizer(STORIES, 258)) == 258 and math.isfinite(len(tokenizer))


def test_tokenizer_keeps_its_start_token_after_another_save(story_tokenizer, tmp_path):
    save_tokenizer(story_tokenizer, tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    ids = AutoTokenizer.from_pretrained(tmp_path / "b")("The fox", "Lily").input_ids
    plain = [again(text, add_special_tokens=False).input_ids for text in ("The fox", "Lily")]
    assert ids == [0, *plain[0], 0, *plain[1]]
