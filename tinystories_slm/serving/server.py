"""The serve command: load the model, allocate the cache, listen until a signal arrives."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from importlib import import_module

import psutil
import torch
from transformers import PreTrainedModel

from tinystories_slm.config.command_args.serve import ServeArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.errors import UserError
from tinystories_slm.generation.decoder import Decoder, cache_bytes, resolve_backend
from tinystories_slm.generation.request import context_length, prompt_token_ids
from tinystories_slm.generation.sampling import request_rng
from tinystories_slm.generation.slot_batch import ActiveSequence, SlotBatch
from tinystories_slm.io.units import format_bytes
from tinystories_slm.model_folder import load_model_folder
from tinystories_slm.text_boundaries import suppressed_token_ids

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "TINYSTORIES_API_KEY"
# For a client that does not read the end of its response.
_CLOSE_TIMEOUT_S = 2
_LOOPBACK = ("127.", "localhost", "::1")


def serve(args: ServeArgs) -> None:
    """Serve `args.model` until SIGTERM or Ctrl-C, then finish the requests that were accepted.

    Raises:
        UserError: a package is missing, the engine does not support the model, the cache exceeds the memory,
            or the address is in use.
    """
    _require_packages("starlette", "uvicorn", "pydantic")
    from tinystories_slm.serving.app import App
    from tinystories_slm.serving.requests import ServedModel
    from tinystories_slm.serving.scheduler import Scheduler

    api_key = _read_api_key()
    model, tokenizer = load_model_folder(
        args.model, revision=args.revision, device=args.device, dtype=args.dtype
    )
    batch = _build_batch(args, model, suppressed_token_ids(model, tokenizer))
    _warm_up(batch, prompt_token_ids(model, tokenizer, "Once"))
    served = ServedModel(
        name=args.served_model_name or args.model,
        model=model,
        tokenizer=tokenizer,
        max_tokens=args.max_tokens,
        max_choices=args.max_waiting,
    )
    app = App(served, Scheduler(batch, args.max_waiting), api_key, args.max_body_bytes)
    with _listen(args.host, args.port) as listener:
        _log_address(args, listener, served.name, has_key=api_key is not None)
        _run(app, listener, args.shutdown_timeout_s)
    if app.has_failed:
        raise SystemExit(1)


def _require_packages(*modules: str) -> None:
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise UserError(f"{module} is not installed; pip install 'tinystories_slm[serve]'") from error


def _read_api_key() -> str | None:
    """Return the key that clients must send; None if the environment has none.

    Raises:
        UserError: the variable is set and empty, which a script may do by mistake.
    """
    api_key = os.environ.get(API_KEY_VARIABLE)
    if api_key is not None and not api_key.strip():
        raise UserError(f"{API_KEY_VARIABLE} (''): must not be empty; set a key or unset the variable")
    return api_key


def _build_batch(args: ServeArgs, model: PreTrainedModel, suppressed_ids: list[int]) -> SlotBatch:
    """Allocate the slots; their memory is all that keys and values ever take.

    Raises:
        UserError: the engine does not support the model, or the memory is too small.
    """
    backend, reason = resolve_backend(model, args.backend)
    if backend == "hf":
        raise UserError(
            f"model ({args.model}): {reason}; use `transformers serve {args.model}`, or the custom form"
        )
    context = context_length(model)
    num_bytes = cache_bytes(model.config, args.num_slots, context, model.dtype)
    available = psutil.virtual_memory().available
    if model.device.type == "cpu" and num_bytes > available:
        raise UserError(
            f"num_slots ({args.num_slots}): keys and values need {format_bytes(num_bytes)}, and "
            f"{format_bytes(available)} are available; use at most {args.num_slots * available // num_bytes}"
        )
    with torch.inference_mode():
        decoder = Decoder(model, args.num_slots, context, backend)
    logger.info(
        "model %s on %s, backend %s%s, %s: %d slots of %d tokens, %s for keys and values",
        args.model, model.device, backend, f" ({reason})" if reason else "", args.dtype,
        args.num_slots, context, format_bytes(num_bytes),
    )  # fmt: skip
    return SlotBatch(decoder, args.num_slots, suppressed_ids)


def _warm_up(batch: SlotBatch, prompt_ids: list[int]) -> None:
    """Generate two tokens, so that the first request does not wait for what the libraries do once."""
    batch.advance([ActiveSequence(0, prompt_ids, 2, request_rng(0), SamplingParams())])
    batch.advance()
    batch.retire(lambda _: True)


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host` and `port`.

    Raises:
        UserError: the address does not exist or is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"host ({host}) and port ({port}): cannot listen ({error.strerror}); use another port, or 0"
        ) from error


def _log_address(args: ServeArgs, listener: socket.socket, name: str, *, has_key: bool) -> None:
    port = listener.getsockname()[1]
    host = f"[{args.host}]" if ":" in args.host else args.host
    if not args.host.startswith(_LOOPBACK) and not has_key:
        logger.warning(
            "host (%s) accepts connections from other machines without a key; set %s",
            args.host, API_KEY_VARIABLE,
        )  # fmt: skip
    logger.info("serving %s at http://%s:%d/v1", name, host, port)


def _run(app: "App", listener: socket.socket, shutdown_timeout_s: int) -> None:  # noqa: F821
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Stop at the first signal; the original raises the signal again afterwards: no exit code 0."""
            numbers = (signal.SIGINT, signal.SIGTERM)
            previous = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in previous.items():
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            timer = asyncio.get_running_loop().call_later(shutdown_timeout_s, app.end_requests)
            await super().shutdown(sockets)
            timer.cancel()

        def stop(self) -> None:
            self.should_exit = True

    config = uvicorn.Config(
        app.build(),
        log_config=None,
        log_level="warning",
        access_log=False,  # prompts and addresses of users are not logged
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=shutdown_timeout_s + _CLOSE_TIMEOUT_S,
    )
    server = Server(config)
    app.on_failure = server.stop
    server.run(sockets=[listener])
