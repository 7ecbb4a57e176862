"""Answers of a judge: requested once, written to disk as each arrives, and read from there afterwards."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from tinystories_slm.data.batches import iter_batches
from tinystories_slm.errors import UserError
from tinystories_slm.io.file_errors import translate_write_errors
from tinystories_slm.report_card.judge import Judge, JudgeError
from tinystories_slm.report_card.judge_prompts import JudgeRequest

logger = logging.getLogger(__name__)

_TOKENS_PER_ANSWER = 40


@dataclass(frozen=True)
class CostEstimate:
    """Requests that have no answer yet, and their tokens."""

    num_requests: int
    num_cached: int
    num_prompt_tokens: int
    num_answer_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_requests:,} requests ({self.num_cached:,} more have an answer), about "
            f"{self.num_prompt_tokens:,} tokens of prompts and {self.num_answer_tokens:,} of answers"
        )


class AnswerCache:
    """A JSON Lines file of answers, one line each, flushed to disk before the next request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._answers: dict[str, str] = {}
        self._write_lock = threading.Lock()
        self._needs_line_end = False
        if path.is_file():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        self._needs_line_end = not content.endswith(b"\n") and bool(content)
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._answers[record["key"]] = str(record["answer"])
            except (ValueError, KeyError, TypeError, RecursionError):
                logger.warning("%s has a damaged line, which is skipped", self.path)  # a killed process

    def get(self, key: str) -> str | None:
        """Return the answer, or None."""
        return self._answers.get(key)

    def add(self, key: str, judge: str, answer: str) -> None:
        """Write an answer; it is on disk when this returns."""
        line = json.dumps({"key": key, "judge": judge, "answer": answer}, ensure_ascii=True) + "\n"
        with (
            self._write_lock,
            translate_write_errors("judge_cache", self.path),
            self.path.open("ab") as file,
        ):
            file.write(b"\n" * self._needs_line_end + line.encode())
            file.flush()
            os.fsync(file.fileno())
            self._needs_line_end = False
            self._answers[key] = answer

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from judging with this file: each would pay for the same answers.

        Raises:
            UserError: another process has the file.
        """
        with translate_write_errors("judge_cache", self.path):
            try:
                with FileLock(f"{self.path}.lock", timeout=0):
                    yield
            except Timeout as error:
                raise UserError(
                    f"judge_cache ({self.path}): another process uses it; wait for it or use another path"
                ) from error


def estimate_cost(judge: str, requests: Sequence[JudgeRequest], cache: AnswerCache) -> CostEstimate:
    """Return what the requests without an answer cost."""
    missing = _missing(judge, requests, cache)
    return CostEstimate(
        num_requests=len(missing),
        num_cached=len({request.key(judge) for request in requests}) - len(missing),
        num_prompt_tokens=sum(request.num_prompt_tokens for request in missing.values()),
        num_answer_tokens=len(missing) * _TOKENS_PER_ANSWER,
    )


def collect_answers(
    judge: Judge, requests: Sequence[JudgeRequest], cache: AnswerCache, *, requests_per_minute: int
) -> list[str]:
    """Return the answer of each request; those without one are sent to the judge.

    Answers that arrive are written at once, also after a failure or Ctrl-C, so that the same command goes on.

    Raises:
        UserError: the judge gives no answer.
    """
    missing = _missing(judge.name, requests, cache)
    wait, failed = _rate_limiter(requests_per_minute), threading.Event()

    def request_answers(batch: Sequence[tuple[str, JudgeRequest]]) -> int:
        if failed.is_set():
            return 0
        if judge.is_remote:
            wait()
        try:
            answers = judge.answer([request for _, request in batch])
            for (key, _), answer in zip(batch, answers, strict=True):
                cache.add(key, judge.name, answer)
        except BaseException:
            failed.set()
            raise
        return len(batch)

    pool = ThreadPoolExecutor(judge.max_concurrency)
    try:
        batches = iter_batches(missing.items(), judge.batch_size)
        futures = [pool.submit(request_answers, batch) for batch in batches]
        with tqdm(total=len(missing), desc="judge", disable=None) as bar:
            for future in as_completed(futures):
                bar.update(future.result())
    except JudgeError as error:
        raise UserError(f"judge ({error}); the next command goes on from {cache.path}") from error
    finally:
        failed.set()
        pool.shutdown(cancel_futures=True)  # waits for requests in flight, whose answers are written
    answers = [cache.get(request.key(judge.name)) for request in requests]
    return [answer or "" for answer in answers]


def _missing(judge: str, requests: Sequence[JudgeRequest], cache: AnswerCache) -> dict[str, JudgeRequest]:
    keyed = {request.key(judge): request for request in requests}
    return {key: request for key, request in keyed.items() if cache.get(key) is None}


def _rate_limiter(requests_per_minute: int) -> Callable[[], None]:
    """Return a function that blocks until the next request may start."""
    lock, interval_s, next_start = threading.Lock(), 60.0 / requests_per_minute, [0.0]

    def wait() -> None:
        with lock:
            start = max(time.monotonic(), next_start[0])
            next_start[0] = start + interval_s
        time.sleep(max(0.0, start - time.monotonic()))

    return wait
