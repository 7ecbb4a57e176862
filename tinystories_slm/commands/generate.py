"""The generate command: print completions of prompts and write them to a JSONL file."""

import json
import logging
import secrets
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tinystories_slm.config.command_args.generate import GenerateArgs
from tinystories_slm.config.sampling_params import SamplingParams
from tinystories_slm.data.chat_template import has_block_template
from tinystories_slm.generation import GenerationResult, TextStream, generate_batch, prepare_requests
from tinystories_slm.generation.decoder import resolve_backend
from tinystories_slm.generation.prompts import block_prompt, default_prompt, read_prompts
from tinystories_slm.generation.request import GenerationRequest
from tinystories_slm.io.atomic import atomic_write, write_output
from tinystories_slm.io.file_errors import expand_user, translate_write_errors
from tinystories_slm.model_folder import load_model_folder, resolve_model, weights_sha256

logger = logging.getLogger(__name__)

_SEPARATOR = "\n\n---\n\n"
# Requests in memory at a time. At the end of each block the batch runs empty, so it holds many batches.
_BLOCK_SIZE = 16_384


def generate(args: GenerateArgs) -> list[GenerationResult]:
    """Print `args.num_stories` completions of each prompt, and write them to `args.output`.

    Raises:
        UserError: prompts or model cannot be loaded, or a prompt fills the model's context.
    """
    prompts = _read_prompts(args)
    model, tokenizer = load_model_folder(
        args.model,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        device=args.device,
        dtype=args.dtype,
    )
    if prompts is None:
        prompts = [default_prompt(tokenizer)]
    if args.block_options() and not has_block_template(tokenizer):
        logger.warning(
            "model %s has no chat template for blocks, so it was probably not trained on prompts with %s",
            args.model,
            ", ".join(args.block_options()),
        )
    first_seed = secrets.randbelow(10_000) if args.seed is None else args.seed
    seeds = range(first_seed, first_seed + args.num_stories)
    backend, reason = resolve_backend(model, args.backend)
    logger.info(
        "model %s on %s, seed %s, backend %s%s, %s, %d threads",
        args.model, model.device, first_seed, backend, f" ({reason})" if reason else "", args.dtype,
        torch.get_num_threads(),
    )  # fmt: skip
    prepared = prepare_requests(model, tokenizer, prompts, [first_seed] * len(prompts), args.sampling())
    # A generator: a list of 10^12 requests would not fit into memory.
    requests = (replace(request, seed=seed) for request in prepared for seed in seeds)
    print_results = _print_stream if args.stream else _print_batch
    folder = resolve_model(args.model, args.revision).name
    weights = weights_sha256(expand_user(folder)) if args.output is not None else None
    results = []
    with (
        _open_output(args.output) as file,
        closing(print_results(model, tokenizer, requests, args)) as printed,
    ):
        for result in printed:
            if file is not None:
                file.write(_to_json_line(result, args.model, weights, args.sampling()))
                file.flush()
            results.append(result)
    if args.output is not None:
        logger.info("wrote %d completions to %s", len(results), args.output)
    return results


def _read_prompts(args: GenerateArgs) -> list[str] | None:
    """Return the prompts of the options; None for the default one."""
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if options := args.block_options():
        return [block_prompt(options)]
    return None if args.prompt is None else [args.prompt]


def write_results(
    path: Path, results: Iterable[GenerationResult], model: str, weights: str | None, sampling: SamplingParams
) -> None:
    """Replace the JSONL file `path` by one line per result of `model`; `weights` is its `weights_sha256`.

    After an error the earlier file stays: some of the results would pass for all of them.
    """
    lines = [_to_json_line(result, model, weights, sampling) for result in results]
    write_output(path, "".join(lines))


def _to_json_line(result: GenerationResult, model: str, weights: str | None, sampling: SamplingParams) -> str:
    """Return the line of stories.jsonl: the text and the options that generate it again."""
    record = {
        "prompt": result.prompt,
        "story": result.text,
        "model": model,
        "weights_sha256": weights,  # null for a model of the Hub
        "seed": result.seed,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "num_new_tokens": result.num_new_tokens,
        "finished": result.finish_reason == "stop",  # a key of published model cards
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _print_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Iterator[GenerationRequest],
    args: GenerateArgs,
) -> Iterator[GenerationResult]:
    """Generate in batches of `args.batch_size`; yield and print each result as soon as it is complete."""
    results = chain.from_iterable(
        generate_batch(
            model,
            tokenizer,
            block,
            args.sampling(),
            batch_size=args.batch_size,
            finish_sentence=args.finish_sentence,
            backend=args.backend,
        )
        for block in iter(lambda: list(islice(requests, _BLOCK_SIZE)), [])
    )
    for index, result in enumerate(results):
        yield result  # before it is printed: a file keeps what standard output cannot take
        print(_SEPARATOR if index else "", result.text, sep="", end="", flush=True)
    print(flush=True)


def _print_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Iterator[GenerationRequest],
    args: GenerateArgs,
) -> Iterator[GenerationResult]:
    """Generate one request after another; print the text in pieces and yield each result at its end."""
    for index, request in enumerate(requests):
        print(_SEPARATOR if index else "", end="")
        stream = TextStream(
            model,
            tokenizer,
            request,
            args.sampling(),
            finish_sentence=args.finish_sentence,
            backend=args.backend,
        )
        with closing(iter(stream)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
        yield stream.result
    print(flush=True)


@contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO | None]:
    """Open a temporary file that replaces `path` at the end; yield None if `path` is None.

    After an interruption the lines written so far replace `path`. A file without lines, or one for which the
    disk has no space, does not.

    Raises:
        UserError: the file cannot be written.
    """
    if path is None:
        yield None
        return
    interruption = None
    with (
        suppress(_NoLines),
        translate_write_errors("output", path),
        atomic_write(path) as partial,
        partial.open("w", encoding="utf-8") as file,
    ):
        try:
            yield file
        except BaseException as error:
            interruption = error
            if not file.tell():
                raise _NoLines from None
    if interruption is not None:
        raise interruption


class _NoLines(Exception):
    """An interruption before the first line."""
