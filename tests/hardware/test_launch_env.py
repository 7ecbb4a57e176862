import os

import pytest

from tinystories_slm.hardware.launch_env import (
    is_launched,
    local_process_rank,
    num_launched_processes,
    process_rank,
    remove_stray_launch_variables,
)

LAUNCH = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture
def environment(monkeypatch):
    """A function that replaces the whole environment."""

    def replace(variables: dict[str, str]) -> None:
        monkeypatch.setattr(os, "environ", dict(variables))

    return replace


def test_ranks_are_those_of_a_launcher(environment):
    environment(LAUNCH)
    assert (process_rank(), local_process_rank(), num_launched_processes()) == (9, 1, 16)
    environment(MPI | {"MASTER_ADDR": "10.0.0.1"})
    assert (process_rank(), local_process_rank(), num_launched_processes()) == (1, 1, 2)
    assert remove_stray_launch_variables() == {}


@pytest.mark.parametrize(
    "stray",
    [
        {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""},
        {"RANK": "1"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "first", "WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1"},
        {"LOCAL_RANK": "-1"},
        {"PMI_RANK": "3", "PMI_SIZE": "4"},
    ],
    ids=str,
)
def test_variables_without_a_launcher_are_ignored(stray, environment):
    environment(stray | {"HOME": "/"})
    assert not is_launched()
    assert (process_rank(), local_process_rank(), num_launched_processes()) == (0, 0, 1)
    removed = remove_stray_launch_variables()
    assert removed == {name: value for name, value in stray.items() if name != "MASTER_ADDR"}
    assert not set(os.environ) & set(removed) and "HOME" in os.environ


def test_empty_number_of_a_launch_is_removed(environment):
    environment(LAUNCH | {"LOCAL_WORLD_SIZE": ""})
    assert remove_stray_launch_variables() == {"LOCAL_WORLD_SIZE": ""}
    assert process_rank() == 9
