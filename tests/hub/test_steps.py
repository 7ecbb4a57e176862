"""Kept steps as branches: a push that is killed and repeated, and `step8` in every command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub.loopback import Fault
from hub.test_push import CODE, MODEL, REPO, WRITES, push_args
from transformers import AutoModelForCausalLM

from tinystories_slm.commands.generate import generate
from tinystories_slm.config import parse_config
from tinystories_slm.config.command_args.doctor import ModelDoctorArgs
from tinystories_slm.config.command_args.evaluate import EvaluateArgs
from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.command_args.publish import ExportArgs, PushArgs
from tinystories_slm.doctor.model_check import check_model
from tinystories_slm.errors import UserError
from tinystories_slm.evaluation.evaluate import evaluate
from tinystories_slm.export import export
from tinystories_slm.hub.steps import push_run
from tinystories_slm.model_folder import load_model_folder, resolve_model, weights_sha256
from tinystories_slm.report_card.display_names import display_names
from tinystories_slm.runs.run_dir import RunDir
from tinystories_slm.training import train

STEPS = [0, 1, 2, 4, 8]


@pytest.fixture(scope="module")
def stepped_run(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("stepped")
    flags = ["--config=configs/debug.yaml", "--data.max_stories=300", f"--data.data_dir={work / 'data'}"]
    flags += [f"--output_dir={work / 'tales'}", "--train.max_steps=9", "--train.keep=log"]
    return train(parse_config([*flags, "--tokenizer.vocab_size=300", "--data.seq_len=32"]))


def uploads(hub) -> list[str]:
    """Return the large files that were sent, by their hash, in order."""
    return [path.removeprefix("/lfs/") for method, path in hub.requests if method == "PUT"]


def test_each_step_is_a_branch_with_its_weights(hub, stepped_run, capsys):
    push_run(push_args(stepped_run, all_steps=True))
    repository = hub.repositories[REPO]
    assert set(repository.branches) == {"main", *(f"step{step}" for step in STEPS)}
    for step in STEPS:
        files = repository.at(f"step{step}").files
        assert set(files) == {".gitattributes", "README.md", *MODEL, *CODE}  # no records of the whole run
        weights = RunDir(stepped_run).step(step) / "model.safetensors"
        assert files["model.safetensors"].data == weights.read_bytes()
        assert f"step {step}" in files["README.md"].data.decode()
        assert json.loads(files["config.json"].data)["training_step"] == step
    assert "run/metrics.jsonl" in repository.head.files
    # The code and the tokenizer of main are not sent again.
    assert "branch step4: 3 of 8 files new or changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("PUT", "/lfs/", "half_body"),
        ("POST", "/branch/step4", "no_response"),
        ("POST", "/commit/step4", "half_body"),
        ("POST", "/commit/step4", "no_response"),
    ],
)
def test_an_interrupted_push_continues_and_uploads_nothing_twice(
    method, path, kind, hub, stepped_run, capsys
):
    def fail(*_):
        hub.faults.append(Fault(method, path, kind))

    hub.faults = [Fault("POST", "/branch/step4", fail, times=1)]
    if "branch" in path:
        hub.faults = [Fault(method, path, kind)]
    with pytest.raises(UserError, match="connection to the Hub failed"):
        push_run(push_args(stepped_run, all_steps=True))
    assert "step8" not in hub.repositories[REPO].branches
    hub.faults.clear()
    push_run(push_args(stepped_run, all_steps=True))

    weights = [weights_sha256(RunDir(stepped_run).step(step)) for step in STEPS]
    sent = [sha for sha in hub.large_files if sha in weights]
    assert sorted(sent) == sorted(weights)
    complete = [sha for sha in uploads(hub) if sha in weights]
    if kind != "half_body" or method != "PUT":  # that one was not complete
        assert len(complete) == len(set(complete))
    titles = [commit.title for commit in hub.repositories[REPO].commits.values()]
    assert len(titles) == len(set(titles)) == 2 + len(STEPS)

    hub.requests.clear()
    capsys.readouterr()
    push_run(push_args(stepped_run, all_steps=True))
    assert [request for request in hub.requests if request[0] in WRITES] == []
    assert capsys.readouterr().out.count("0 of 8 files new or changed") == len(STEPS)


def test_dry_run_and_wrong_input_send_no_request(hub, stepped_run, tmp_path, capsys):
    assert push_run(push_args(stepped_run, all_steps=True, dry_run=True)) is None
    assert "branch step8: 8 files" in capsys.readouterr().out
    without = shutil.copytree(stepped_run, tmp_path / "without")
    shutil.rmtree(without / "steps")
    with pytest.raises(
        UserError, match=r"all_steps: .* has no models in steps/; train with --train.keep log"
    ):
        push_run(push_args(without, all_steps=True))
    with pytest.raises(UserError, match=r"all_steps \(True\) has no effect with code_only"):
        PushArgs(repo_id=REPO, all_steps=True, code_only=True)
    assert hub.requests == []

    push_run(push_args(stepped_run, revision="step1"))
    with pytest.raises(UserError, match="all_steps: step1 is a tag of tester/tales; delete it"):
        push_run(push_args(stepped_run, all_steps=True))


def test_a_revision_names_a_step_in_every_command(hub, stepped_run, tmp_path, monkeypatch):
    push_run(push_args(stepped_run, all_steps=True, format="custom,native"))
    monkeypatch.chdir(tmp_path)
    local = RunDir(stepped_run).step(4)
    expected = load_model_folder(str(local), device="cpu")[0].state_dict()
    plain = AutoModelForCausalLM.from_pretrained(REPO, revision="step4", subfolder="native")
    assert plain.config.training_step == 4
    for reference in (
        (REPO, "step4"),
        (f"{REPO}@step4",),
        (str(stepped_run), "step4"),
        (f"{stepped_run}@step4",),
    ):
        model, revision = reference if len(reference) == 2 else (*reference, None)
        loaded, _ = load_model_folder(model, revision=revision, device="cpu")
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), reference

        generate(GenerateArgs(model=model, revision=revision, max_new_tokens=3, seed=0, device="cpu"))
        assert all(
            check.verdict == "ok" for check in check_model(ModelDoctorArgs(model=model, revision=revision))
        )
        export(ExportArgs(model=model, revision=revision, format="native", output=tmp_path / "out"))
        assert json.loads((tmp_path / "out/config.json").read_text())["training_step"] == 4
        scores = evaluate(
            EvaluateArgs(model=model, model_revision=revision, data="builtin", max_stories=2, device="cpu")
        )
        if model.startswith(str(stepped_run)):
            assert scores["weights_sha256"] == weights_sha256(local)
    two = [f"{stepped_run}@step0", f"{REPO}@step8"]
    scores = evaluate(EvaluateArgs(model=two, data="builtin", max_stories=2, device="cpu"))
    assert [model["model"] for model in scores["models"]] == two
    assert display_names([f"{stepped_run}@step0", f"{stepped_run}@step8"], option="model") == [
        "tales@step0",
        "tales@step8",
    ]


def test_a_wrong_step_is_named(stepped_run, tmp_path):
    kept = "has kept step0, step1, step2, step4, step8; use one of them, best or last"
    with pytest.raises(UserError, match=rf"revision \(step3\): .*{kept}"):
        resolve_model(f"{stepped_run}@step3")
    with pytest.raises(UserError, match=r"revision \(step8\): .*@step4 names a revision, too; remove one"):
        resolve_model(f"{stepped_run}@step4", "step8")
    assert resolve_model(f"{stepped_run}@last").name == str(stepped_run / "last")
    folder = shutil.copytree(stepped_run / "last", tmp_path / "a@step4")  # a path with the sign
    assert resolve_model(str(folder)) == (str(folder), None)
