"""lm-evaluation-harness: each line of docs/tools.md."""

import json

import pytest
import torch
from conftest import ROOT
from tool_folders import (
    INSTALL,
    TEXT,
    every_family,
    every_format,
    loading_options,
    text_ids,
)
from transformers import AutoTokenizer

from tinystories_slm.evaluation.evaluate import score_texts
from tinystories_slm.evaluation.likelihood import score_stories


@every_family
@every_format
@torch.no_grad()
def test_lm_eval_scores_the_text_without_its_end(family, format, published, model_of):
    pytest.importorskip("lm_eval", reason=INSTALL)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = published(family, format)
    options = {"pretrained": str(folder), "device": "cpu", "batch_size": 1, **loading_options(format)}
    if format == "gguf":
        options["tokenizer"] = str(folder)  # transformers reads no end token from the file
    kwargs = {"doc": {}, "idx": 0}
    whole = Instance(request_type="loglikelihood", arguments=("", TEXT), **kwargs)
    [(log_likelihood, _)] = HFLM(**options).loglikelihood([whole], disable_tqdm=True)

    ids = text_ids(folder)
    scores = score_stories(model_of(family), ids[:, 1:].tolist(), eos_token_id=0, batch_size=1)
    end = -model_of(family)(ids).logits[0, -1].log_softmax(-1)[0].item()
    assert end > 1 and scores.num_tokens[0] == ids.shape[1]  # without the start, with the end
    assert -log_likelihood == pytest.approx(scores.nats[0] - end, abs=1e-3)

    rolling = Instance(request_type="loglikelihood_rolling", arguments=(TEXT,), **kwargs)
    [log_likelihood] = HFLM(**options, add_bos_token=False).loglikelihood_rolling(
        [rolling], disable_tqdm=True
    )
    assert -log_likelihood == pytest.approx(scores.nats[0] - end, abs=1e-3)


@pytest.mark.parametrize("format", ["custom", "native"])
def test_lm_eval_task_has_our_bits_per_byte_of_the_text(format, published, model_of, tmp_path):
    lm_eval = pytest.importorskip("lm_eval", reason=INSTALL)
    from lm_eval.tasks import TaskManager

    texts = [TEXT, "Everyone was happy.", "Zoë saw 🦊.", "She ran."]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "include": str(ROOT / "configs" / "lm_eval" / "tinystories.yaml"),
        "task": "my_stories",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "stories.jsonl")}},
    }
    (tmp_path / "my_stories.yaml").write_text(json.dumps(task))
    folder = published("llama", format)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "add_bos_token": False, **loading_options(format)},
        tasks=["my_stories"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    expected = score_texts(model_of("llama"), tokenizer, texts, batch_size=2)
    found = results["results"]["my_stories"]["bits_per_byte,none"]
    assert found == pytest.approx(expected["text_bits_per_byte"], rel=1e-5)
    assert found != pytest.approx(expected["bits_per_byte"], rel=1e-2)  # with the end tokens
