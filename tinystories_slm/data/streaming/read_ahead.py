"""Read the next item of an iterator in a thread while the last one is in use."""

import logging
from collections.abc import Iterator
from threading import Thread
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_CLOSE_S = 10.0


class ReadAhead(Generic[Item]):
    """Items of an endless iterator, of which one is read ahead, and never more."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._thread: Thread | None = None
        self._item: Item | None = None
        self._error: BaseException | None = None

    def take(self) -> Item:
        """Return the next item, and start to read the one after it.

        Raises:
            Exception: what the iterator raised; every later call raises it again.
        """
        if self._thread is None:
            self._start()
        self._thread.join()
        if self._error is not None:
            raise self._error
        item = self._item
        self._start()
        return item

    def close(self) -> None:
        """Wait for the thread, whose iterator the caller has stopped; at most ten seconds."""
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():  # it waits for the network, and ends with the process
                logger.warning("the reader of the stream has not ended after %d s", _CLOSE_S)
        self._item = None

    def _start(self) -> None:
        self._item = None
        self._thread = Thread(target=self._read, name="stream reader", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._item = next(self._items, None)  # None only after a stop
        except BaseException as error:
            self._error = error
