"""Text generation: requests, sampling, decoding backends and streaming."""

from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.engine import generate_batch, generate_texts
from tinystories_slm.generation.request import GenerationResult, prepare_requests
from tinystories_slm.generation.streaming import TextStream

__all__ = [
    "GenerationResult",
    "SamplingParams",
    "TextStream",
    "generate_batch",
    "generate_texts",
    "prepare_requests",
]
