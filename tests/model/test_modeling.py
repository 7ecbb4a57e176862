import math
import subprocess
import sys

import pytest
import torch
from conftest import tiny_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from tinystories_slm import TinyStoriesConfig, TinyStoriesForCausalLM

T = 24


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(0, 101, (3, T), generator=torch.Generator().manual_seed(1))


def test_a_changed_future_token_leaves_past_logits_unchanged(model, input_ids):
    changed = input_ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 101
    before, after = model(input_ids).logits, model(changed).logits

    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-5)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=(0, 2)).min() > 1e-3  # every later one sees it


def test_the_order_of_tokens_matters(model, input_ids):
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
        output = model(piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits.append(output.logits)

    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=2e-5)


def test_left_padding_changes_neither_logits_nor_greedy_text(model, input_ids):
    single = input_ids[:1, :8]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), single], dim=1)
    mask = torch.tensor([[0] * 5 + [1] * 8])

    expected = model(single).logits
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 5:], expected, rtol=0, atol=2e-5)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    alone = model.generate(single, attention_mask=torch.ones_like(single), **settings)
    batched = model.generate(padded, attention_mask=mask, **settings)
    assert batched[0, 13:].tolist() == alone[0, 8:].tolist()


def test_positions_follow_the_mask_in_cached_decoding(model, input_ids):
    # As a caller without `generate()` does: the whole mask each time, no position_ids.
    padded = torch.cat([torch.zeros(3, 5, dtype=torch.long), input_ids], dim=1)
    mask = (torch.arange(5 + T) >= 5).long().expand(3, -1)
    past = model(padded[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
    rest = model(padded[:, 20:], attention_mask=mask, past_key_values=past).logits

    torch.testing.assert_close(rest, model(input_ids).logits[:, 15:], rtol=0, atol=2e-5)


def test_the_loss_shifts_labels_once_and_ignores_minus_100(model, input_ids):
    labels = input_ids.clone()
    labels[:, :5] = -100
    logits = model(input_ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, 4:-1].reshape(-1, 101), input_ids[:, 5:].reshape(-1)
    )

    assert model(input_ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    total = model(input_ids, labels=labels, num_items_in_batch=100).loss.item()
    assert total == pytest.approx(expected.item() * 3 * (T - 5) / 100, rel=1e-5)


def test_logits_to_keep_and_inputs_embeds(model, input_ids):
    full = model(input_ids).logits
    torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, full[:, -2:], rtol=0, atol=1e-5)
    embeds = model.get_input_embeddings()(input_ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, full, rtol=0, atol=1e-5)


def test_eager_and_sdpa_agree_and_attentions_are_causal_distributions(model, input_ids):
    expected = model(input_ids).logits
    model.set_attn_implementation("eager")
    output = model(input_ids, output_attentions=True, output_hidden_states=True)

    torch.testing.assert_close(output.logits, expected, rtol=0, atol=2e-5)
    assert len(output.attentions) == 2 and len(output.hidden_states) == 3
    assert output.attentions[0].shape == (3, 4, T, T)
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 4, T))
    assert output.attentions[0].triu(1).abs().max() == 0


def test_initialisation_is_gpt2s():
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
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(again) is TinyStoriesForCausalLM
    assert torch.equal(model(input_ids).logits, again(input_ids).logits)
    tied = again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert tied == model.config.tie_word_embeddings


def test_one_batch_can_be_learned_by_heart():
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


def test_past_the_context_learned_positions_say_so():
    model = tiny_model(family="gpt")
    with pytest.raises(ValueError, match=r"49 tokens do not fit the context of 48.*shorten the prompt"):
        model(torch.zeros(1, 49, dtype=torch.long))
    with pytest.raises(ValueError, match=r"context of 48.*max_new_tokens"):
        model.generate(torch.ones(1, 40, dtype=torch.long), max_new_tokens=20, eos_token_id=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"num_key_value_heads": 2}, {"bias": True}, {"qk_norm": True}], ids=str
)
def test_the_modern_family_is_llama_or_qwen3_to_the_bit(settings, dtype, input_ids, tmp_path):
    ours = tiny_model(family="modern", **settings)
    c = ours.config
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": c.rope_parameters,
        "attention_bias": c.bias,
        "tie_word_embeddings": True,
    }
    if c.qk_norm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**shared))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**shared, mlp_bias=c.bias))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.save_pretrained(tmp_path)  # and load: `.to(bfloat16)` would round their table of frequencies
    theirs = type(theirs).from_pretrained(tmp_path, dtype=dtype).eval()
    ours = ours.to(dtype)

    assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gpt_family_is_gpt2_to_the_bit(bias, input_ids):
    ours = tiny_model(family="gpt", bias=bias)
    c = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.max_position_embeddings,
            n_embd=c.hidden_size,
            n_layer=c.num_hidden_layers,
            n_head=c.num_attention_heads,
            activation_function=c.hidden_act,
            layer_norm_epsilon=c.norm_eps,
        )
    ).eval()
    gpt2 = theirs.transformer
    with torch.no_grad():
        gpt2.wte.weight.copy_(ours.model.embed_tokens.weight)
        gpt2.wpe.weight.copy_(ours.model.embed_positions.weight)
        _copy(ours.model.norm, gpt2.ln_f)
        for layer, block in zip(ours.model.layers, gpt2.h, strict=True):
            _copy(layer.input_layernorm, block.ln_1)
            _copy(layer.post_attention_layernorm, block.ln_2)
            attention = layer.self_attn
            _copy_linear([attention.q_proj, attention.k_proj, attention.v_proj], block.attn.c_attn)
            _copy_linear([attention.o_proj], block.attn.c_proj)
            _copy_linear([layer.mlp.up_proj], block.mlp.c_fc)
            _copy_linear([layer.mlp.down_proj], block.mlp.c_proj)

    assert torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


def test_the_model_files_import_nothing_of_ours():
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


def _copy(norm: torch.nn.LayerNorm, gpt2_norm: torch.nn.LayerNorm) -> None:
    gpt2_norm.weight.copy_(norm.weight)
    gpt2_norm.bias.zero_() if norm.bias is None else gpt2_norm.bias.copy_(norm.bias)


def _copy_linear(linears: list[torch.nn.Linear], conv: torch.nn.Module) -> None:
    conv.weight.copy_(torch.cat([linear.weight for linear in linears]).t())  # GPT-2 stores [in, out]
    biases = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    conv.bias.copy_(torch.cat(biases))
