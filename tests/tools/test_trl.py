"""TRL's DPOTrainer; tests/export/test_ecosystem.py has SFT, tests/benchmarks/test_grpo.py GRPO."""

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinystories_slm.data.tokenizer import train_story_tokenizer
from tinystories_slm.export import ExportArgs, export
from tinystories_slm.grammar import diagnose, generate_corpus
from tinystories_slm.model_folder import save_model_folder

PROMPT = "Once upon a time"


@pytest.mark.parametrize("format", ["custom", "native"])
def test_dpo_prefers_stories_of_the_grammar(format, tmp_path):
    trl = pytest.importorskip("trl", reason="pip install 'tinystories_slm[finetune]'")
    stories = [story for story in generate_corpus(60, seed=1) if story.startswith(PROMPT)][:8]
    chosen = [story.removeprefix(PROMPT).split(".")[0] + "." for story in stories]
    rejected = [text.replace(" lived", " sat").replace(" there", " here") for text in chosen]
    assert all(diagnose(PROMPT + text).constraint != "ends before the story does" for text in rejected)
    tokenizer = train_story_tokenizer(stories, 400)
    model = tiny_model(
        vocab_size=400, pad_token_id=tokenizer.pad_token_id, family="llama", max_position_embeddings=128
    )
    save_model_folder(model, tokenizer, tmp_path / "best")
    folder = export(ExportArgs(model=str(tmp_path / "best"), format=format, output=tmp_path / format))
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"),
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"prompt": [PROMPT] * len(chosen), "chosen": chosen, "rejected": rejected})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = trl.DPOTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    margins = [line["rewards/margins"] for line in trainer.state.log_history if "rewards/margins" in line]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] > 0.1
    assert margins == sorted(margins)

    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    ids = tokenizer(PROMPT + chosen[0], return_tensors="pt").input_ids
    assert torch.equal(tuned(ids).logits, model.eval()(ids).logits)
