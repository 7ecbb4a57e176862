"""Compare our server with `transformers serve` on the same weights: 1, 8 and 50 users at once, interleaved.

    python benchmarks/serve.py --model runs/quickstart/best

Contenders: scripts/serve.py, and `transformers serve` on the native export of the model, as it is and with
`--continuous-batching`. Each user sends its requests one after another, as a stream, with a prompt and a seed
of its own, temperature 0.8, top_k 50 and top_p 0.95; texts end at the stop token or after 200 tokens. A
server is started for each measurement and answers one request before it. It shares the machine with clients.

Tokens per second are the new tokens of all texts, counted with the tokenizer of the model, over the seconds
of the clock. The first word arrives with the first part that is not blank. Memory is the peak of the server's
process (Linux). Writes benchmarks/results/serve.json and the table of docs/serving.md; with `--quick`
nothing.
"""

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import ROOT, Stats, fill_table, markdown_table, provenance, run_interleaved, write_result
from transformers import PreTrainedTokenizerBase

from tinystories_slm.data.tokenizer import load_tokenizer
from tinystories_slm.export import ExportArgs, export

PAGE = ROOT / "docs" / "serving.md"
OURS = "ours"
PLAIN = "transformers serve"
BATCHED = "transformers serve --continuous-batching"
PROMPTS = ("Once upon a time", "One day, a little fox", "There was a", "Lily and Tom", "In a small house")
_TRANSFORMERS = "from transformers.cli.transformers import main; main()"


@dataclass(frozen=True)
class Load:
    """Requests of one measurement."""

    num_users: int
    requests_per_user: int
    max_tokens: int


@dataclass(frozen=True)
class Measured:
    """Result of one measurement."""

    tokens_per_second: float
    first_word_s: list[float]
    """One per request."""
    peak_bytes: int
    num_failed: int
    """Requests without a text."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder of this project")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests_per_user", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=200)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 50])
    parser.add_argument(
        "--cb_max_memory_percent",
        type=float,
        help="fraction of the memory that --continuous-batching allocates; default: that of transformers",
    )
    parser.add_argument("--quick", action="store_true", help="print only; write nothing")
    args = parser.parse_args(argv)
    limit = args.cb_max_memory_percent
    batching = ["--continuous-batching", *([f"--cb-max-memory-percent={limit}"] if limit is not None else [])]
    tokenizer = load_tokenizer(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        native = export(ExportArgs(model=args.model, format="native", output=Path(scratch) / "native"))
        servers = {
            OURS: [str(ROOT / "scripts" / "serve.py"), f"--model={args.model}", "--device=cpu", "--port=0"],
            PLAIN: _transformers_command(native),
            BATCHED: _transformers_command(native, *batching),
        }
        names = {OURS: args.model, PLAIN: str(native), BATCHED: str(native)}
        contenders = {
            (name, num_users): partial(
                measure,
                command,
                names[name],
                tokenizer,
                Load(num_users, args.requests_per_user, args.max_tokens),
            )
            for num_users in args.users
            for name, command in servers.items()
        }
        measured = run_interleaved(contenders, args.rounds)
    table = _format_table(measured)
    print(table)
    if args.quick:
        return
    result = {
        **provenance(),
        "rounds": args.rounds,
        "requests_per_user": args.requests_per_user,
        "max_tokens": args.max_tokens,
        "measured": [
            {"server": name, "users": num_users, **_summary(rounds)}
            for (name, num_users), rounds in measured.items()
        ],
    }
    write_result("serve", result)
    fill_table(PAGE, "python benchmarks/serve.py", table)


def _transformers_command(folder: Path, *options: str) -> list[str]:
    return [
        "-c",
        _TRANSFORMERS,
        "serve",
        "--host=127.0.0.1",
        "--port=0",
        "--device=cpu",
        *options,
        str(folder),
    ]


def measure(command: Sequence[str], model: str, tokenizer: PreTrainedTokenizerBase, load: Load) -> Measured:
    """Start a server, send the requests of all users, and end the server."""
    with _server(command) as (process, port):
        _complete(port, _body(model, 0, 0, 4))  # loads what the server loads with its first request
        started_s = time.perf_counter()
        with ThreadPoolExecutor(load.num_users) as pool:
            answers = pool.map(lambda user: _use(port, model, user, load), range(load.num_users))
            texts = [answer for of_user in answers for answer in of_user]
        seconds = time.perf_counter() - started_s
        peak_bytes = _peak_bytes(process.pid)
    answered = [(first_s, text) for first_s, text in texts if text]
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for _, text in answered)
    first = [first_s for first_s, _ in answered]
    return Measured(num_tokens / seconds, first, peak_bytes, len(texts) - len(answered))


def _use(port: int, model: str, user: int, load: Load) -> list[tuple[float, str]]:
    return [
        _complete(port, _body(model, user, number, load.max_tokens))
        for number in range(load.requests_per_user)
    ]


def _body(model: str, user: int, number: int, max_tokens: int) -> dict[str, object]:
    return {
        "model": model,
        "prompt": PROMPTS[(user + number) % len(PROMPTS)],
        "max_tokens": max_tokens,
        "temperature": 0.8,  # top_k and top_p of all servers are those of the model's folder
        "seed": 1000 * number + user,
        "stream": True,
    }


def _complete(port: int, body: dict[str, object]) -> tuple[float, str]:
    """Return the seconds to the first word, and the text; an empty text if the request fails."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    started_s, first_s, text = time.perf_counter(), 0.0, ""
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        data = line.removeprefix(b"data: ").strip()
        if not data.startswith(b"{"):
            continue
        event = json.loads(data)
        if not event.get("choices"):  # usage, or an error
            continue
        text += event["choices"][0]["text"]
        if not first_s and text.strip():
            first_s = time.perf_counter() - started_s
    connection.close()
    return first_s, text


@contextmanager
def _server(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server process and the port that it logs."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process, _read_port(process)
    finally:
        process.terminate()
        process.wait(timeout=120)


def _read_port(process: subprocess.Popen) -> int:
    """Read the log up to the address; a thread reads the rest, so that the pipe is never full.

    Raises:
        RuntimeError: the server ended.
    """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            threading.Thread(target=_discard, args=(process,), daemon=True).start()
            return int(match[1])
    raise RuntimeError("the server ended:\n" + "".join(lines[-20:]))


def _discard(process: subprocess.Popen) -> None:
    for _ in process.stdout:
        pass


def _peak_bytes(pid: int) -> int:
    """Return the peak resident memory of a process; 0 where the system has no /proc."""
    status = Path(f"/proc/{pid}/status")
    if not status.is_file():
        return 0
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])


def _summary(rounds: Sequence[Measured]) -> dict[str, object]:
    return {
        "tokens_per_second": Stats.of([one.tokens_per_second for one in rounds]),
        "first_word_median_s": _latency(rounds, statistics.median),
        "first_word_max_s": _latency(rounds, max),
        "peak_megabytes": Stats.of([one.peak_bytes / 1e6 for one in rounds]),
        "failed_requests": sum(one.num_failed for one in rounds),
    }


def _latency(rounds: Sequence[Measured], statistic: Callable[[list[float]], float]) -> Stats:
    return Stats.of([statistic(one.first_word_s) if one.first_word_s else 0.0 for one in rounds])


def _format_table(measured: dict[tuple[str, int], list[Measured]]) -> str:
    rows = []
    for (name, num_users), rounds in measured.items():
        summary = _summary(rounds)
        rows.append(
            [
                num_users,
                name,
                summary["tokens_per_second"].text(),
                summary["first_word_median_s"].text("{:.3f}"),
                summary["first_word_max_s"].text("{:.3f}"),
                summary["peak_megabytes"].text(),
                summary["failed_requests"],
            ]
        )
    head = [
        "users",
        "server",
        "tokens/s",
        "first word, median, s",
        "first word, longest, s",
        "peak MB",
        "failed",
    ]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
