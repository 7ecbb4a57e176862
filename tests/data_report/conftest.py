"""A local Hub for the tests of the push."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub.conftest import hub_connection
from hub.loopback import LoopbackHub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """An empty Hub to which this process is logged in as `tester`."""
    with LoopbackHub() as hub, hub_connection(hub, tmp_path / "cache"):
        yield hub
