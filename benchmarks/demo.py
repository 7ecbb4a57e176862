"""Measure the page under load: users at once on the CPU, time to the first word, peak memory.

    python benchmarks/demo.py --model runs/quickstart/best --users 50

The server is a process of its own. Each user sends one request over HTTP and reads the stream; all start at
the same time. Every story is compared with the one that the generation engine gives for its prompt and seed.
"""

import argparse
import asyncio
import html
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from harness import ROOT, Stats, provenance

from tinystories_slm.generation import generate_texts
from tinystories_slm.model_folder import load_model_folder

OPTIONS = {"max_new_tokens": 200, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
LIBRARIES = ("gradio", "torch", "transformers")


def prompt_of(user: int) -> str:
    """Return the prompt of a user, which no other user has."""
    return f"Once upon a time there were {user + 2} foxes"


async def visit(client: httpx.AsyncClient, user: int) -> dict[str, object]:
    """Send the request of `user`; return its story and the seconds to its first new word and to its end."""
    started_s = time.perf_counter()
    data = [prompt_of(user), *OPTIONS.values(), str(user)]
    joined = await client.post("call/generate", json={"data": data})
    if joined.is_error:
        return {"error": joined.text}
    first_word_s = event = last = None
    async with client.stream("GET", f"call/generate/{joined.json()['event_id']}") as stream:
        async for line in stream.aiter_lines():
            name, _, value = line.partition(": ")
            event = value if name == "event" else event
            if name == "data" and value != "null":
                last = json.loads(value)
                if first_word_s is None and len(shown_text(last[-1])) > len(prompt_of(user)):
                    first_word_s = time.perf_counter() - started_s
    if event != "complete":
        return {"error": str(last)}
    return {"html": last[-1], "first_word_s": first_word_s, "seconds": time.perf_counter() - started_s}


def shown_text(story: str) -> str:
    """Return the text of a story in the page."""
    return html.unescape(re.sub("<[^>]*>", "", story)).strip()


def story_ids(story: str) -> list[int]:
    """Return the token ids of a finished story."""
    [data] = re.findall('data-story="(.*?)"', story)
    return json.loads(html.unescape(data))["ids"]


async def visit_at_once(address: str, num_users: int, server: psutil.Process) -> tuple[list[dict], int]:
    """Return the outcome of each user and the largest resident memory of the server in bytes."""
    limits = httpx.Limits(max_connections=2 * num_users)
    async with httpx.AsyncClient(base_url=f"{address}gradio_api/", timeout=3600, limits=limits) as client:
        visits = asyncio.gather(*(visit(client, user) for user in range(num_users)))
        peak = 0
        while not visits.done():
            peak = max(peak, server.memory_info().rss)
            await asyncio.sleep(0.02)
        return await visits, peak


def measure(model: str, num_users: int, concurrency: int) -> dict[str, object]:
    """Start the page, let `num_users` generate at once, and return the figures."""
    flags = [f"--model={model}", f"--concurrency={concurrency}", f"--queue_size={num_users}"]
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *flags, "--device=cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            server = psutil.Process(process.pid)
            idle = server.memory_info().rss
            cpu_s = sum(server.cpu_times()[:2])
            outcomes, peak = asyncio.run(visit_at_once(address, num_users, server))
            cpu_s = sum(server.cpu_times()[:2]) - cpu_s
        finally:
            process.terminate()
    return {
        "users": num_users,
        "concurrency": concurrency,
        "errors": [one["error"] for one in outcomes if "error" in one],
        "wrong_stories": count_wrong_stories(model, outcomes),
        "first_word_s": vars(Stats.of([one["first_word_s"] for one in outcomes if "html" in one])),
        "story_s": vars(Stats.of([one["seconds"] for one in outcomes if "html" in one])),
        "server_cpu_s": round(cpu_s, 2),
        "idle_bytes": idle,
        "peak_bytes": peak,
    }


def count_wrong_stories(folder: str, outcomes: list[dict]) -> int:
    """Return the number of stories that differ from those of the engine for the same prompt and seed."""
    model, tokenizer = load_model_folder(folder, device="cpu")
    wrong = 0
    for user, one in enumerate(outcomes):
        if "html" in one:
            text = tokenizer.decode(story_ids(one["html"]), skip_special_tokens=True)
            wrong += text != generate_texts(model, tokenizer, [prompt_of(user)], seed=user, **OPTIONS)[0]
    return wrong


def main() -> None:
    """Measure each number of users, print the figures and write them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model folder or Hub id")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 50], help="users at once")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[2], help="option of the page")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    results = []
    for concurrency in args.concurrency:
        for num_users in args.users:
            results.append(measure(args.model, num_users, concurrency))
            print(json.dumps(results[-1]), flush=True)
    if args.output is not None:
        record = provenance(LIBRARIES) | {"options": OPTIONS, "results": results}
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
