import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tinystories_slm.export.checks import MAX_DIFFERENCE_16_BIT
from tinystories_slm.export.native import native_model
from tinystories_slm.model import CACHE_NAME
from tinystories_slm.model.configuration_tinystories import TinyStoriesConfig
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM, linear_cross_entropy

T = 24


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 101, (3, T), generator=torch.Generator().manual_seed(1))


def test_logits_do_not_depend_on_future_tokens(model, input_ids):
    changed = input_ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 101
    before, after = model(input_ids).logits, model(changed).logits

    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-5)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(
        dim=(0, 2)
    ).min() > 1e-3  # every later position attends to it


def test_logits_depend_on_token_order(model, input_ids):
    swapped = input_ids.clone()
    swapped[:, [3, 4]] = input_ids[:, [4, 3]]

    assert (model(input_ids).logits[:, -1] - model(swapped).logits[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_and_uncached_logits_agree(model, input_ids, implementation, cache):
    model.set_attn_implementation(implementation)
    expected = model(input_ids, use_cache=False).logits
    past = StaticCache(config=model.config, max_cache_len=T) if cache == "static" else None
    logits = []
    for piece in input_ids.split([10, 1, 1, T - 12], dim=1):
        output = model(piece, **{CACHE_NAME: past}, use_cache=True)
        past = output[CACHE_NAME]
        logits.append(output.logits)

    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=2e-5)


def test_left_padding_changes_no_logits_or_greedy_text(model, input_ids):
    single = input_ids[:1, :8]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), single], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 8])

    expected = model(single).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], expected, rtol=0, atol=2e-5)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(single, attention_mask=torch.ones_like(single), **options)
    batched = model.generate(padded, attention_mask=mask, **options)
    assert batched[0, 13:].tolist() == alone[0, 8:].tolist()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "static, whole mask"])
def test_positions_follow_the_mask_in_cached_decoding(model, input_ids, implementation, cache):
    # As a caller without `generate()`: each step passes the mask of all tokens so far, no position_ids.
    model.set_attn_implementation(implementation)
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(5 + T) >= 5).long().expand(3, -1)
    past = None if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=5 + T)
    logits, num_seen = [], 0
    for piece in padded.split([20, 1, 1, T - 17], dim=1):
        num_seen += piece.shape[1]
        seen = mask if "whole" in cache else mask[:, :num_seen]
        output = model(piece, attention_mask=seen, **{CACHE_NAME: past}, use_cache=True)
        past = output[CACHE_NAME]
        logits.append(output.logits)

    expected = model(input_ids).logits
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 5:], expected, rtol=0, atol=2e-5)


def test_padding_inside_a_text_shifts_no_position(model, input_ids):
    padded = torch.cat([input_ids[:, :9], torch.zeros(3, 4, dtype=torch.long), input_ids[:, 9:]], dim=1)
    is_token = torch.tensor([True] * 9 + [False] * 4 + [True] * (T - 9))
    logits = model(padded, attention_mask=is_token.long().expand(3, -1)).logits

    torch.testing.assert_close(logits[:, is_token], model(input_ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_packed_sequences_attend_only_to_themselves(model, input_ids, implementation, kind):
    model.set_attn_implementation(implementation)
    text = torch.tensor([0] * 9 + [1] * (T - 9))
    mask = (text[:, None] == text).tril()[None, None].expand(3, -1, -1, -1)  # (B, 1, T, T), True: attend
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    position_ids = torch.cat([torch.arange(9), torch.arange(T - 9)]).expand(3, -1)
    logits = model(input_ids, attention_mask=mask, position_ids=position_ids).logits

    alone = [model(input_ids[:, :9]).logits, model(input_ids[:, 9:]).logits]
    torch.testing.assert_close(logits, torch.cat(alone, dim=1), rtol=0, atol=2e-5)


def test_loss_shifts_labels_and_ignores_minus_100(model, input_ids):
    labels = input_ids.clone()
    labels[:, :5] = -100
    logits = model(input_ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, 4:-1].reshape(-1, 101), input_ids[:, 5:].reshape(-1)
    )

    assert model(input_ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    total = model(input_ids, labels=labels, num_items_in_batch=100).loss.item()
    assert total == pytest.approx(expected.item() * 3 * (T - 5) / 100, rel=1e-5)


@pytest.mark.parametrize("num_items_in_batch", [None, 7])
def test_loss_only_matches_the_loss_of_the_logits(model, input_ids, num_items_in_batch, monkeypatch):
    # Three full chunks of rows and a partial one, as in training; some labels are ignored.
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n, split=torch.Tensor.split: split(x, min(n, 20)))
    labels = input_ids.masked_fill(input_ids % 7 == 0, -100)
    losses, gradients = [], []
    for loss_only in (False, True):
        output = model(input_ids, labels=labels, loss_only=loss_only, num_items_in_batch=num_items_in_batch)
        assert (output.logits is None) == loss_only
        model.zero_grad()
        (3 * output.loss).backward()
        losses.append(output.loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    size = torch.stack([gradient.norm() for gradient in gradients[0].values()]).norm()
    for name, expected in gradients[0].items():  # the gradient of a key bias is rounding only
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-7 * size, name


def test_loss_only_is_close_in_bfloat16_and_finite_for_impossible_tokens(input_ids):
    torch.manual_seed(0)
    hidden = torch.randn(2, 600, 16)
    weight, labels = torch.randn(101, 16, requires_grad=True), torch.randint(0, 101, (2, 600))
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    [expected_grad] = torch.autograd.grad(expected, weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    [grad] = torch.autograd.grad(loss, weight)

    assert loss.dtype == grad.dtype == torch.float32
    assert abs(loss - expected) < 2e-3 * expected
    assert (grad - expected_grad).norm() < 1e-2 * expected_grad.norm()
    far = linear_cross_entropy(torch.full((1, 1, 16), 1e3), torch.eye(2, 16) * 9, torch.tensor([[1]]))
    one_sided = linear_cross_entropy(torch.eye(1, 16)[None], torch.eye(2, 16) * 900, torch.tensor([[1]]))
    assert far.item() == pytest.approx(math.log(2)) and one_sided.item() == pytest.approx(87.3, abs=0.1)


def test_autocast_keeps_the_residual_stream_in_16_bits(model, input_ids):
    dtypes = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    expected = model(input_ids, labels=input_ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids, labels=input_ids).loss

    count = len(model.model.layers)
    assert dtypes == [torch.float32] * count + [torch.bfloat16] * count
    assert abs(loss - expected) < 2e-3 * expected


def test_logits_to_keep_and_inputs_embeds_match_the_full_logits(model, input_ids):
    full = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, full[:, -2:], rtol=0, atol=1e-5)
    some = torch.tensor([3, 17])
    torch.testing.assert_close(model(input_ids, logits_to_keep=some).logits, full[:, some], rtol=0, atol=1e-5)
    embeds = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, full, rtol=0, atol=1e-5)
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs)


def test_eager_matches_sdpa_and_returns_causal_attentions(model, input_ids):
    expected = model(input_ids).logits
    model.set_attn_implementation("eager")
    output = model(input_ids, output_attentions=True, output_hidden_states=True)

    torch.testing.assert_close(output.logits, expected, rtol=0, atol=2e-5)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    assert output.attentions[0].shape == (3, 4, T, T)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, T))
    assert output.attentions[0].triu(1).abs().max() == 0


def test_forward_passes_keyword_arguments_to_attention(model, input_ids):
    seen = []

    def attend(module, *args, extra=None, **kwargs):
        seen.append((module.layer_idx, extra, kwargs["position_ids"].shape))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("recording", attend)
    AttentionMaskInterface.register("recording", sdpa_mask)
    expected = model(input_ids).logits
    model.set_attn_implementation("recording")

    torch.testing.assert_close(model(input_ids, extra="fox").logits, expected, rtol=0, atol=0)
    assert seen == [(0, "fox", (1, T)), (1, "fox", (1, T))]


def test_flex_attention_matches_sdpa_with_left_padding(input_ids):
    model = tiny_model(
        family="llama", num_key_value_heads=2, hidden_size=64
    )  # flex attention requires head_dim >= 16
    mask = (torch.arange(T) >= torch.tensor([[0], [5], [9]])).long()
    expected = model(input_ids, attention_mask=mask).logits
    model.set_attn_implementation("flex_attention")
    # On a CPU torch has no backward for it. Without compilation it computes the same, a minute faster.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = model(input_ids, attention_mask=mask).logits

    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


def test_gradient_checkpointing_changes_no_gradient(model, input_ids):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("size", [90, 128])
def test_resize_token_embeddings_updates_head_and_config(model, input_ids, size, tmp_path):
    ids = input_ids.clamp(max=89)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    output = model(ids, labels=ids)

    assert output.logits.shape == (3, T, size) and output.loss.isfinite()
    torch.testing.assert_close(output.logits[..., :90], before[..., :90], rtol=0, atol=1e-5)
    assert (model.config.vocab_size, model.vocab_size, model.lm_head.out_features) == (size,) * 3
    _assert_tying(model)
    expected = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.generate(ids[:, :4], max_new_tokens=3, do_sample=False, eos_token_id=None), expected
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_model_computes_generates_saves_and_loads(model, input_ids, dtype, tmp_path):
    expected = model(input_ids).logits
    model = model.to(dtype)
    logits = model(input_ids).logits

    assert logits.dtype == dtype
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)
    _assert_tying(model)
    assert model.generate(input_ids[:, :4], max_new_tokens=3, eos_token_id=None).shape == (3, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # keeps the saved dtype
    assert torch.equal(loaded(input_ids).logits, logits)
    _assert_tying(loaded)


def test_parallel_plans_name_exactly_the_linear_layers(model):
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if "lm_head" not in LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, vocab_size=8)).tp_plan:
        layers.remove("lm_head")  # transformers 5.10 drops the head from every class's plan
    plan = {name: re.compile(re.escape(name).replace(r"\*", r"\d+")) for name in model.tp_plan}
    modules = dict(model.named_modules())
    for name, pattern in plan.items():
        assert any(pattern.fullmatch(module) for module in modules), name
    for layer in layers:
        assert any(pattern.fullmatch(layer) for pattern in plan.values()), layer
    assert all(name in modules for name in model.pp_plan)
    # Learned positions are added between two stages; a pipeline plan cannot express that.
    assert ("model.layers" in model.pp_plan) == (model.config.family == "llama")


def test_from_pretrained_initializes_every_tensor(model, tmp_path):
    assert not list(model.buffers())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_initialization_matches_gpt2():
    model = TinyStoriesForCausalLM(TinyStoriesConfig(n_layer=8, n_embd=256, n_head=8, bias=True))
    layer = model.model.layers[3]

    for weight in (layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, model.model.embed_tokens.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
    assert layer.mlp.up_proj.bias.abs().max() == 0
    first_loss = model(ids := torch.randint(0, 10_000, (2, 64)), labels=ids).loss.item()
    assert first_loss == pytest.approx(math.log(10_000), abs=0.15)


def test_save_and_load_keep_logits_and_tying(model, input_ids, tmp_path):
    tied = model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is TinyStoriesForCausalLM
    assert torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    _assert_tying(loaded)
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - tied


def test_training_overfits_one_batch():
    model = tiny_model(scale=1.0).train()
    ids = torch.randint(0, 101, (4, 16), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert loss.item() < 0.1


def test_dropout_acts_in_training_only(input_ids):
    model = tiny_model(dropout=0.5)
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.train()
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_learned_positions_reject_tokens_past_the_context(cache):
    model = tiny_model(family="gpt2")
    zeros = torch.zeros(1, 49, dtype=torch.long)
    with pytest.raises(ValueError, match=r"49 tokens do not fit the context of 48.*shorten the prompt"):
        model(zeros)
    with pytest.raises(ValueError, match=r"49 tokens do not fit the context of 48"):
        model(zeros[:, :1], position_ids=torch.tensor([[48]]))
    past = StaticCache(config=model.config, max_cache_len=60) if cache == "static" else None
    past = model(zeros[:, :48], **{CACHE_NAME: past}, use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match=r"49 tokens do not fit the context of 48"):
        model(zeros[:, :1], **{CACHE_NAME: past})


def test_forward_rejects_an_unknown_argument(model):
    prompt = torch.tensor([[1, 2, 3]])
    for network in (model, model.model):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'cach', 'past'"):
            network(prompt, cach=None, past=1)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with pytest.raises(TypeError, match="unexpected keyword argument 'cahce'"):
            model(prompt, cahce=DynamicCache())
        with pytest.raises(ValueError, match="cahce"):
            model.generate(prompt, max_new_tokens=1, cahce=DynamicCache())
        output = model(prompt, output_hidden_states=True, num_items_in_batch=3, is_causal=True)
        assert len(output.hidden_states) == 3


def test_external_attention_function_may_declare_arguments(model):
    seen = []

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, instances=None, **kwargs):
        seen.append(instances)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)

    AttentionInterface.register("declares", attend)
    model.set_attn_implementation("declares")
    model(torch.tensor([[1, 2, 3]]), instances="mine")
    assert seen == ["mine"] * model.config.num_hidden_layers
    with pytest.raises(TypeError, match="'others'"):
        model(torch.tensor([[1, 2, 3]]), others="mine")


def test_forward_accepts_both_names_of_the_cache(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids, use_cache=False).logits[:, -1]
    for name in {CACHE_NAME, "past_key_values"}:
        cache = DynamicCache(config=model.config)
        model(ids[:, :3], **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 3
        torch.testing.assert_close(model(ids[:, 3:], **{name: cache}).logits[:, 0], expected)
    names = {field.name for field in dataclasses.fields(type(model(ids, use_cache=True)))}
    assert CACHE_NAME in names and len(names & {"cache", "past_key_values"}) == 1
    if CACHE_NAME == "cache":
        with pytest.raises(ValueError, match="two names of one argument"):
            model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


def test_both_losses_use_shift_labels(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids, labels=ids).loss
    shifted = {"labels": ids, "shift_labels": torch.tensor([[6, 7, 8, -100]])}
    torch.testing.assert_close(model(ids, **shifted).loss, expected)
    torch.testing.assert_close(model(ids, **shifted, loss_only=True).loss, expected)


def test_model_validates_a_modified_config():
    config = tiny_model(family="llama").config
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"rope_type \('linear'\)"):
        TinyStoriesForCausalLM(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "overrides, name",
    [
        ({"family": "gpt2"}, "GPT2LMHeadModel"),
        ({"family": "gpt2", "bias": True}, "GPT2LMHeadModel"),
        ({"family": "llama"}, "LlamaForCausalLM"),
        ({"family": "llama", "num_key_value_heads": 2}, "LlamaForCausalLM"),
        ({"family": "llama", "bias": True}, "LlamaForCausalLM"),
        ({"family": "llama", "qk_norm": True}, "Qwen3ForCausalLM"),
    ],
    ids=str,
)
def test_family_matches_a_transformers_class_exactly(overrides, name, dtype, input_ids, tmp_path):
    ours = tiny_model(**overrides)
    native_model(ours).save_pretrained(tmp_path)
    # Load in this dtype: `.to(bfloat16)` would round the buffer of RoPE frequencies.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()

    assert type(theirs).__name__ == name and type(theirs).__module__.startswith("transformers.models.")
    logits = [network(input_ids).logits.float() for network in (ours.to(dtype), theirs)]
    if name == "GPT2LMHeadModel" and dtype == torch.bfloat16:
        # One product for queries, keys and values: equal to ours only on CPUs with bfloat16 instructions.
        assert (logits[0] - logits[1]).abs().max() < MAX_DIFFERENCE_16_BIT * logits[0].abs().max()
    else:
        assert torch.equal(*logits)


def test_model_files_import_nothing_of_the_package():
    code = (
        "import sys, importlib.util as u\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert not name.startswith('tinystories_slm'), name\n"
        "sys.meta_path.insert(0, Block())\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import model\n"
        "print(model.TinyStoriesForCausalLM.__name__)"
    )
    from tinystories_slm import model as package

    folder = str(package.__path__[0]).removesuffix("/model")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.strip() == "TinyStoriesForCausalLM", done.stderr


def _assert_tying(model: TinyStoriesForCausalLM) -> None:
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings
