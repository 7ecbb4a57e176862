"""Generate text for a batch of requests, with transformers' loop or with the loop of `slot_batch.py`."""

import copy
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
)

from tinystories_slm.config.command_args.generate import Backend
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.generation.decoder import resolve_backend
from tinystories_slm.generation.request import (
    GenerationRequest,
    GenerationResult,
    make_result,
    prepare_requests,
)
from tinystories_slm.generation.sampling import logits_processors
from tinystories_slm.generation.slot_batch import decode
from tinystories_slm.text_boundaries import stop_token_ids, suppressed_token_ids


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    backend: Backend = "auto",
) -> list[str]:
    """Return each prompt with its completion, all generated in one batch.

    A completion ends at a stop token, after `max_new_tokens`, or where the model's context is full. Prompt i
    uses seed + i, and neither the other prompts nor the batch size change its text. The caller's random state
    does not change. `SamplingParams` documents the sampling parameters, `Backend` the backends.

    Raises:
        UserError: a sampling parameter is out of range, or a prompt fills the context.
    """
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    first_seed = secrets.randbelow(2**31) if seed is None else seed
    seeds = range(first_seed, first_seed + len(prompts))
    requests = prepare_requests(model, tokenizer, prompts, seeds, sampling)
    results = generate_batch(
        model, tokenizer, requests, sampling, batch_size=max(1, len(prompts)), backend=backend
    )
    return [result.text for result in results]


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    sampling: SamplingParams,
    *,
    batch_size: int,
    finish_sentence: bool = False,
    backend: Backend = "auto",
) -> Iterator[GenerationResult]:
    """Generate `batch_size` texts at the same time; yield results in request order, each as soon as possible.

    With `finish_sentence`, a text that reached its length limit is cut after its last complete sentence, if
    that sentence ends after the prompt.
    """
    if not requests:
        return
    stop_ids = stop_token_ids(model, tokenizer)
    backend, _ = resolve_backend(model, backend)
    if backend == "hf":
        outputs = _run_hf_batches(model, tokenizer, requests, sampling, stop_ids, batch_size)
    else:
        finished = run_decoder(
            model, tokenizer, requests, sampling, stop_ids, batch_size=batch_size, backend=backend
        )
        outputs = _in_request_order(finished)
    for request, new_ids in zip(requests, outputs, strict=True):
        yield make_result(tokenizer, request, new_ids, stop_ids, finish_sentence=finish_sentence)


def _in_request_order(finished: Iterable[tuple[int, list[int]]]) -> Iterator[list[int]]:
    """Yield the outputs 0, 1, ... of (index, output) pairs that arrive in any order."""
    early: dict[int, list[int]] = {}
    next_index = 0
    for index, new_ids in finished:
        early[index] = new_ids
        while next_index in early:
            yield early.pop(next_index)
            next_index += 1


def run_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[GenerationRequest],
    sampling: SamplingParams,
    stop_ids: list[int],
    **options: object,
) -> Tensor:
    """Generate one batch with transformers' loop; `options` go to `model.generate`.

    All requests of the batch must have the same `max_new_tokens`.

    Returns:
        New token ids (len(batch), T), T at most `max_new_tokens`, padded after a stop token.
    """
    prompts = _left_pad(model, tokenizer, batch, stop_ids)
    longest = prompts["input_ids"].shape[1]
    processors = logits_processors(sampling, [request.seed for request in batch], longest)
    if suppressed_ids := suppressed_token_ids(model, tokenizer):
        processors.insert(0, SuppressTokensLogitsProcessor(suppressed_ids, device=model.device))
    config = _generation_config(tokenizer, stop_ids, batch[0].max_new_tokens)
    with _evaluation_mode(model, config) as view, torch.no_grad():
        output_ids = view.generate(**prompts, logits_processor=processors, **options)
    return output_ids[:, longest:]


def _run_hf_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    sampling: SamplingParams,
    stop_ids: list[int],
    batch_size: int,
) -> Iterator[list[int]]:
    for batch in _group_for_padding(requests, batch_size):
        yield from run_hf(model, tokenizer, batch, sampling, stop_ids).tolist()


def _group_for_padding(
    requests: Sequence[GenerationRequest], batch_size: int
) -> Iterator[list[GenerationRequest]]:
    """Split `requests` into batches of at most `batch_size`, in order.

    transformers generates until the longest prompt of a batch fills the context. Prompts of different length
    therefore share a batch only if all have the same `max_new_tokens`; otherwise short ones lose tokens.
    """
    batch: list[GenerationRequest] = []
    for request in requests:
        lengths = {len(member.token_ids) for member in [*batch, request]}
        limits = {member.max_new_tokens for member in [*batch, request]}
        if batch and (len(batch) == batch_size or (len(lengths) > 1 and len(limits) > 1)):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def run_decoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    sampling: SamplingParams,
    stop_ids: list[int],
    *,
    batch_size: int,
    backend: Backend,
    on_token: Callable[[int], None] | None = None,
    streamer: TextIteratorStreamer | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Generate with `decode`, called through `model.generate`; `backend` is `torch` or `cpu`.

    Returns:
        Iterator over (index of the request, its new token ids), in the order in which requests finish.
    """
    loop = partial(
        decode,
        seeds=[request.seed for request in requests],
        new_token_limits=[request.max_new_tokens for request in requests],
        sampling=sampling,
        stop_ids=stop_ids,
        suppressed_ids=suppressed_token_ids(model, tokenizer),
        batch_size=batch_size,
        backend=backend,
        on_token=on_token,
    )
    # generate() checks the longest prompt against this limit; `decode` applies the limit of each request.
    config = _generation_config(tokenizer, stop_ids, min(request.max_new_tokens for request in requests))
    with _evaluation_mode(model, config) as view:
        return view.generate(
            **_left_pad(model, tokenizer, requests, stop_ids), custom_generate=loop, streamer=streamer
        )


def _left_pad(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    stop_ids: list[int],
) -> dict[str, Tensor]:
    """Return input_ids and attention_mask, both (len(requests), longest prompt).

    Padding is on the left, so that each completion directly follows its prompt.
    """
    longest = max(len(request.token_ids) for request in requests)
    pads = [longest - len(request.token_ids) for request in requests]
    pad_id = _pad_token_id(tokenizer, stop_ids)
    rows = [[pad_id] * pad + request.token_ids for pad, request in zip(pads, requests, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    return {
        "input_ids": torch.tensor(rows, device=model.device),
        "attention_mask": torch.tensor(mask, device=model.device),
    }


def _pad_token_id(tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, stop_ids: list[int], max_new_tokens: int
) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,  # the logits processor has already sampled; argmax returns its token
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=_pad_token_id(tokenizer, stop_ids),
    )


@contextmanager
def _evaluation_mode(model: PreTrainedModel, config: GenerationConfig) -> Iterator[PreTrainedModel]:
    """Disable dropout; yield a shallow copy of the model whose `generation_config` is `config`.

    transformers would merge the model's own defaults (beams, penalties, temperature) into the call. A copy
    shares weights and modules, and several threads can generate with one model: if they replaced its
    `generation_config`, a text could end at the limit of another one.
    """
    view = copy.copy(model)
    view.generation_config = config
    was_training = model.training
    if was_training:
        model.eval()
    try:
        yield view.eval()
    finally:
        if was_training:
            model.train()
