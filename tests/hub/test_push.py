import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hub.loopback import Fault, File
from huggingface_hub import HfApi

from tinystories_slm.errors import InputError
from tinystories_slm.hub.push import PushArgs, push

REPO = "tester/tales"
MODEL = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CODE = {"configuration_tinystories.py", "modeling_tinystories.py"}
RECORD = {
    f"run/{name}"
    for name in (
        "config.yaml", "manifest.json", "metrics.jsonl", "loss.png", "samples.md",
        "evaluation.json", "environment.json", "stories.jsonl",
    )
}  # fmt: skip
WRITES = ("POST", "PUT", "DELETE")


def args_of(run: Path, **options) -> PushArgs:
    return PushArgs(**{"run": run, "repo_id": REPO, "format": "custom"} | options)


def test_one_commit_holds_the_listed_files_and_no_other(hub, whole_run, capsys):
    for decoy in (
        "best/.env",
        "best/optimizer.bin",
        "best/notes.py",
        "best/native/config.json",
        "id_rsa",
        "report.html",
    ):
        (whole_run / decoy).parent.mkdir(exist_ok=True)
        (whole_run / decoy).write_text("secret")
    commit = push(args_of(whole_run))
    repository = hub.repositories[REPO]

    assert set(repository.head.files) == {".gitattributes", "README.md", *MODEL, *CODE, *RECORD}
    assert repository.head.oid == commit and len(repository.commits) == 2
    assert not repository.private and repository.tags == {}
    assert (
        repository.head.files["model.safetensors"].data == (whole_run / "best/model.safetensors").read_bytes()
    )
    assert "new or changed: 16 of 16 files" in capsys.readouterr().out


def test_a_second_push_of_the_same_run_changes_nothing(hub, whole_run, capsys):
    first = push(args_of(whole_run))
    hub.requests.clear()
    capsys.readouterr()

    assert push(args_of(whole_run)) == first
    assert "nothing has changed" in capsys.readouterr().out
    assert [request for request in hub.requests if request[0] in WRITES] == []
    assert len(hub.repositories[REPO].commits) == 2

    (whole_run / "samples.md").write_text("one more story")
    assert push(args_of(whole_run)) != first
    assert "new or changed: 1 of 16 files" in capsys.readouterr().out


def test_both_forms_have_the_native_one_in_a_folder(hub, whole_run):
    push(args_of(whole_run, format="custom,native"))
    files = hub.repositories[REPO].head.files
    native = {f"native/{name}" for name in (*MODEL, "export.json")}
    assert set(files) == {".gitattributes", "README.md", *MODEL, *CODE, *RECORD, *native}
    assert json.loads(files["native/config.json"].data)["architectures"] == ["GPT2LMHeadModel"]
    again = push(args_of(whole_run, format="native,custom"))
    assert len(hub.repositories[REPO].commits) == 2 and again == hub.repositories[REPO].head.oid

    push(args_of(whole_run, format="native", repo_id="tester/plain"))
    files = hub.repositories["tester/plain"].head.files
    assert set(files) == {".gitattributes", "README.md", *MODEL, "export.json", *RECORD}
    assert b"trust_remote_code" not in files["README.md"].data
    assert "auto_map" not in json.loads(files["config.json"].data)


def test_a_tag_is_put_on_the_commit_and_never_moved(hub, whole_run):
    first = push(args_of(whole_run, revision="v1"))
    repository = hub.repositories[REPO]
    assert repository.tags == {"v1": first}
    assert push(args_of(whole_run, revision="v1")) == first

    (whole_run / "samples.md").write_text("one more story")
    hub.requests.clear()
    with pytest.raises(
        InputError, match=r"revision \(v1\) is a tag of tester/tales on commit .* is not moved"
    ):
        push(args_of(whole_run, revision="v1"))
    assert [request for request in hub.requests if request[0] in WRITES] == []
    second = push(args_of(whole_run, revision="v2"))
    assert repository.tags == {"v1": first, "v2": second} and first != second == repository.head.oid
    with pytest.raises(InputError, match="is a branch"):
        push(args_of(whole_run, revision="main"))


def test_a_tag_that_was_not_reached_is_put_by_the_next_push(hub, whole_run):
    hub.faults = [Fault("POST", "/tag/", times=1)]
    with pytest.raises(InputError, match="connection to the Hub failed"):
        push(args_of(whole_run, revision="v1"))
    commit = push(args_of(whole_run, revision="v1"))
    assert hub.repositories[REPO].tags == {"v1": commit} and len(hub.repositories[REPO].commits) == 2


def test_a_dry_run_lists_every_file_with_its_size_and_asks_nothing(hub, whole_run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(args_of(whole_run, dry_run=True)) is None
    lines = capsys.readouterr().out.splitlines()

    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, lines[:-1])}
    assert set(sizes) == {"README.md", *MODEL, *CODE, *RECORD}
    assert sizes["run/samples.md"] == (whole_run / "samples.md").stat().st_size
    assert lines[-1] == f"16 files would be one commit in {REPO}; nothing was sent"
    assert hub.requests == [] and hub.repositories == {}


def test_no_path_of_this_machine_is_in_what_is_uploaded(hub, whole_run):
    path = whole_run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    assert config["output_dir"].startswith("/") and config["data"]["source"].startswith("/")
    config["tokenizer"]["pretrained"] = str(whole_run / "best")
    config["train"]["init_from"] = "~/models/mine"
    path.write_text(yaml.safe_dump(config))
    evaluation = json.loads((whole_run / "evaluation.json").read_text())
    evaluation |= {"model": f"{whole_run}/best", "data": "../else/where/tales.jsonl", "revision": "sha256:00"}
    (whole_run / "evaluation.json").write_text(json.dumps(evaluation))
    push(args_of(whole_run))
    files = hub.repositories[REPO].head.files

    for name, file in files.items():
        assert b"nobody's business" not in file.data and b"else/where" not in file.data, name
        assert str(whole_run.parent).encode() not in file.data, name
    public = yaml.safe_load(files["run/config.yaml"].data)
    assert (public["output_dir"], public["data"]["data_dir"]) == ("tales", "data")
    assert public["data"]["source"] == "tales.jsonl"
    assert (public["tokenizer"]["pretrained"], public["train"]["init_from"]) == ("best", "mine")
    assert public["train"]["lr"] == config["train"]["lr"]
    evaluation = json.loads(files["run/evaluation.json"].data)
    assert (evaluation["model"], evaluation["data"]) == (REPO, "tales.jsonl")
    assert json.loads(files["run/manifest.json"].data)["source"] == "tales.jsonl"
    assert json.loads(files["run/stories.jsonl"].data)["model"] == REPO


@pytest.mark.parametrize(
    ("name", "secret", "message"),
    [
        ("samples.md", f"{Path.home()}/diary", "run/samples.md holds a path in this user's home folder"),
        ("metrics.jsonl", "RUN/checkpoints", "run/metrics.jsonl holds the run's path"),
        ("samples.md", "hf_" + "Ab1" * 12, "run/samples.md holds an access token"),
        ("best/modeling_tinystories.py", "# hf_tester_may_write", "holds your access token"),
        ("environment.json", json.dumps({"hardware": f"at {Path.home()}/x"}), "README.md holds a path in"),
    ],
)  # fmt: skip
def test_a_file_that_tells_a_secret_is_refused_by_name(hub, whole_run, name, secret, message):
    secret = secret.replace("RUN", str(whole_run))
    path = whole_run / name
    path.write_text(secret if path.suffix == ".json" else path.read_text() + secret + "\n")
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        push(args_of(whole_run))
    assert hub.requests == [] and "Ab1" not in str(refused.value)


@pytest.mark.parametrize(
    ("token", "options", "faults", "message"),
    [
        (None, {}, [], "no access token; run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", {}, [], "does not accept the access token (401)"),
        ("hf_reader", {}, [], "may not write there (403: "),
        ("hf_tester_may_write", {"repo_id": "others/tales"}, [], "may not write there (403: "),
        ("hf_tester_may_write", {}, [Fault("POST", "/create", 404)], "no such user, organization"),
        ("hf_tester_may_write", {}, [Fault("POST", "/preupload", 403)], "may not write there (403: "),
        ("hf_tester_may_write", {}, [Fault("POST", "/preupload", 500)], "the Hub refused (500"),
        ("hf_tester_may_write", {}, [Fault("GET", "/api/models", "half")], "connection to the Hub failed"),
        ("hf_tester_may_write", {"license": "NO SUCH"}, [], '"license" must be one of the known ones'),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line_and_publishes_nothing(
    hub, whole_run, monkeypatch, token, options, faults, message
):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    hub.faults = faults
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        push(args_of(whole_run, **options))
    assert "\n" not in str(refused.value)
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_a_hub_that_is_not_there_is_one_line(hub, whole_run):
    hub.stop()
    with pytest.raises(InputError, match="the connection to the Hub failed") as refused:
        push(args_of(whole_run))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/batch")])
def test_a_connection_that_drops_publishes_nothing_and_the_next_push_does(hub, whole_run, method, path):
    hub.create(REPO)
    before = hub.repositories[REPO].head
    hub.faults = [Fault(method, path)]
    with pytest.raises(InputError, match=r"the connection to the Hub failed .* push again"):
        push(args_of(whole_run, revision="v1"))
    assert hub.repositories[REPO].head == before and hub.repositories[REPO].tags == {}

    hub.faults = []
    commit = push(args_of(whole_run, revision="v1"))
    assert hub.repositories[REPO].tags == {"v1": commit} and len(hub.repositories[REPO].commits) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, whole_run, capsys):
    hub.faults = [Fault("POST", "/commit/", "answer", times=1)]
    with pytest.raises(InputError, match="push again"):
        push(args_of(whole_run))
    push(args_of(whole_run))
    assert "nothing has changed" in capsys.readouterr().out
    assert len(hub.repositories[REPO].commits) == 2


def test_a_repository_of_other_content_gets_a_commit_on_top(hub, whole_run):
    repository = hub.create(REPO)
    theirs = {"README.md": File(b"---\nlicense: mit\n---\nmine"), "pets.txt": File(b"a cat")}
    before = repository.commit("my own", repository.head.files | theirs)
    push(args_of(whole_run))

    assert repository.head.files["pets.txt"].data == b"a cat"
    assert b"35,360 parameters" in repository.head.files["README.md"].data
    assert before.oid in repository.commits and len(repository.commits) == 3


def test_a_file_that_the_repository_ignores_is_missed(hub, whole_run):
    repository = hub.create(REPO)
    repository.commit("ignore", repository.head.files | {".gitignore": File(b"run/metrics.jsonl\n")})
    with pytest.raises(InputError, match=r"left out run/metrics.jsonl \(its .gitignore\?\)"):
        push(args_of(whole_run))


def test_somebody_elses_commit_in_between_is_not_overwritten(hub, whole_run):
    repository = hub.create(REPO)
    hub.faults = [
        Fault("POST", "/commit/", lambda: repository.commit("faster", repository.head.files), times=1)
    ]
    with pytest.raises(InputError, match="somebody else committed at the same moment"):
        push(args_of(whole_run))
    assert repository.head.title == "faster"
    push(args_of(whole_run))


def test_private_is_private_and_never_quietly_public(hub, whole_run):
    push(args_of(whole_run, private=True))
    assert hub.repositories[REPO].private
    push(args_of(whole_run, private=True))

    hub.create("tester/seen")
    with pytest.raises(InputError, match="tester/seen is there already and public"):
        push(args_of(whole_run, private=True, repo_id="tester/seen"))
    assert len(hub.repositories["tester/seen"].commits) == 1
    with pytest.raises(Exception, match="401"):
        HfApi(token=False).model_info(REPO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "tales"}, "repo_id (tales) names no owner; write USER/tales"),
        ({"repo_id": "a/b/c"}, "repo_id (a/b/c) cannot be one"),
        ({"format": "custom,gguf"}, "format (custom,gguf) must be"),
        ({"format": ""}, "format () must be"),
        ({"revision": "v 1"}, "revision (v 1) cannot be a tag"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(run_dir, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        args_of(run_dir, **options)


def test_a_run_without_a_whole_model_is_refused(hub, whole_run):
    for run in (whole_run / "best", whole_run / "nowhere"):
        with pytest.raises(InputError, match="is no run folder with a model in best/"):
            push(args_of(run))
    (whole_run / "best" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"lacks tokenizer\.json"):
        push(args_of(whole_run))
    assert hub.requests == []


def test_code_only_renews_the_code_files_and_nothing_else(hub, whole_run, capsys):
    for name in CODE:
        (whole_run / "best" / name).write_text("# code of an earlier version\n")
    push(args_of(whole_run, format="custom,native"))
    repository = hub.repositories[REPO]
    before = repository.head.files
    capsys.readouterr()
    commit = push(PushArgs(repo_id=REPO, code_only=True))

    after = repository.head.files
    assert repository.head.oid == commit and len(repository.commits) == 3
    assert {name for name in after if after[name].data != before[name].data} == CODE
    assert set(after) == set(before)
    for name in CODE:
        assert after[name].data == (ROOT / "tinystories_slm" / "model" / name).read_bytes()
    assert "new or changed: 2 of 2 files" in capsys.readouterr().out
    assert push(PushArgs(repo_id=REPO, code_only=True, revision="v2")) == commit
    assert repository.tags == {"v2": commit}


def test_code_only_needs_a_repository_with_our_code(hub, whole_run):
    with pytest.raises(InputError, match="no such user, organization or repository"):
        push(PushArgs(repo_id=REPO, code_only=True))
    push(args_of(whole_run, format="native"))
    with pytest.raises(InputError, match=r"code_only: tester/tales has no configuration_tinystories\.py"):
        push(PushArgs(repo_id=REPO, code_only=True))
    assert len(hub.repositories[REPO].commits) == 2


def test_options_without_effect_on_code_only_are_rejected(whole_run):
    for options in ({"run": whole_run}, {"private": True}, {"license": "mit"}, {"format": "native"}):
        with pytest.raises(InputError, match=r"has no effect with code_only"):
            PushArgs(repo_id=REPO, code_only=True, **options)
    with pytest.raises(InputError, match="run is missing"):
        PushArgs(repo_id=REPO)
