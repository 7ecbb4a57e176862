import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from hub.loopback import Fault, File
from huggingface_hub import HfApi

from tinystories_slm.config import load_config, parse_config, save_config
from tinystories_slm.config.command_args.publish import PushArgs
from tinystories_slm.errors import UserError
from tinystories_slm.hub import staging
from tinystories_slm.hub.push import push

REPO = "tester/tales"
MODEL = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CODE = {"configuration_tinystories.py", "modeling_tinystories.py"}
RECORDS = {
    f"run/{name}"
    for name in (
        "config.yaml", "manifest.json", "metrics.jsonl", "loss.png", "samples.md",
        "evaluation.json", "environment.json", "stories.jsonl",
    )
}  # fmt: skip
WRITES = ("POST", "PUT", "DELETE")


def push_args(run: Path, **options) -> PushArgs:
    return PushArgs(**{"run": run, "repo_id": REPO, "format": "custom"} | options)


def test_push_makes_one_commit_with_only_the_listed_files(hub, complete_run, capsys):
    for decoy in (
        "best/.env",
        "best/optimizer.bin",
        "best/notes.py",
        "best/native/config.json",
        "id_rsa",
        "report.html",
    ):
        (complete_run / decoy).parent.mkdir(exist_ok=True)
        (complete_run / decoy).write_text("secret")
    commit = push(push_args(complete_run))
    repository = hub.repositories[REPO]

    assert set(repository.head.files) == {".gitattributes", "README.md", *MODEL, *CODE, *RECORDS}
    assert repository.head.oid == commit and len(repository.commits) == 2
    assert not repository.private and repository.tags == {}
    assert (
        repository.head.files["model.safetensors"].data
        == (complete_run / "best/model.safetensors").read_bytes()
    )
    assert "new or changed: 16 of 16 files" in capsys.readouterr().out


def test_second_push_of_the_same_run_makes_no_commit(hub, complete_run, capsys):
    first = push(push_args(complete_run))
    hub.requests.clear()
    capsys.readouterr()

    assert push(push_args(complete_run)) == first
    assert "nothing has changed" in capsys.readouterr().out
    assert [request for request in hub.requests if request[0] in WRITES] == []
    assert len(hub.repositories[REPO].commits) == 2

    (complete_run / "samples.md").write_text("one more story")
    assert push(push_args(complete_run)) != first
    assert "new or changed: 1 of 16 files" in capsys.readouterr().out


def test_both_formats_put_native_in_a_folder(hub, complete_run):
    push(push_args(complete_run, format="custom,native"))
    files = hub.repositories[REPO].head.files
    native = {f"native/{name}" for name in (*MODEL, "export.json")}
    assert set(files) == {".gitattributes", "README.md", *MODEL, *CODE, *RECORDS, *native}
    assert json.loads(files["native/config.json"].data)["architectures"] == ["GPT2LMHeadModel"]
    again = push(push_args(complete_run, format="native,custom"))
    assert len(hub.repositories[REPO].commits) == 2 and again == hub.repositories[REPO].head.oid

    push(push_args(complete_run, format="native", repo_id="tester/plain"))
    files = hub.repositories["tester/plain"].head.files
    assert set(files) == {".gitattributes", "README.md", *MODEL, "export.json", *RECORDS}
    assert b"trust_remote_code" not in files["README.md"].data
    assert "auto_map" not in json.loads(files["config.json"].data)


def test_tag_is_set_on_the_commit_and_never_moved(hub, complete_run):
    first = push(push_args(complete_run, revision="v1"))
    repository = hub.repositories[REPO]
    assert repository.tags == {"v1": first}
    assert push(push_args(complete_run, revision="v1")) == first

    (complete_run / "samples.md").write_text("one more story")
    hub.requests.clear()
    with pytest.raises(
        UserError, match=r"revision \(v1\) is a tag of tester/tales on commit .* tags are not moved"
    ):
        push(push_args(complete_run, revision="v1"))
    assert [request for request in hub.requests if request[0] in WRITES] == []
    second = push(push_args(complete_run, revision="v2"))
    assert repository.tags == {"v1": first, "v2": second} and first != second == repository.head.oid
    with pytest.raises(UserError, match="is a branch"):
        push(push_args(complete_run, revision="main"))


def test_next_push_sets_a_tag_that_failed(hub, complete_run):
    hub.faults = [Fault("POST", "/tag/", times=1)]
    with pytest.raises(UserError, match="connection to the Hub failed"):
        push(push_args(complete_run, revision="v1"))
    commit = push(push_args(complete_run, revision="v1"))
    assert hub.repositories[REPO].tags == {"v1": commit} and len(hub.repositories[REPO].commits) == 2


def test_dry_run_lists_files_with_sizes_and_sends_no_request(hub, complete_run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert push(push_args(complete_run, dry_run=True)) is None
    lines = capsys.readouterr().out.splitlines()

    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, lines[:-1])}
    assert set(sizes) == {"README.md", *MODEL, *CODE, *RECORDS}
    assert sizes["run/samples.md"] == (complete_run / "samples.md").stat().st_size
    assert lines[-1] == f"16 files would be one commit in {REPO}; nothing was uploaded"
    assert hub.requests == [] and hub.repositories == {}


def test_uploaded_files_contain_no_local_path(hub, complete_run, tmp_path):
    path = complete_run / "config.yaml"
    flags = [f"--tokenizer.pretrained={complete_run / 'best'}", "--model.init_from=~/models/mine"]
    config = parse_config([f"--config={path}", *flags])
    assert config.output_dir.is_absolute() and config.data.source.startswith("/")
    save_config(config, path)
    evaluation = json.loads((complete_run / "evaluation.json").read_text())
    evaluation |= {
        "model": f"{complete_run}/best",
        "data": "../else/where/tales.jsonl",
        "revision": "sha256:00",
    }
    (complete_run / "evaluation.json").write_text(json.dumps(evaluation))
    push(push_args(complete_run))
    files = hub.repositories[REPO].head.files

    for name, file in files.items():
        assert b"a private place" not in file.data and b"else/where" not in file.data, name
        assert str(complete_run.parent).encode() not in file.data, name
    (tmp_path / "config.yaml").write_bytes(files["run/config.yaml"].data)
    published = load_config(tmp_path / "config.yaml")
    assert (str(published.output_dir), str(published.data.data_dir)) == ("tales", "data")
    assert published.data.source == "tales.jsonl"
    assert (published.tokenizer.pretrained, published.model.init_from) == ("best", "mine")
    assert published.train == config.train
    evaluation = json.loads(files["run/evaluation.json"].data)
    assert (evaluation["model"], evaluation["data"]) == (REPO, "tales.jsonl")
    assert json.loads(files["run/manifest.json"].data)["source"] == "tales.jsonl"
    assert json.loads(files["run/stories.jsonl"].data)["model"] == REPO


def test_secrets_are_found_without_a_home_directory(tmp_path, monkeypatch):
    def no_entry(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    (tmp_path / "README.md").write_text("--model ~/best")
    staging.check_no_secrets(tmp_path, [Path("README.md")], tmp_path)
    (tmp_path / "README.md").write_text(f"--model {tmp_path}/best")
    with pytest.raises(UserError, match="holds the run's path"):
        staging.check_no_secrets(tmp_path, [Path("README.md")], tmp_path)


@pytest.mark.parametrize(
    ("name", "secret", "message"),
    [
        ("samples.md", f"{Path.home()}/diary", "run/samples.md holds a path in this user's home directory"),
        ("metrics.jsonl", "RUN/checkpoints", "run/metrics.jsonl holds the run's path"),
        ("samples.md", "hf_" + "Ab1" * 12, "run/samples.md holds an access token"),
        ("best/modeling_tinystories.py", "# hf_tester_may_write", "holds your access token"),
        ("environment.json", json.dumps({"hardware": f"at {Path.home()}/x"}), "README.md holds a path in"),
    ],
)  # fmt: skip
def test_file_with_a_secret_is_rejected_by_name(hub, complete_run, name, secret, message):
    secret = secret.replace("RUN", str(complete_run))
    path = complete_run / name
    path.write_text(secret if path.suffix == ".json" else path.read_text() + secret + "\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        push(push_args(complete_run))
    assert hub.requests == [] and "Ab1" not in str(error.value)


@pytest.mark.parametrize(
    ("token", "options", "faults", "message"),
    [
        (None, {}, [], "no access token was found; run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", {}, [], "rejects the access token (401)"),
        ("hf_reader", {}, [], "has no write access there (403: "),
        ("hf_tester_may_write", {"repo_id": "others/tales"}, [], "has no write access there (403: "),
        ("hf_tester_may_write", {}, [Fault("POST", "/create", 404)], "repository does not exist (404: "),
        ("hf_tester_may_write", {}, [Fault("POST", "/preupload", 403)], "has no write access there (403: "),
        ("hf_tester_may_write", {}, [Fault("POST", "/preupload", 500)], "the Hub rejected the push (500"),
        ("hf_tester_may_write", {}, [Fault("GET", "/api/models")], "connection to the Hub failed"),
        ("hf_tester_may_write", {"license": "NO SUCH"}, [], '"license" must be one of the known ones'),
    ],
)  # fmt: skip
def test_hub_error_is_one_line_and_publishes_nothing(
    hub, complete_run, monkeypatch, token, options, faults, message
):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    hub.faults = faults
    with pytest.raises(UserError, match=re.escape(message)) as error:
        push(push_args(complete_run, **options))
    assert "\n" not in str(error.value)
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())


def test_unreachable_hub_is_one_line(hub, complete_run):
    hub.stop()
    with pytest.raises(UserError, match="the connection to the Hub failed") as error:
        push(push_args(complete_run))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("method", "path"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/batch")])
def test_dropped_connection_publishes_nothing_until_next_push(hub, complete_run, method, path):
    hub.create(REPO)
    before = hub.repositories[REPO].head
    hub.faults = [Fault(method, path)]
    with pytest.raises(UserError, match=r"the connection to the Hub failed .* push again"):
        push(push_args(complete_run, revision="v1"))
    assert hub.repositories[REPO].head == before and hub.repositories[REPO].tags == {}

    hub.faults = []
    commit = push(push_args(complete_run, revision="v1"))
    assert hub.repositories[REPO].tags == {"v1": commit} and len(hub.repositories[REPO].commits) == 2


def test_commit_with_a_lost_response_is_not_repeated(hub, complete_run, capsys):
    hub.faults = [Fault("POST", "/commit/", "no_response", times=1)]
    with pytest.raises(UserError, match="push again"):
        push(push_args(complete_run))
    push(push_args(complete_run))
    assert "nothing has changed" in capsys.readouterr().out
    assert len(hub.repositories[REPO].commits) == 2


def test_push_keeps_other_files_of_the_repository(hub, complete_run):
    repository = hub.create(REPO)
    theirs = {"README.md": File(b"---\nlicense: mit\n---\nmine"), "pets.txt": File(b"a cat")}
    before = repository.commit("my own", repository.head.files | theirs)
    push(push_args(complete_run))

    assert repository.head.files["pets.txt"].data == b"a cat"
    assert b"35,360 parameters" in repository.head.files["README.md"].data
    assert before.oid in repository.commits and len(repository.commits) == 3


def copy_as_native(best: Path, native: Path, temporary: Path) -> None:
    """Stand in for the native export, which takes seconds."""
    native.mkdir(exist_ok=True)
    for name in MODEL:
        shutil.copyfile(best / name, native / name)
    (native / "export.json").write_text("{}")


def test_push_of_fewer_files_removes_those_of_an_earlier_push(hub, complete_run, capsys, monkeypatch):
    monkeypatch.setattr(staging, "_stage_native", copy_as_native)
    push(push_args(complete_run, format="custom,native"))
    repository = hub.repositories[REPO]
    native = {f"native/{name}" for name in (*MODEL, "export.json")}
    assert native <= set(repository.head.files)
    theirs = {"chat_template.jinja": File(b"{{ messages }}"), "native/notes.md": File(b"mine")}
    edited = {"run/samples.md": File(b"my favorite ones")}
    repository.commit("Upload with huggingface_hub", repository.head.files | theirs | edited)
    for name in ("evaluation.json", "stories.jsonl", "samples.md"):
        (complete_run / name).unlink()
    capsys.readouterr()

    push(push_args(complete_run))
    stale = {*native, "run/evaluation.json", "run/stories.jsonl"}
    expected = {".gitattributes", "README.md", *MODEL, *CODE, *RECORDS, *theirs} - stale
    assert set(repository.head.files) == expected and len(repository.commits) == 4
    assert repository.head.files["run/samples.md"].data == b"my favorite ones"
    out = capsys.readouterr().out
    assert "removed, as this push no longer makes them: native/config.json, " in out

    # With --format native alone, the code files of the first push are stale; the second push changes nothing.
    push(push_args(complete_run, format="native"))
    assert set(repository.head.files) == (expected - CODE) | {"export.json"}
    assert push(push_args(complete_run, format="native")) == repository.head.oid
    assert len(repository.commits) == 5


def test_push_that_only_removes_files_makes_a_commit(hub, complete_run):
    push(push_args(complete_run))
    repository = hub.repositories[REPO]
    code = {"native/config.json": File(b"{}")}
    repository.commit("Model, card and records of the run other", repository.head.files | code)
    with pytest.raises(UserError, match=r"revision \(main\) is a branch"):
        push(push_args(complete_run, revision="main"))
    push(push_args(complete_run, revision="v1"))
    assert "native/config.json" not in repository.head.files and repository.tags == {
        "v1": repository.head.oid
    }
    push(PushArgs(repo_id=REPO, code_only=True))
    assert len(repository.commits) == 4


def test_file_in_gitignore_of_the_repository_is_an_error(hub, complete_run):
    repository = hub.create(REPO)
    repository.commit("ignore", repository.head.files | {".gitignore": File(b"run/metrics.jsonl\n")})
    with pytest.raises(UserError, match=r"left out run/metrics.jsonl \(its .gitignore\?\)"):
        push(push_args(complete_run))


def test_concurrent_commit_is_not_overwritten(hub, complete_run):
    repository = hub.create(REPO)
    hub.faults = [
        Fault("POST", "/commit/", lambda: repository.commit("faster", repository.head.files), times=1)
    ]
    with pytest.raises(UserError, match="the branch received another commit in the meantime"):
        push(push_args(complete_run))
    assert repository.head.title == "faster"
    push(push_args(complete_run))


def test_private_repository_stays_private(hub, complete_run):
    push(push_args(complete_run, private=True))
    assert hub.repositories[REPO].private
    push(push_args(complete_run, private=True))

    hub.create("tester/public")
    with pytest.raises(UserError, match="tester/public already exists and is public"):
        push(push_args(complete_run, private=True, repo_id="tester/public"))
    assert len(hub.repositories["tester/public"].commits) == 1
    with pytest.raises(Exception, match="401"):
        HfApi(token=False).model_info(REPO)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "tales"}, "repo_id (tales) must include the owner; use USER/tales"),
        ({"repo_id": "a/b/c"}, "repo_id (a/b/c) is not valid"),
        ({"format": "custom,gguf"}, "format (custom,gguf) must be"),
        ({"format": ""}, "format () must be"),
        ({"revision": "v 1"}, "revision (v 1) is not a valid tag"),
    ],
)
def test_invalid_arguments_are_rejected(run_dir, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        push_args(run_dir, **options)


def test_run_without_a_complete_model_is_rejected(hub, complete_run):
    for run in (complete_run / "best", complete_run / "nowhere"):
        with pytest.raises(UserError, match="is not a run directory with a model in best/"):
            push(push_args(run))
    (complete_run / "best" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json"):
        push(push_args(complete_run))
    assert hub.requests == []


def test_code_only_updates_only_the_code_files(hub, complete_run, capsys):
    for name in CODE:
        (complete_run / "best" / name).write_text("# code of an earlier version\n")
    push(push_args(complete_run, format="custom,native"))
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


def test_code_only_requires_a_repository_with_our_code(hub, complete_run):
    with pytest.raises(UserError, match="the user, organization or repository does not exist"):
        push(PushArgs(repo_id=REPO, code_only=True))
    push(push_args(complete_run, format="native"))
    with pytest.raises(UserError, match=r"code_only: tester/tales has no configuration_tinystories\.py"):
        push(PushArgs(repo_id=REPO, code_only=True))
    assert len(hub.repositories[REPO].commits) == 2


def test_options_without_effect_on_code_only_are_rejected(complete_run):
    for options in ({"run": complete_run}, {"private": True}, {"license": "mit"}, {"format": "native"}):
        with pytest.raises(UserError, match=r"has no effect with code_only"):
            PushArgs(repo_id=REPO, code_only=True, **options)
    with pytest.raises(UserError, match="run is missing"):
        PushArgs(repo_id=REPO)
