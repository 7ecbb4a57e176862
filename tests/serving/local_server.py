"""A server on loopback in a thread of the test's process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import torch
import uvicorn

from tinystories_slm.generation.decoder import Decoder, resolve_backend
from tinystories_slm.generation.request import context_length
from tinystories_slm.generation.slot_batch import SlotBatch
from tinystories_slm.serving.app import App
from tinystories_slm.serving.requests import ServedModel
from tinystories_slm.serving.scheduler import Scheduler
from tinystories_slm.serving.server import _listen
from tinystories_slm.text_boundaries import suppressed_token_ids

NAME = "tiny"


class LocalServer:
    """The application, its address, and clients of it."""

    def __init__(self, app: App, address: str) -> None:
        self.app, self.address = app, address
        self.scheduler = app.scheduler

    def client(self, **options) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 120} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", **options)

    def wait_until_idle(self) -> None:
        self.wait_until(lambda: not (self.scheduler.num_running or self.scheduler.num_waiting))

    def wait_until(self, condition) -> None:
        for _ in range(3000):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("the condition did not become true in 30 s")


@contextmanager
def local_server(
    model, tokenizer, *, num_slots: int = 4, max_waiting: int = 64, max_tokens: int | None = None,
    api_key: str | None = None, max_body_bytes: int = 100_000,
) -> Iterator[LocalServer]:  # fmt: skip
    with torch.inference_mode():
        decoder = Decoder(model, num_slots, context_length(model), resolve_backend(model)[0])
    batch = SlotBatch(decoder, num_slots, suppressed_token_ids(model, tokenizer))
    served = ServedModel(NAME, model, tokenizer, max_tokens, max_waiting)
    app = App(served, Scheduler(batch, max_waiting), api_key, max_body_bytes)
    config = uvicorn.Config(app.build(), log_config=None, timeout_graceful_shutdown=5, ws="none")
    server = uvicorn.Server(config)
    with _listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield LocalServer(app, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
