"""The server over HTTP on loopback, with the client of OpenAI."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import tiny_model
from serving.local_server import NAME, LocalServer, local_server

from tinystories_slm.data.chat_template import CHAT_TEMPLATE
from tinystories_slm.generation import SamplingParams, generate_batch, generate_texts, prepare_requests

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def model(tokenizer):
    """A model that generates letters, blanks and the stop token; rarely the latter."""
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0)
    return with_alphabet(model, tokenizer)


@pytest.fixture(scope="module")
def endless(tokenizer):
    """A model of long texts without a stop token."""
    model = tiny_model(vocab_size=len(tokenizer), family="llama", max_position_embeddings=20_000)
    model = with_alphabet(model, tokenizer)
    model.generation_config.suppress_tokens.append(tokenizer.eos_token_id)
    return model


def with_alphabet(model, tokenizer):
    """Let the model generate only tokens of letters and blanks: other bytes are not characters."""
    allowed = {tokenizer.eos_token_id}
    allowed |= {
        token for token in range(len(tokenizer)) if tokenizer.decode([token]).replace(" ", "a").isalpha()
    }
    model.generation_config.suppress_tokens = [t for t in range(len(tokenizer)) if t not in allowed]
    return model


@pytest.fixture(scope="module")
def server(model, tokenizer) -> Iterator[LocalServer]:
    with local_server(model, tokenizer, num_slots=16, max_tokens=40) as server:
        yield server


@pytest.fixture
def long_server(endless, tokenizer) -> Iterator[LocalServer]:
    with local_server(endless, tokenizer, num_slots=2, max_waiting=2) as server:
        yield server


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return server.client()


def text_alone(model, tokenizer, prompt: str, seed: int, **options) -> str:
    """Completion of `generate.py`, which has no other request beside it."""
    [text] = generate_texts(model, tokenizer, [prompt], seed=seed, **options)
    return text[len(prompt) :]


def test_a_seed_gives_the_text_of_generate(client, model, tokenizer):
    response = client.completions.create(model=NAME, prompt=PROMPT, seed=7, max_tokens=30)
    [choice] = response.choices
    assert choice.text == text_alone(model, tokenizer, PROMPT, 7, max_new_tokens=30)
    assert (response.object, response.model, choice.index) == ("text_completion", NAME, 0)
    num_prompt_tokens = len(tokenizer(PROMPT).input_ids) + 1  # the start token
    usage = response.usage
    assert (usage.prompt_tokens, usage.total_tokens - usage.completion_tokens) == (num_prompt_tokens,) * 2
    assert usage.completion_tokens <= 30


def test_fifty_users_get_the_texts_that_they_get_alone(client, server, model, tokenizer):
    """Each has its own seed, prompt, sampling parameters and length; every second one streams."""
    samplings = [
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.2},
    ]
    users = [
        {"prompt": PROMPT[: user % 17], "seed": user, "max_tokens": 5 + user % 20, **samplings[user % 3]}
        for user in range(50)
    ]

    def ask(user: int) -> tuple[str, str]:
        options = users[user]
        extra = {name: options[name] for name in ("top_k", "repetition_penalty") if name in options}
        plain = {name: value for name, value in options.items() if name not in extra}
        if user % 2:
            parts = list(client.completions.create(model=NAME, **plain, extra_body=extra, stream=True))
            return "".join(part.choices[0].text for part in parts), parts[-1].choices[0].finish_reason
        [choice] = client.completions.create(model=NAME, **plain, extra_body=extra).choices
        return choice.text, choice.finish_reason

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert len(set(answers)) > 45
    for options, answer in zip(users, answers, strict=True):
        names = {"max_tokens": "max_new_tokens"}
        sampling = SamplingParams(
            **{names.get(name, name): v for name, v in options.items() if name not in ("prompt", "seed")}
        )
        requests = prepare_requests(model, tokenizer, [options["prompt"]], [options["seed"]], sampling)
        [alone] = generate_batch(model, tokenizer, requests, sampling, batch_size=1)
        assert answer == (alone.text[len(options["prompt"]) :], alone.finish_reason)
    server.wait_until_idle()
    assert server.scheduler.batch.num_free_slots == 16


def test_choices_of_several_prompts_have_the_seeds_of_generate(client, model, tokenizer):
    prompts = ["A fox", "The"]
    response = client.completions.create(model=NAME, prompt=prompts, n=3, seed=5, max_tokens=6)
    assert [choice.index for choice in response.choices] == list(range(6))
    expected = [text_alone(model, tokenizer, p, 5 + n, max_new_tokens=6) for p in prompts for n in range(3)]
    assert [choice.text for choice in response.choices] == expected
    assert response.usage.prompt_tokens == sum(len(tokenizer(prompt).input_ids) + 1 for prompt in prompts)


def test_token_ids_are_read_as_they_are(client, model, tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer("A fox").input_ids]
    texts = [
        client.completions.create(model=NAME, prompt=prompt, seed=1, max_tokens=9).choices[0].text
        for prompt in ("A fox", ids, [ids], ids[1:])
    ]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_without_a_seed_two_texts_differ(client):
    first, second = (
        client.completions.create(model=NAME, prompt="", max_tokens=30, temperature=1.0).choices[0].text
        for _ in range(2)
    )
    assert first != second


def test_a_stream_has_the_text_in_parts_usage_and_an_end(client, server):
    options = {"model": NAME, "prompt": ["A fox", "The"], "seed": 2, "max_tokens": 12}
    whole = client.completions.create(**options)
    parts = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for index, choice in enumerate(whole.choices):
        own = [part.choices[0] for part in parts[:-1] if part.choices[0].index == index]
        assert "".join(part.text for part in own) == choice.text
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert len({part.id for part in parts}) == 1

    with httpx.stream(
        "POST", f"{server.address}/v1/completions", json=options | {"stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"


def test_a_stop_string_across_tokens_is_never_sent(client, tokenizer):
    options = {"model": NAME, "prompt": PROMPT, "seed": 11, "max_tokens": 40}
    text = client.completions.create(**options).choices[0].text
    at = len(text) // 2
    stop = text[at : at + 6]
    assert len(tokenizer(stop).input_ids) > 1
    for stops in (stop, ["#", stop]):
        [choice] = client.completions.create(**options, stop=stops).choices
        assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
        parts = [part.choices[0] for part in client.completions.create(**options, stop=stops, stream=True)]
        assert "".join(part.text for part in parts) == choice.text and parts[-1].finish_reason == "stop"
    usage = client.completions.create(**options, stop=stop).usage
    assert usage.completion_tokens < 40  # the slot is free as soon as the string is complete


def test_parts_of_a_stream_are_utf8(tokenizer):
    """A model of two-byte characters: each token is half of one."""
    model = tiny_model(vocab_size=len(tokenizer), scale=4.0)
    halves = {token for char in "éèêëàâîïôöùûüçñ" for token in tokenizer(char).input_ids}
    model.generation_config.suppress_tokens = [t for t in range(len(tokenizer)) if t not in halves]
    with local_server(model, tokenizer) as server:
        options = {"model": NAME, "prompt": "é", "seed": 0, "max_tokens": 30}
        whole = server.client().completions.create(**options).choices[0].text
        stream = server.client().completions.create(**options, stream=True)
        parts = [part.choices[0].text for part in stream]
    assert "".join(parts) == whole == text_alone(model, tokenizer, "é", 0, max_new_tokens=30)
    assert len(parts) > 1 and any(character.isalpha() for character in whole)


def test_logprobs_and_echo_describe_prompt_and_text(client, model, tokenizer):
    options = {"model": NAME, "prompt": "A fox", "seed": 4, "max_tokens": 8, "logprobs": 2}
    [plain] = client.completions.create(**options).choices
    [choice] = client.completions.create(**options, echo=True).choices
    assert choice.text == "A fox" + plain.text
    ids = [tokenizer.eos_token_id, *tokenizer("A fox").input_ids]
    scores = choice.logprobs
    assert scores.tokens[: len(ids)] == [tokenizer.decode([token]) for token in ids]
    assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
    assert plain.logprobs.tokens == scores.tokens[len(ids) :]
    assert plain.logprobs.token_logprobs == scores.token_logprobs[len(ids) :]
    assert "".join(scores.tokens[1:]) == choice.text
    for token, offset in zip(scores.tokens[1:], scores.text_offset[1:], strict=True):
        assert choice.text[offset : offset + len(token)] == token
    for logprob, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:], strict=True):
        assert len(top) == 2 and logprob <= max(top.values())
    logits = model(tokenizer("A fox", return_tensors="pt").input_ids.new_tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    assert scores.token_logprobs[1 : len(ids)] == pytest.approx(expected.tolist(), abs=1e-4)

    parts = [part.choices[0] for part in client.completions.create(**options, echo=True, stream=True)]
    assert "".join(part.text for part in parts) == choice.text
    assert [token for part in parts for token in part.logprobs.tokens] == scores.tokens


def test_models_are_listed_and_found_by_name(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "tinystories_slm"
    with pytest.raises(openai.NotFoundError, match="model \\('other'\\): is not served; use 'tiny'"):
        client.models.retrieve("other")


def test_metrics_count_tokens_and_choices(server, client):
    before = metrics_of(server)
    usage = client.completions.create(model=NAME, prompt="A", max_tokens=3, temperature=0).usage
    after = metrics_of(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["tinystories_slm_prompt_tokens_total"] == usage.prompt_tokens
    assert grown["tinystories_slm_completion_tokens_total"] == 3
    assert grown['tinystories_slm_choices_finished_total{reason="length"}'] == 1
    assert after["tinystories_slm_choices_running"] == after["tinystories_slm_choices_waiting"] == 0


def metrics_of(server: LocalServer) -> dict[str, int]:
    server.wait_until_idle()
    lines = httpx.get(f"{server.address}/metrics").text.splitlines()
    return {name: int(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slot(long_server, stream):
    body = {"model": NAME, "prompt": "A", "max_tokens": 19_000, "stream": stream}
    connection = send_raw(long_server, body)
    long_server.wait_until(lambda: long_server.scheduler.num_running == 1)
    connection.close()
    long_server.wait_until(lambda: long_server.scheduler.num_running == 0)
    assert long_server.scheduler.counts["cancelled"] == 1
    assert long_server.scheduler.counts["completion_tokens"] < 19_000


def send_raw(server: LocalServer, body: dict, *, receive_buffer: int | None = None) -> socket.socket:
    """Send a request and read nothing."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", int(server.address.rpartition(":")[2])))
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_does_not_read_stops_no_other(long_server):
    body = {"model": NAME, "prompt": "A", "max_tokens": 3000, "stream": True}
    with send_raw(long_server, body, receive_buffer=2048):
        long_server.wait_until(lambda: long_server.scheduler.num_running == 1)
        options = {"model": NAME, "prompt": "The", "max_tokens": 20, "stream": True}
        parts = list(long_server.client().completions.create(**options))
        assert parts[-1].choices[0].finish_reason == "length"
        # Its text is complete without it, and its slot free.
        long_server.wait_until_idle()
        assert long_server.scheduler.counts["length"] == 2


def test_a_full_queue_answers_429_and_the_client_retries(long_server):
    endless = {"model": NAME, "prompt": "A", "max_tokens": 19_000, "stream": True}
    connections = [send_raw(long_server, endless) for _ in range(4)]  # two slots and two places
    long_server.wait_until(
        lambda: (long_server.scheduler.num_running, long_server.scheduler.num_waiting) == (2, 2)
    )
    options = {"model": NAME, "prompt": "A", "max_tokens": 2}
    with pytest.raises(openai.RateLimitError, match="the queue is full") as caught:
        long_server.client().completions.create(**options)
    assert caught.value.response.headers["retry-after"] == "1" and caught.value.code == "queue_full"

    release = threading.Timer(0.3, lambda: [connection.close() for connection in connections])
    release.start()
    response = long_server.client(max_retries=20).completions.create(**options)
    assert response.usage.completion_tokens == 2
    release.join()


def test_an_error_in_the_decoding_thread_ends_every_request(tokenizer, model, monkeypatch, caplog):
    failures = []
    with local_server(model, tokenizer, num_slots=1) as server:
        server.app.on_failure = lambda: failures.append("stopped")
        monkeypatch.setattr(server.scheduler.batch, "advance", lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the server failed while it generated"):
            server.client().completions.create(model=NAME, prompt="A")
        assert failures == ["stopped"] and httpx.get(f"{server.address}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            server.client().completions.create(model=NAME, prompt="A", stream=True)
    assert "ZeroDivisionError" in caplog.text


def test_an_error_in_a_stream_is_an_event(tokenizer, model, monkeypatch):
    with local_server(model, tokenizer, num_slots=1) as server:
        monkeypatch.setattr(server.scheduler.batch, "advance", lambda *_: 1 / 0)
        with pytest.raises(openai.APIError, match="the server failed while it generated the text"):
            list(server.client().completions.create(model=NAME, prompt="A", stream=True))


def test_a_key_is_needed_for_everything_but_the_health_check(tokenizer, model):
    with local_server(model, tokenizer, api_key="se cret é") as server:
        assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
        for key in ("wrong", "", "se cret"):
            with pytest.raises((openai.AuthenticationError, openai.OpenAIError)):
                server.client(api_key=key).models.list()
        assert httpx.get(f"{server.address}/metrics").status_code == 401
        answer = httpx.post(f"{server.address}/v1/completions", json={})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        header = {"Authorization": "Bearer se cret é".encode()}
        assert httpx.get(f"{server.address}/v1/models", headers=header).status_code == 200


def test_requests_that_no_route_takes_get_an_error_in_the_same_format(server):
    with httpx.Client(base_url=server.address) as http:
        answers = [
            http.get("/v1/nothing"),
            http.get("/v1/completions"),
            http.post("/v1/chat/completions", json={}),  # the tokenizer has no chat template
            http.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}),
            http.post("/v1/completions", json={"prompt": "a" * 100_001}),
            http.post(
                "/v1/completions", content=b'{"prompt": "\xe9"}', headers={"Content-Type": "application/json"}
            ),
        ]
    assert [answer.status_code for answer in answers] == [404, 405, 404, 415, 413, 400]
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_chat_uses_the_template_of_the_tokenizer(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "Words: fox"}]
    with local_server(model, tokenizer) as server:
        client = server.client()
        options = {"model": NAME, "messages": messages, "seed": 3, "max_tokens": 9}
        response = client.chat.completions.create(**options)
        [choice] = response.choices
        expected = text_alone(model, tokenizer, "Words: fox\nStory:", 3, max_new_tokens=9)
        assert (choice.message.role, choice.message.content) == ("assistant", expected)
        assert response.object == "chat.completion" and response.usage.completion_tokens <= 9
        parts = list(client.chat.completions.create(**options, stream=True))
        assert parts[0].choices[0].delta.role == "assistant" and parts[0].object == "chat.completion.chunk"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
        newer = {name: value for name, value in options.items() if name != "max_tokens"}
        assert client.chat.completions.create(**newer, max_completion_tokens=9).choices == response.choices
        for wrong, message in (
            ([{"role": "assistant", "content": "A"}], "messages must alternate between user and assistant"),
            (
                [{"role": "user", "content": "fox " * 60}],
                "prompt is .* tokens long and the model's context is 48",
            ),
            ([], r"messages \(\[\]\)"),
            ([{"role": "user", "content": [{"type": "text", "text": "A"}]}], r"messages.0.content"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                client.chat.completions.create(**options | {"messages": wrong})
