"""Whole runs under FSDP2 on CPU processes: losses, weights and checkpoints beside those of one process."""

import pytest
from safetensors.torch import load_file
from training.helpers import assert_same_run, load_weights
from training.sharded_runs import assert_close_runs, train_sharded

from tinystories_slm.training import train
from tinystories_slm.training.checkpoints import checkpoints

FLAGS = ("--train.per_device_batch_size", "2", "--train.batch_size", "12", "--train.ema_decay", "0.9")
OPTIMIZERS = ("adamw", "muon")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_sharded_processes_train_like_one_and_resume_bit_by_bit(optimizer, tiny_run):
    flags = (*FLAGS, "--train.optimizer", optimizer, "--train.max_steps", "10")
    alone = train(tiny_run(*flags, name="alone"))
    whole, pieces = tiny_run(*flags, name="whole"), tiny_run(*flags, name="pieces")
    codes, errors = train_sharded(whole, 2)
    assert codes == [0, 0], errors
    assert train_sharded(pieces, 2, STOP_AT="5")[0] == [75, 75]
    codes, errors = train_sharded(pieces, 2)

    assert codes == [0, 0] and "resumed at step 6" in errors, errors
    assert_same_run(whole.output_dir, pieces.output_dir)
    assert_close_runs(whole.output_dir, alone, rel=1e-4)
    assert not load_weights(alone / "last")["model.embed_tokens.weight"].equal(
        load_file(checkpoints(alone)[-1] / "model.safetensors")["model.embed_tokens.weight"]
    )  # the average is not the weights
