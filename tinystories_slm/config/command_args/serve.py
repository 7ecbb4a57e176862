"""Options of the serve command."""

from dataclasses import dataclass
from typing import Literal

from tinystories_slm.config.command_args.generate import Backend
from tinystories_slm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Serve a model over HTTP with OpenAI's interface: completions of many users in one batch."""

    model: str
    """Model folder (RUN/best) or Hub id of a model of this project."""
    served_model_name: str | None = None
    """Name that clients send as `model`; null for the value of `model`."""
    host: str = "127.0.0.1"
    """Address to listen on; the default accepts connections from this machine only."""
    port: int = 8000
    """Port to listen on; 0 selects a free one, which the log names."""
    num_slots: int = 64
    """Completions that are generated at the same time; each slot has memory for one context."""
    max_waiting: int = 256
    """Completions that wait for a slot; a request that exceeds this number is rejected with status 429."""
    max_tokens: int | None = None
    """New tokens of a completion, at most; null for the rest of the model's context."""
    max_body_bytes: int = 1_000_000
    """Bytes of a request, at most."""
    shutdown_timeout_s: int = 30
    """Seconds for the requests that are not finished when SIGTERM or Ctrl-C arrives."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the model; auto uses cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of weights, keys and values; bfloat16 halves the memory and generates other text."""
    backend: Backend = "auto"
    """Generation loop: torch, or cpu with compiled kernels; auto uses cpu if it supports the model."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    def __post_init__(self) -> None:
        for name in ("num_slots", "max_waiting", "max_tokens", "max_body_bytes", "shutdown_timeout_s"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) must be at least 1")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port ({self.port}) must be between 0 and 65535")
        if self.backend == "hf":
            raise UserError(
                "backend (hf): cannot add requests to a running batch; use auto, or `transformers serve`"
            )
        if self.served_model_name == "":
            raise UserError("served_model_name ('') must not be empty; set a name or omit it")
