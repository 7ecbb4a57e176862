"""Settings of Accelerate's configuration file and environment: set by the run, or rejected in one line."""

import json
import logging
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tinystories_slm.errors import UserError
from tinystories_slm.training import train
from tinystories_slm.training.accelerate_env import check_sharding
from tinystories_slm.training.distributed import build_accelerator


@pytest.fixture
def fresh_state():
    """Let Accelerate read the environment anew, and again after the test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# What `accelerate launch` sets for a file with these entries.
OVERRIDDEN = {
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "train.compile"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "train.mixed_precision"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "train.per_device_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("0.5", "train.max_grad_norm"),
}


def test_settings_of_accelerate_do_not_change_the_run(tiny_run, monkeypatch, fresh_state, caplog):
    caplog.set_level(logging.INFO, logger="tinystories_slm")
    for name, (value, _) in OVERRIDDEN.items():
        monkeypatch.setenv(name, value)
    accelerator, runtime = build_accelerator(tiny_run("--train.per_device_batch_size", "4"))

    assert accelerator.state.dynamo_plugin.backend.value == "NO" and not runtime.compiled
    assert accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 2
    for name, (value, option) in OVERRIDDEN.items():
        assert f"{name} ({value}) has no effect: {option} decides" in caplog.messages


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("ACCELERATE_USE_CPU", "maybe", r"ACCELERATE_USE_CPU \(maybe\) must be true or false"),
        ("ACCELERATE_USE_CPU", "", r"ACCELERATE_USE_CPU \(\) must be true or false"),
        ("ACCELERATE_USE_DEEPSPEED", "true", r"ACCELERATE_USE_DEEPSPEED \(true\): .* cannot use DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", r"ACCELERATE_USE_MEGATRON_LM \(true\): .*Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", r"ACCELERATE_USE_PARALLELISM_CONFIG \(true\)"),
        ("ACCELERATE_USE_FSDP", "true", r"ACCELERATE_USE_FSDP \(true\) shards .* this run has 1 on cpu"),
        ("ACCELERATE_TORCH_DEVICE", "meta", r"ACCELERATE_TORCH_DEVICE \(meta\) cannot be used"),
        (
            "ACCELERATE_DYNAMO_USE_FULLGRAPH",
            "maybe",
            r"Accelerate cannot start: .*maybe; correct or unset ACC",
        ),
        ("WORLD_SIZE", "8", r"WORLD_SIZE \(8\) needs RANK and MASTER_ADDR as well"),
    ],
)
def test_unsupported_setting_of_accelerate_raises(name, value, message, tiny_run, monkeypatch, fresh_state):
    config = tiny_run()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as raised:
        train(config)
    assert "\n" not in str(raised.value) and not config.output_dir.exists()


def test_fsdp_must_be_version_2_with_whole_weights():
    def accelerator(version: int, kind: str) -> SimpleNamespace:
        plugin = SimpleNamespace(fsdp_version=version, state_dict_type=SimpleNamespace(name=kind))
        state = SimpleNamespace(fsdp_plugin=plugin)
        return SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)

    check_sharding(accelerator(2, "FULL_STATE_DICT"))
    with pytest.raises(UserError, match=r"fsdp_version \(1\) must be 2"):
        check_sharding(accelerator(1, "FULL_STATE_DICT"))
    with pytest.raises(UserError, match=r"fsdp_state_dict_type \(SHARDED_STATE_DICT\) must be FULL_STATE"):
        check_sharding(accelerator(2, "SHARDED_STATE_DICT"))


@pytest.mark.parametrize("stray", [{"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, {"RANK": "1"}], ids=str)
def test_run_ignores_what_is_left_of_a_launch(stray, tiny_run, monkeypatch, fresh_state, caplog):
    for name, value in stray.items():
        monkeypatch.setenv(name, value)
    run_dir = train(tiny_run("--train.max_steps", "3"))

    names = ", ".join(f"{name}={value}" for name, value in stray.items())
    assert caplog.messages.count(f"ignored {names}: not set by a launcher of this run") == 1
    assert PartialState().num_processes == 1
    written = json.loads((run_dir / "environment.json").read_text())
    assert (written["distributed_type"], written["num_processes"], written["compile"]) == ("NO", 1, False)
