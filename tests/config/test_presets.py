"""Every file in configs/ loads, builds the architecture its table row states, and says so truly."""

from pathlib import Path

import pytest
from conftest import ROOT

from tinystories_slm.config import load_config
from tinystories_slm.model.modeling_tinystories import TinyStoriesForCausalLM

# layers, hidden, heads, feed-forward, context, vocabulary, parameters: total and without embeddings
PRESETS = {
    "debug": (2, 32, 4, 128, 64, 512, 43_168, 24_736),
    "course": (2, 128, 4, 352, 256, 2_048, 664_320, 402_176),
    "quickstart": (3, 128, 2, 352, 256, 2_048, 865_536, 603_392),
    "minute": (2, 128, 2, 352, 256, 4_096, 926_592, 402_304),
    "instruct": (3, 128, 2, 352, 384, 2_048, 865_536, 603_392),
    "ten_minutes": (3, 192, 3, 512, 256, 4_096, 2_115_264, 1_328_832),
    "9m": (8, 256, 8, 1024, 256, 10_000, 8_921_344, 6_295_808),
    "modern_9m": (8, 256, 8, 704, 256, 10_000, 8_987_392, 6_427_392),
    "30m_ctx128": (6, 384, 6, 1536, 128, 50_257, 29_995_392, 10_647_552),
    "30m_ctx512": (6, 384, 6, 1536, 512, 50_257, 30_117_120, 10_621_824),
    "modern_30m": (6, 384, 6, 1024, 256, 50_257, 29_921_280, 10_622_592),
    "51m": (8, 512, 8, 2048, 256, 50_257, 51_037_184, 25_174_528),
    "modern_51m": (8, 512, 8, 1376, 256, 50_257, 51_038_208, 25_306_624),
}


PRESETS_PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")


def test_the_table_covers_every_preset():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_what_its_row_says(name):
    layers, hidden, heads, feed_forward, context, vocabulary, total, without_embeddings = PRESETS[name]
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert vocabulary == (50_257 if config.tokenizer.pretrained == "gpt2" else config.tokenizer.vocab_size)
    model = TinyStoriesForCausalLM(config.model_config(vocab_size=vocabulary))

    shape = model.config
    assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (layers, hidden, heads)
    assert (shape.intermediate_size, shape.max_position_embeddings) == (feed_forward, context)
    assert model.num_parameters() == total
    embeddings = vocabulary * hidden + (context * hidden if shape.family == "gpt2" else 0)
    assert total - embeddings == without_embeddings
    row = next(line for line in PRESETS_PAGE.splitlines() if line.startswith(f"| `{name}.yaml`"))
    assert row.endswith(f"| {total:,} | {without_embeddings:,} |")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_folders_of_its_own_and_anneals_downward(name):
    configs = [load_config(path) for path in (ROOT / "configs").glob("*.yaml")]
    config = load_config(ROOT / "configs" / f"{name}.yaml")

    assert sum(other.output_dir == config.output_dir for other in configs) == 1
    assert sum(other.data.data_dir == config.data.data_dir for other in configs) == 1
    assert config.train.lr * config.train.min_lr_rate < config.train.lr
    assert not Path(config.output_dir).is_absolute()


@pytest.mark.parametrize(("name", "gpt2"), [("9m", "9m"), ("30m", "30m_ctx128"), ("51m", "51m")])
def test_a_llama_preset_has_the_size_of_its_gpt2_preset(name, gpt2):
    assert PRESETS[f"modern_{name}"][-2] == pytest.approx(PRESETS[gpt2][-2], rel=0.01)
    recipes = []
    for size in ("9m", name):
        config = load_config(ROOT / "configs" / f"modern_{size}.yaml")
        recipes.append((config.train.optimizer, config.train.lr, config.train.lr_scaling))
    assert recipes[0] == recipes[1]  # one setting serves all sizes


def test_the_published_settings_of_the_long_preset_are_kept():
    config = load_config(ROOT / "configs" / "30m_ctx512.yaml")

    assert config.train.batch_size == 1024
    assert config.train.max_grad_norm == 0.5
    assert config.train.warmup_steps == 1000
    assert (config.data.validation_split, config.data.validation_fraction) == ("holdout", 0.05)
    assert config.model.dropout == 0.1
