"""An OpenAI-compatible endpoint on loopback that behaves as badly as it is set to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD_MARKS = '{"grammar": 8, "creativity": 6, "consistency": 7, "plot": 5, "age_group": "C"}'


class BadEndpoint(ThreadingHTTPServer):
    """Server with a queue of faults, which the first requests meet; later ones get `answer(messages)`."""

    daemon_threads = True

    def __init__(self, answer: Callable[[list[dict]], str], faults: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.faults = answer, list(faults)
        self.lock, self.requests, self.num_answered, self.keys = threading.Lock(), [], 0, set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address) -> None:
        pass  # cut connections are part of the tests


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(body)
            server.keys.add(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else ""
        if fault == "cut":
            self.connection.close()
            return
        if fault == "slow":
            threading.Event().wait(1.6)  # past the timeout of the client
        if fault.isdigit():
            self._send(int(fault), b'{"error": {"message": "later"}}')
            return
        text = server.answer(body["messages"])
        message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        content = json.dumps({"id": "1", "object": "chat.completion", "choices": [message]}).encode()
        if fault == "half":
            self._send(200, content[:40], length=len(content))
        elif fault == "not JSON":
            self._send(200, b"<html>gateway</html>")
        elif fault == "no choices":
            self._send(200, b'{"id": "1", "choices": []}')
        else:
            self._send(200, content)
            with server.lock:
                server.num_answered += 1

    def _send(self, status: int, content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("retry-after-ms", "5")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def bad_endpoint(answer: Callable[[list[dict]], str], *faults: str) -> Iterator[BadEndpoint]:
    server = BadEndpoint(answer, list(faults))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
