"""Story sets of the published shapes, on the local Hub."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hub.loopback import Commit, File, LoopbackHub

from tinystories_slm.data.sources.named_sets import NAMED_SETS

TRAIN = [f"Tom saw {number} foxes.\n\nThey ran." for number in range(40)]
VALID = [f"Sue saw {number} hens." for number in range(3)]


def parquet(**columns: list) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def text(stories: list[str]) -> bytes:
    return "".join(f"{story}\n<|endoftext|>\n" for story in stories).encode()


def all_data(shards: list[list[str]]) -> bytes:
    """TinyStories_all_data.tar.gz: data00.json, data01.json, ..., each one list."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for number, stories in enumerate(shards):
            records = [
                {
                    "story": story,
                    "instruction": {"prompt:": "Write.", "words": ["hang", "foot"], "features": ["Dialogue"]},
                    "summary": "They ran.",
                    "source": "GPT-4",
                }
                for story in stories
            ]
            member = tarfile.TarInfo(f"data{number:02}.json")
            content = json.dumps(records).encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def publish(hub: LoopbackHub, repository: str, commit: str, files: Mapping[str, bytes]) -> None:
    """Publish `files` as `commit`, and a newer commit without stories."""
    created = hub.create(repository)
    created.commits[commit] = Commit(commit, "stories", {path: File(data) for path, data in files.items()})
    created.commit("newer", {"README.md": File(b"---\nlicense: mit\n---\n")})


def publish_tinystories(hub: LoopbackHub) -> None:
    """Publish the files that roneneldan/TinyStories has at the pinned commit; docs/data.md."""
    shards = [TRAIN[:10], TRAIN[10:20], TRAIN[20:30], TRAIN[30:]]
    names = ("2d5a1467fff1081b", "5852b56a2bd28fd9", "a26307300439e943", "d243063613e5a057")
    files = {
        f"data/train-0000{number}-of-00004-{name}.parquet": parquet(text=shards[number])
        for number, name in enumerate(names)
    }
    files |= {
        "data/validation-00000-of-00001-869c898b519ad725.parquet": parquet(text=VALID),
        "Evaluation prompts.yaml": b"- Once upon a time\n",
        "MLP_input_output.npy": b"\x93NUMPY",
        "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
        "TinyStories-train.txt": text(["V1 as text"]),
        "TinyStories-valid.txt": text(["V1 as text"]),
        "TinyStoriesV2-GPT4-train.txt": text([f"V2 {story}" for story in TRAIN]),
        "TinyStoriesV2-GPT4-valid.txt": text([f"V2 {story}" for story in VALID]),
        "TinyStories_all_data.tar.gz": all_data(
            [[f"shard {shard}, {n}" for n in range(5)] for shard in range(11)]
        ),
    }
    publish(hub, "roneneldan/TinyStories", NAMED_SETS["tinystories"].revision, files)


def publish_folder(hub: LoopbackHub, folder: Path, name: str) -> str:
    """Add the files of `folder` to the repository `name`, as one commit; return it."""
    repository = hub.create(name)
    files = {path.name: File(path.read_bytes()) for path in folder.iterdir()}
    return repository.commit("files", repository.head.files | files).oid
