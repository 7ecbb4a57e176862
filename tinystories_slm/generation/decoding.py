"""Decoding of our own, for our own models: many stories at once, each of its own length.

`generate()` of transformers spends most of a step of a small model in Python, and waits for the longest
story of a batch. Here a step is a few operations, and a story that has ended leaves its place to the next.
What is computed is what the model computes; `tests/generation/test_decoding.py` holds the two together.
Shapes: N stories in the works, and those of modeling_tinystories.py.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from tinystories_slm.generation import kernels
from tinystories_slm.generation.sampling import Sampling, story_die
from tinystories_slm.model import CACHE_NAME, TinyStoriesForCausalLM
from tinystories_slm.model.modeling_tinystories import rotary_angles, rotate
from tinystories_slm.native import address

logger = logging.getLogger(__name__)

Decoding = Literal["auto", "plain", "torch", "native"]
"""plain: transformers' loop. torch: ours, with torch's operations. native: ours, with kernels.c. auto: the
last of these that can decode the model."""


def choose_decoding(model: PreTrainedModel, asked: Decoding = "auto") -> tuple[Decoding, str]:
    """(The way to decode this model, why none further down the list); a way asked for is not gone beyond."""
    if asked == "plain":
        return "plain", "as asked"
    if reason := _why_plain(model):
        return "plain", reason
    if asked == "torch":
        return "torch", "as asked"
    if reason := _why_not_native(model):
        return "torch", reason
    return "native", ""


def _why_plain(model: PreTrainedModel) -> str:
    """Why only the model itself can say what it computes; empty if we can."""
    if type(model) is not TinyStoriesForCausalLM:
        return f"{type(model).__name__} is another's class"
    if {parameter.dtype for parameter in model.parameters()} - {torch.float32, torch.bfloat16}:
        return "its weights are neither float32 nor bfloat16"
    if len({(parameter.dtype, parameter.device) for parameter in model.parameters()}) != 1:
        return "its weights are of several types or on several devices"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"a hook looks at {name or 'the model'}"
        if name.endswith(("_proj", "lm_head")) and type(module) is not nn.Linear:
            return f"{name} is no plain linear layer"
        if "forward" in vars(module):
            return f"{name or 'the model'} has a forward of its own"
    return ""


def _why_not_native(model: PreTrainedModel) -> str:
    config = model.config
    if model.device.type != "cpu":
        return "the kernels are for a CPU"
    if config.hidden_act not in ("gelu_pytorch_tanh", "silu"):
        return f"no kernel for {config.hidden_act}"
    if config.head_dim > kernels.MAX_HEAD_DIM:
        return f"no kernel for a head_dim above {kernels.MAX_HEAD_DIM}"
    return "" if kernels.load_kernels(model.dtype) else "no C compiler that does it"


@dataclass
class _Layer:
    """A layer's tensors, projections of the same input as one matrix."""

    norm_1: Tensor
    norm_1_bias: Tensor | None
    qkv: Tensor  # ((H + 2K) D, C)
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor  # (C, H D)
    out_bias: Tensor | None
    norm_2: Tensor
    norm_2_bias: Tensor | None
    up: Tensor  # (I, C); modern (2 I, C), the gates first
    up_bias: Tensor | None
    down: Tensor  # (C, I)
    down_bias: Tensor | None
    keys: Tensor  # (places, K, S, D); for the kernels (places, K, S / LANES, D, LANES)
    values: Tensor  # (places, K, S, D)


class Decoder:
    """One of our models, its weights laid out for one token at a time, and a cache with a place per story.

    Matrices and cache are of the model's dtype, the residual stream and norms are float32. The weights are
    those of the moment it is made.
    """

    def __init__(self, model: TinyStoriesForCausalLM, places: int, capacity: int, way: Decoding) -> None:
        self.model, self.config, self.dtype = model, model.config, model.dtype
        config, device, inner = model.config, model.device, model.model
        self.modern = config.family == "modern"
        capacity = -(-capacity // kernels.LANES) * kernels.LANES
        self.embedding, self.head = inner.embed_tokens.weight, model.lm_head.weight
        self.positions = None if self.modern else inner.embed_positions.weight
        self.norm, self.norm_bias = self._norm(inner.norm)
        self.activation = inner.layers[0].mlp.act_fn
        self.cos = self.sin = None
        if self.modern:
            steps = torch.arange(capacity, device=device)[None]
            self.cos, self.sin = (angles[0] for angles in rotary_angles(config, steps, torch.float32))
        self.kernels = kernels.load_kernels(self.dtype) if way == "native" else None
        cache = (places, config.num_key_value_heads, capacity, config.head_dim)
        self.layers = [self._layer(layer, cache) for layer in inner.layers]
        if self.kernels:
            self._describe(capacity)

    def _norm(self, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
        bias = getattr(norm, "bias", None)
        return norm.weight.float(), None if bias is None else bias.float()

    def _layer(self, layer: nn.Module, cache: tuple[int, ...]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, qkv_bias = _as_one(attention.q_proj, attention.k_proj, attention.v_proj)
        up, up_bias = _as_one(mlp.gate_proj, mlp.up_proj) if self.modern else _as_one(mlp.up_proj)
        out, out_bias = _as_one(attention.o_proj)
        down, down_bias = _as_one(mlp.down_proj)
        norm_1, norm_1_bias = self._norm(layer.input_layernorm)
        norm_2, norm_2_bias = self._norm(layer.post_attention_layernorm)
        q_norm = k_norm = None
        if self.config.qk_norm:
            q_norm, k_norm = attention.q_norm.weight.float(), attention.k_norm.weight.float()
        # Zeros, as what a mask hides is still multiplied, by zero.
        keys, values = (torch.zeros(cache, dtype=self.dtype, device=up.device) for _ in range(2))
        if self.kernels:
            keys = keys.view(*cache[:2], -1, self.config.head_dim, kernels.LANES)
        return _Layer(
            norm_1, norm_1_bias, qkv, qkv_bias, q_norm, k_norm, out, out_bias,
            norm_2, norm_2_bias, up, up_bias, down, down_bias, keys, values,
        )  # fmt: skip

    def _describe(self, capacity: int) -> None:
        """Tell the kernels where everything is; the attributes of `self` keep it there."""
        config = self.config
        half = config.head_dim // 2
        # The kernels turn a pair by one angle, and hold it once.
        self._angles = [None if x is None else x[:, :half].contiguous() for x in (self.cos, self.sin)]
        self._records = (kernels.Layer * len(self.layers))()
        for record, layer in zip(self._records, self.layers, strict=True):
            for name, tensor in vars(layer).items():
                if tensor is not None and name.endswith("bias"):
                    tensor = tensor.float()
                    setattr(layer, f"{name}", tensor)
                setattr(record, name, address(tensor))
        tensors = (self.embedding, self.positions, *self._angles, self.norm, self.norm_bias, self.head)
        self._record = kernels.Model(
            len(self.layers), config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, config.vocab_size, capacity, self.modern,
            torch.get_num_threads(), config.norm_eps,
            *map(address, tensors), self._records,
        )  # fmt: skip
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        size = (2 + torch.get_num_threads()) * config.hidden_size + heads + 2 * config.intermediate_size
        self._scratch = torch.empty(size)
        self._logits = torch.empty(1, config.vocab_size)

    def start(self, token_ids: list[int], places: Sequence[int]) -> Tensor:
        """Read one prompt for the stories in `places`; the logits (V,) of what follows it.

        The model itself reads: a prompt is one step, however long.
        """
        ids = torch.tensor([token_ids], device=self.embedding.device)
        was_training = self.model.training
        self.model.eval()
        try:
            output = self.model(ids, use_cache=True, logits_to_keep=1)
        finally:
            self.model.train(was_training)
        for layer, read in zip(self.layers, getattr(output, CACHE_NAME).layers, strict=True):
            if self.kernels:
                padded = F.pad(read.keys, (0, 0, 0, -len(token_ids) % kernels.LANES))
                blocks = padded.unflatten(2, (-1, kernels.LANES)).transpose(3, 4)  # (1, K, blocks, D, LANES)
                layer.keys[places, :, : blocks.shape[2]] = blocks
            else:
                layer.keys[places, :, : len(token_ids)] = read.keys
            layer.values[places, :, : len(token_ids)] = read.values
        return output.logits[0, -1].float()

    def move(self, place: int, to: int) -> None:
        """Give the story in `place` another one."""
        for layer in self.layers:
            layer.keys[to], layer.values[to] = layer.keys[place], layer.values[place]

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (N, V), float32, of what follows the tokens (N,) at `positions` of the first N places."""
        if self.kernels and len(token_ids) == 1:
            self.kernels.next_logits(
                self._record, token_ids[0], positions[0], address(self._scratch), address(self._logits)
            )
            return self._logits
        device = self.embedding.device
        at = torch.tensor(positions, device=device)
        x = F.embedding(torch.tensor(token_ids, device=device), self.embedding).float()  # (N, C)
        if self.positions is not None:
            x += F.embedding(at, self.positions)
        for number, layer in enumerate(self.layers):
            qkv = self._linear(self._normed(x, layer.norm_1, layer.norm_1_bias), layer.qkv, layer.qkv_bias)
            attended = self._attend_native(number, qkv, at) if self.kernels else self._attend(layer, qkv, at)
            x += self._linear(attended, layer.out, layer.out_bias)
            inner = self._linear(self._normed(x, layer.norm_2, layer.norm_2_bias), layer.up, layer.up_bias)
            inner = self._activate_native(inner) if self.kernels else self._activate(inner)
            x += self._linear(inner, layer.down, layer.down_bias)
        return F.linear(self._normed(x, self.norm, self.norm_bias), self.head).float()

    def _normed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.modern:
            x = F.rms_norm(x, weight.shape, weight, self.config.norm_eps)
        else:
            x = F.layer_norm(x, weight.shape, weight, bias, self.config.norm_eps)
        return x.to(self.dtype)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, None if bias is None else bias.to(weight.dtype))

    def _attend_native(self, layer: int, qkv: Tensor, at: Tensor) -> Tensor:
        qkv = qkv.float()  # a copy where it is not, and the kernel uses it up in either case
        out = torch.empty(len(at), self.config.num_attention_heads * self.config.head_dim)
        self.kernels.attend(self._record, layer, len(at), address(qkv), address(at), address(out))
        return out.to(self.dtype)

    def _activate_native(self, inner: Tensor) -> Tensor:
        out = torch.empty(len(inner), self.config.intermediate_size, dtype=self.dtype)
        self.kernels.activate(self._record, len(inner), address(inner), address(out))
        return out

    def _activate(self, inner: Tensor) -> Tensor:
        if self.modern:
            gate, inner = inner.chunk(2, dim=-1)
            return self.activation(gate) * inner
        return self.activation(inner)

    def _attend(self, layer: _Layer, qkv: Tensor, at: Tensor) -> Tensor:
        config, count = self.config, len(at)
        qkv = qkv.view(count, -1, config.head_dim)  # (N, H + 2K, D)
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        query, key, value = qkv.split(sizes, dim=1)
        if layer.q_norm is not None:
            query, key = (
                F.rms_norm(x.float(), weight.shape, weight, config.norm_eps).to(self.dtype)
                for x, weight in ((query, layer.q_norm), (key, layer.k_norm))
            )
        query = query.unsqueeze(2)  # (N, H, 1, D)
        if self.cos is not None:
            cos, sin = self.cos[at, None].to(self.dtype), self.sin[at, None].to(self.dtype)  # (N, 1, D)
            query, key = rotate(query, cos, sin), rotate(key.unsqueeze(2), cos, sin).squeeze(2)
        places = torch.arange(count, device=at.device)
        layer.keys[places, :, at], layer.values[places, :, at] = key, value
        longest = int(at.max()) + 1
        keys, values = layer.keys[:count, :, :longest], layer.values[:count, :, :longest]
        seen = None
        if int(at.min()) + 1 < longest:
            seen = (torch.arange(longest, device=at.device) <= at[:, None])[:, None, None]  # (N, 1, 1, S)
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)
        return attended.reshape(count, -1)


def _as_one(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layer that does what these do, one below the other."""
    weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
    if linears[0].bias is None:
        return weight.contiguous(), None
    return weight.contiguous(), torch.cat([linear.bias for linear in linears])


@dataclass
class _Telling:
    """A story in the works."""

    number: int
    position: int
    """Of the token that was drawn last."""
    left: int
    """Tokens that may still follow."""
    die: object
    new_ids: list[int] = field(default_factory=list)


def decode(
    model: TinyStoriesForCausalLM,
    input_ids: Tensor,
    *,
    seeds: Sequence[int],
    budgets: Sequence[int],
    sampling: Sampling,
    end_ids: Sequence[int],
    batch_size: int,
    way: Decoding,
    on_token: Callable[[int], None] | None = None,
    **model_kwargs: object,
) -> Iterator[tuple[int, list[int]]]:
    """(Number of the story, its new tokens with the end token), in the order in which they end.

    Made for `model.generate(custom_generate=partial(decode, seeds=..., ...))`, with prompts `input_ids`
    (stories, T) padded on the left. Each story has a seed and a budget, the tokens that may follow its
    prompt. `batch_size` stories are told at once; waiting ones take the places of those that have ended, an
    eighth of all places at a time, as a prompt costs about as much as a step. `on_token` hears each token.
    """
    # Not among the parameters: generate() would take it for one of `decode` alone, and pass it twice.
    attention_mask = model_kwargs.get("attention_mask")
    if attention_mask is None:  # nothing is padded
        prompts = input_ids.tolist()
    else:
        prompts = [row[seen.bool()].tolist() for row, seen in zip(input_ids, attention_mask, strict=True)]
    waiting = deque(range(len(prompts)))
    capacity = max(len(prompt) + budget for prompt, budget in zip(prompts, budgets, strict=True))
    places = min(batch_size, len(prompts))
    with torch.inference_mode():
        decoder = Decoder(model, places, capacity, way)
    telling: list[_Telling] = []
    penalised = torch.zeros(places, model.config.vocab_size, dtype=torch.bool, device=model.device)
    logits = torch.empty(0, model.config.vocab_size, device=model.device)
    ends = set(end_ids)
    while waiting or telling:
        with torch.inference_mode():
            if telling:
                logits = decoder.step([one.new_ids[-1] for one in telling], [one.position for one in telling])
            if waiting and (free := places - len(telling)) >= max(1, min(places // 8, len(waiting))):
                first = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                logits = torch.cat([logits[: len(telling)], _begin(decoder, telling, first, prompts)])
                for number in first:
                    penalised[len(telling)] = False
                    telling.append(
                        _Telling(number, len(prompts[number]) - 1, budgets[number], story_die(seeds[number]))
                    )
            scores = logits[: len(telling)]
            if sampling.repetition_penalty != 1.0:
                scores = _penalise(scores, penalised[: len(telling)], sampling.repetition_penalty)
            chosen = sampling.choose(scores, [one.die for one in telling])
            if sampling.repetition_penalty != 1.0:
                penalised[: len(telling)].scatter_(1, chosen[:, None], True)
            tokens = chosen.tolist()
        ended = []
        for place, (one, token) in enumerate(zip(telling, tokens, strict=True)):
            one.new_ids.append(token)
            one.position, one.left = one.position + 1, one.left - 1
            if token in ends or one.left == 0:
                ended.append(place)
            if on_token is not None:
                on_token(token)
        done = [telling[place] for place in ended]
        for place in reversed(ended):  # the last story moves into the gap
            last = telling.pop()
            if place < len(telling):
                with torch.inference_mode():
                    decoder.move(len(telling), place)
                    penalised[place] = penalised[len(telling)]
                telling[place] = last
        for one in done:
            yield one.number, one.new_ids


def _begin(
    decoder: Decoder, telling: list[_Telling], numbers: list[int], prompts: Sequence[list[int]]
) -> Tensor:
    """Logits (len(numbers), V) of the first tokens of new stories; the same prompt is read once."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for row, number in enumerate(numbers):
        of_prompt.setdefault(tuple(prompts[number]), []).append(row)
    logits = torch.empty(len(numbers), decoder.config.vocab_size, device=decoder.embedding.device)
    for prompt, rows in of_prompt.items():
        logits[rows] = decoder.start(list(prompt), [len(telling) + row for row in rows])
    return logits


def _penalise(scores: Tensor, said: Tensor, penalty: float) -> Tensor:
    """`RepetitionPenaltyLogitsProcessor`'s scores (N, V), where `said` (N, V) marks the tokens it counts."""
    return torch.where(said, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
