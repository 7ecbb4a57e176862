"""A client of the demo page's HTTP interface, and the stories that the page shows."""

import json
import re

import httpx

CONTEXT = 160
"""Context of the models in tests/demo, in tokens."""


def call(address: str, *data: object) -> tuple[str, object]:
    """Call the endpoint `generate` as gradio's HTTP interface describes it; return the last event."""
    joined = httpx.post(f"{address}gradio_api/call/generate", json={"data": data}, timeout=120)
    if joined.is_error:
        return "rejected", joined.json()
    events = []
    url = f"{address}gradio_api/call/generate/{joined.json()['event_id']}"
    with httpx.stream("GET", url, timeout=120) as response:
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "event":
                events.append([value, None])
            elif name == "data":
                events[-1][1] = json.loads(value)
    return tuple(events[-1])


def story_text(html: str, tokenizer) -> str:
    [data] = re.findall('data-story="(.*?)"', html)
    ids = json.loads(data.replace("&#34;", '"').replace("&amp;", "&"))["ids"]
    return tokenizer.decode(ids, skip_special_tokens=True)
