"""docs/data.md, "Larger than the disk": its commands run as they stand, on a small folder."""

import json
import re
import shlex
from pathlib import Path

from conftest import ROOT, run_script
from hub.test_card import card_text
from story_files import write_parquet

from tinystories_slm import grammar
from tinystories_slm.config import load_config
from tinystories_slm.doctor.resources import check_data

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SMALL = (
    "--tokenizer.vocab_size=300", "--data.seq_len=32", "--train.max_steps=8", "--train.warmup_steps=1",
    "--train.log_every=1", "--train.eval_every=4", "--train.eval_stories=3", "--output_dir=runs/streamed",
    "--data.streaming_chunk_tokens=1000",
)  # fmt: skip


def test_commands_of_the_page_run_and_the_card_states_the_stream(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    stories = list(grammar.generate_corpus(60, seed=2))
    write_parquet(tmp_path / "stories" / "train.parquet", stories)
    write_parquet(tmp_path / "stories" / "validation.parquet", stories[:5])
    section = PAGE.split("## Larger than the disk\n")[1].split("\n## ")[0]
    [commands] = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    on_hub, in_folder = (shlex.split(line) for line in commands.splitlines())
    done = run_script(Path(on_hub[1]).name, *on_hub[2:], "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and "streaming: true" in done.stdout, done.stderr
    done = run_script(Path(in_folder[1]).name, *in_folder[2:], *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "in total, of a stream, in chunks of 1,000" in done.stderr
    assert "1,000" not in section and f"{2**22:,}" in section

    run_dir = tmp_path / "runs" / "streamed"
    manifest = json.loads((run_dir / "manifest.json").read_text())
    assert manifest["streaming"] is True and manifest["revision"].startswith("sha256:")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    read = [line["train/num_stories_read"] for line in lines if "train/num_stories_read" in line]
    assert read == sorted(read) and 3 < read[-1] < 60
    card = " ".join(card_text(run_dir).split())
    assert f"Training split: read as a stream, {read[-1]} stories over all epochs; a sample of 60 sto" in card
    monkeypatch.chdir(tmp_path)
    [diagnostic] = check_data(load_config(run_dir / "config.yaml"))
    assert "training tokens of a sample of stories are prepared" in diagnostic.text
