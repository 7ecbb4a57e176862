"""docs/extending.md: its examples run as they stand, and the parts that they add take effect."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from tinystories_slm.commands.source_folders import use_own_folders
from tinystories_slm.config import parse_config
from tinystories_slm.data.packing import PACKINGS, packing_class
from tinystories_slm.data.raw_stories import check_data_dir
from tinystories_slm.data.sources.registry import SOURCES
from tinystories_slm.data.token_files import Manifest
from tinystories_slm.doctor.resources import check_data
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.tasks import EVAL_TASKS, parse_task_names
from tinystories_slm.export.exporters import EXPORT_FORMATS
from tinystories_slm.hub.card import write_card
from tinystories_slm.io.atomic import file_sha256
from tinystories_slm.training.checkpoints import read_progress
from tinystories_slm.training.optimizers import OPTIMIZERS, optimizer_spec
from tinystories_slm.training.retention import KEEP_RULES, KeptSteps

REGISTRIES = [SOURCES, OPTIMIZERS, PACKINGS, EVAL_TASKS, KEEP_RULES, EXPORT_FORMATS]


@pytest.fixture
def restored_registries():
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch, restored_registries):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7 and all(block.count("\n") <= 40 for block in blocks)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), names)

    run_dir = tmp_path / "runs/extended"
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert str(kept) in text and len(kept) == 2
    models = sorted(int(path.name.removeprefix("step_")) for path in (run_dir / "steps").iterdir())
    assert str(models) in text and len(models) == 7
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    [words] = [line["val/words"] for line in lines if "val/words" in line]
    assert words >= 4  # the prompt alone has four
    # Random weights predict with the entropy of the vocabulary, ln 500 = 6.2; the mean over fewer labels must
    # be the same.
    assert lines[0]["train/loss"] == pytest.approx(6.2, abs=0.3)
    assert read_progress(run_dir / "checkpoints/step_000025").finished
    assert (run_dir / "npz/export.json").is_file()
    check_facts_of_the_source(run_dir)


def check_facts_of_the_source(run_dir: Path) -> None:
    """Check that preparation, card, doctor and commands read the facts of the added source from its entry."""
    path, flags = str(Path("stories.db").resolve()), ["--config", "configs/debug.yaml"]
    manifest = Manifest.load(run_dir / "manifest.json")
    assert manifest.provenance.revision == f"sha256:{file_sha256(Path(path))}"
    assert sum(counts["num_stories"] for counts in manifest.splits.values()) == 400

    for source in ("sqlite:stories.db", f"sqlite:{path}"):  # a card has no path of this machine
        for file in (run_dir / "manifest.json", run_dir / "config.yaml"):
            file.write_text(re.sub(r"sqlite:[^\s\",]*stories\.db", source, file.read_text()))
        card = write_card(run_dir).read_text()
        assert "`sqlite:stories.db`" in card and "CC0-1.0" in card and path not in card

    [diagnostic] = check_data(parse_config([*flags, "--data.source", "sqlite:stories.db"]))
    assert diagnostic.text == "data/debug: will be created from sqlite:stories.db"
    with pytest.raises(UserError, match=r"data.source \('sqlite:none.db'\) does not exist"):
        list(check_data(parse_config([*flags, "--data.source", "sqlite:none.db"])))
    own = use_own_folders(parse_config(["--data.source", "sqlite:a/stories.db"]))
    assert re.fullmatch(r"sqlite-a--stories\.db-[0-9a-f]{8}", own.data.data_dir.name)
    inside = [*flags, "--data.source", "sqlite:data/mine/stories.db", "--data.data_dir", "data/mine"]
    Path("data/mine").mkdir()
    Path("data/mine/stories.db").touch()
    with pytest.raises(UserError, match=r"data.data_dir \(data/mine\): must lie apart from data.source"):
        check_data_dir(parse_config(inside).data)


def test_labels_of_unequal_number_are_weighted_by_token(tiny_run, restored_registries):
    """The micro-batch must not change the loss of a step where rows have unequal numbers of labels."""
    from tinystories_slm.data.packing import IGNORED_LABEL, ContiguousPacking
    from tinystories_slm.training.loop import train

    class Unequal(ContiguousPacking):
        def labels(self, input_ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
            labels = input_ids.copy()
            labels[::2, 3:] = IGNORED_LABEL
            return labels

    PACKINGS["unequal"] = Unequal
    losses = []
    for rows in ("1", "8"):
        run_dir = train(
            tiny_run(
                *("--data.packing", "unequal", "--train.per_device_batch_size", rows),
                *("--train.max_steps", "3", "--train.warmup_steps", "1", "--train.lr", "0.1"),
                name=f"rows{rows}",
            )
        )
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("find", "message"),
    [
        (optimizer_spec, r"train.optimizer \(x\): must be one of adamw, muon"),
        (packing_class, r"data.packing \(x\): must be one of contiguous, document, best_fit"),
        (KeptSteps.parse, r"train.keep \(x\): x must be newest:N, every:N, log, all, or a step such as 512"),
        (
            lambda name: parse_task_names(f"ended,{name}", "train.eval_tasks"),
            r"train.eval_tasks \(x\): must be among ended, grammar",
        ),
    ],
)
def test_unknown_names_list_the_known_ones(find, message):
    with pytest.raises(UserError, match=message):
        find("x")


def test_a_run_with_an_unknown_name_writes_nothing(tiny_run):
    from tinystories_slm.training.loop import train

    for option in ("train.optimizer", "data.packing", "train.keep", "train.eval_tasks"):
        config = tiny_run(f"--{option}", "adamm")
        with pytest.raises(UserError, match=rf"{option} \(adamm\)"):
            train(config)
        assert not config.output_dir.exists()


def test_optimizer_facts_are_those_of_its_state():
    """`skips_on_device`: torch's fused AdamW reads `found_inf`; Muon does not."""
    config = parse_config([]).model_config(vocab_size=500)
    assert OPTIMIZERS["muon"].state_bytes(config) < OPTIMIZERS["adamw"].state_bytes(config)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), torch.inf)
    adamw = torch.optim.AdamW([weight], lr=0.1, fused=True)
    adamw.found_inf = torch.tensor(1.0)
    adamw.step()
    assert OPTIMIZERS["adamw"].skips_on_device and weight.tolist() == [1.0] * 4
