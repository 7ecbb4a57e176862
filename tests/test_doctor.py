import copy
import json
import math
import re
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT, ignore_the_cache, run_script

from tinystories_slm import doctor
from tinystories_slm.cli import doorway
from tinystories_slm.config import RunConfig, parse_config, save_config
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.doctor import arithmetic, checkup, machine, needs, trial
from tinystories_slm.doctor.finding import Finding, examine
from tinystories_slm.doctor.model_check import ModelDoctorArgs
from tinystories_slm.model_folder import save_model_folder

CPU = torch.device("cpu")


def debug(*flags: str) -> RunConfig:
    return parse_config(["--config", str(ROOT / "configs" / "debug.yaml"), *flags])


def by_subject(findings) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


@pytest.fixture
def speeds(monkeypatch):
    """Products of 100 GFLOP/s in float32, and of the given speed in bfloat16."""

    def measured(bf16: float) -> None:
        flops = {torch.float32: 100e9, torch.bfloat16: bf16}
        monkeypatch.setattr(arithmetic, "matmul_flops", lambda device, dtype: flops[dtype])

    return measured


def test_the_script_on_the_debug_preset(tmp_path):
    folders = ("--output_dir", str(tmp_path / "run"), "--data.data_dir", str(tmp_path / "data"))
    output = tmp_path / "doctor.json"
    done = run_script("doctor.py", "--config", "configs/debug.yaml", *folders, "--output", str(output))

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 problems"
    assert all(re.match(r"(ok|note|slow|PROBLEM) +\S| +-> ", line) for line in lines[:-1])
    subjects = {line[9:23].strip() for line in lines[:-1] if not line.startswith(" ")}
    assert subjects >= {
        "packages", "processor", "device", "threads", "load", "allocator", "run folder", "data", "disk",
        "memory", "precision", "attention", "torch.compile", "learning", "time", "page faults",
    }  # fmt: skip
    assert f"torch {version('torch')}" in done.stdout
    assert re.search(r"sdpa: fp32 \de-\d+, bf16 \de-\d+, fp16 \de-\d+, used", done.stdout)
    assert re.search(r"about \d+ s on one process: 20 steps of ", done.stdout)
    record = json.loads(output.read_text())
    assert record["problems"] == 0 and len(record["findings"]) >= 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doctor.json"]  # nothing else was written


def test_problems_are_counted(capsys, monkeypatch):

    args = doctor.DoctorArgs()
    monkeypatch.setattr(
        doctor, "checkup", lambda args: iter([Finding("disk", "PROBLEM", "full", "make room")])
    )
    with pytest.raises(SystemExit) as ended:
        doctor.doctor(args)
    assert ended.value.code == 1
    assert capsys.readouterr().out == f"PROBLEM  disk           full\n{' ' * 23} -> make room\n1 problem\n"


@pytest.fixture
def model_folder(tmp_path, tokenizer, model_with_tokenizer):
    return save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")


def test_a_model_is_examined_instead_of_a_configuration(model_folder, tmp_path, capsys):
    output = tmp_path / "findings.json"
    assert doctor.doctor_args(["--model", "x"]) is doctor.doctor_args(["--model=x"]) is ModelDoctorArgs
    assert doctor.doctor_args(["--model.dropout=0.1", "--config=a.yaml"]) is doctor.DoctorArgs
    doctor.doctor(ModelDoctorArgs(model=str(model_folder), output=output))

    printed = capsys.readouterr().out
    assert re.search(r"ok +generation +with and without the cache, logits differ by \S+e-0[678] ", printed)
    assert re.search(r"ok +forward pass +loss \d+\.\d+ nats per token", printed)
    assert re.search(r"ok +weights +TinyStoriesForCausalLM, [\d,]+ parameters, context of 48", printed)
    assert printed.splitlines()[-1] == "0 problems"
    assert json.loads(output.read_text())["problems"] == 0


def test_a_model_whose_cache_is_ignored_is_a_problem(model_folder, monkeypatch, capsys):
    ignore_the_cache(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        doctor.doctor(ModelDoctorArgs(model=str(model_folder)))
    assert ended.value.code == 1
    assert re.search(
        r"PROBLEM +generation .*does not compute what the model computes", capsys.readouterr().out
    )


def test_weights_that_are_not_finite_are_a_problem(tmp_path, tokenizer, model_with_tokenizer, capsys):
    model = copy.deepcopy(model_with_tokenizer)
    model.model.norm.weight.data[3] = float("nan")
    save_model_folder(model, tokenizer, tmp_path / "best")
    with pytest.raises(SystemExit):
        doctor.doctor(ModelDoctorArgs(model=str(tmp_path / "best")))
    printed = capsys.readouterr().out
    assert "1 of the weights hold NaN or infinity, first model.norm.weight" in printed
    assert re.search(r"PROBLEM +forward pass +loss nan", printed)


def test_a_check_that_breaks_off_is_a_problem_and_the_others_go_on(tmp_path, monkeypatch, speeds):
    speeds(bf16=100e9)

    def broken(*_):
        raise RuntimeError("the driver\nand its story")

    for module, name in (
        (needs, "disk"), (arithmetic, "compilation"), (arithmetic, "attention"), (trial, "duration"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, broken)
    found = by_subject(checkup(debug("--output_dir", str(tmp_path / "run"))))
    assert found["disk"].verdict == "PROBLEM"
    assert found["disk"].text == "could not be examined (RuntimeError: the driver)"
    assert found["memory"].verdict == "ok" and found["learning"].verdict == "ok"


def test_a_configuration_that_cannot_be_is_told_as_training_would_tell_it():
    refused = debug("--train.kernels", "fused", "--model.dropout", "0.1")
    [finding] = examine("memory", lambda: needs.memory(refused, CPU, "no"))
    assert finding == Finding(
        "memory", "PROBLEM", "train.kernels (fused) cannot be: no kernel for dropout; use auto or torch"
    )


def test_precision_that_the_hardware_does_not_multiply(speeds):
    speeds(bf16=400e9)
    [finding] = arithmetic.precision(debug("--train.mixed_precision", "no"), CPU)
    assert (finding.verdict, finding.remedy) == ("slow", "--train.mixed_precision bf16")
    speeds(bf16=10e9)
    [finding] = arithmetic.precision(debug("--train.mixed_precision", "bf16"), CPU)
    assert (finding.verdict, finding.remedy) == ("slow", '--train.mixed_precision "no"')
    [finding] = arithmetic.precision(fp16 := debug("--train.mixed_precision", "fp16"), CPU)
    assert finding.verdict == "PROBLEM" and "needs a GPU" in finding.text
    assert arithmetic.resolved_precision(fp16, CPU) == "no"


@pytest.mark.parametrize("wrong", [1.5, math.nan])
def test_attention_that_computes_the_wrong_thing_is_seen(monkeypatch, wrong):
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: right(q, k, v, **kwargs) * wrong,
    )
    found = list(arithmetic.attention(debug(), CPU, "no"))
    verdicts = {finding.text.split(":")[0]: finding.verdict for finding in found}
    assert verdicts["eager"] == "ok" and verdicts["sdpa"] == "PROBLEM"
    assert "fp32" in found[1].text and "WRONG" in found[1].text


def test_attention_is_held_against_every_number_type():
    eager, sdpa, flex, flash = arithmetic.attention(debug(), CPU, "no")
    assert (eager.verdict, sdpa.verdict) == ("ok", "ok")
    errors = [float(e) for e in re.findall(r"\w+ (\de[-+]\d+)", sdpa.text)]
    assert errors[0] < 1e-5 < errors[2] < errors[1] < 0.1  # fp32, fp16, bf16
    assert (flex.verdict, flash.verdict) == ("note", "note")


def test_compiled_blocks_that_go_wrong_after_the_first_step(monkeypatch):
    losses = {False: [4.0, 3.9, 3.8, 3.7], True: [4.0, math.nan, math.nan, math.nan]}
    monkeypatch.setattr(arithmetic, "_losses", lambda *_, compiled: (losses[compiled], 1.0))
    [finding] = arithmetic.compilation(debug(), CPU, "no")
    assert finding.verdict == "note" and "are 4.0000 nan nan nan, not 4.0000 3.9000" in finding.text
    [finding] = arithmetic.compilation(debug("--train.compile", "true"), CPU, "no")
    assert (finding.verdict, finding.remedy) == ("PROBLEM", "--train.compile false")

    def no_compiler(*_, compiled):
        if compiled:
            raise RuntimeError("no C++ compiler")
        return losses[False], 1.0

    monkeypatch.setattr(arithmetic, "_losses", no_compiler)
    [finding] = arithmetic.compilation(debug("--train.compile", "true"), CPU, "no")
    assert finding.verdict == "PROBLEM" and "no C++ compiler" in finding.text


def test_memory_that_does_not_suffice_names_the_micro_batch_that_does(monkeypatch):
    config = debug(
        "--data.seq_len", "1024", "--train.batch_size", "64", "--train.per_device_batch_size", "64"
    )
    monkeypatch.setattr(needs, "free_memory", lambda device: 10**12)
    assert next(needs.memory(config, CPU, "no")).verdict == "ok"
    monkeypatch.setattr(needs, "free_memory", lambda device: 1_400_000_000)
    [finding] = needs.memory(config, CPU, "no")
    assert finding.verdict == "PROBLEM" and "1.4 GB free" in finding.text
    rows = int(re.search(r"--train.per_device_batch_size (\d+)", finding.remedy)[1])
    assert 1 < rows < 64 and 64 % rows == 0
    monkeypatch.setattr(needs, "free_memory", lambda device: 10**6)
    assert "smaller preset" in next(needs.memory(config, CPU, "no")).remedy


def test_a_disk_that_is_too_small(monkeypatch):
    config = debug("--train.keep_checkpoints", "20")
    monkeypatch.setattr(needs, "free_disk", lambda folder: 5_000_000)
    [finding] = needs.disk(config)
    assert finding.verdict == "PROBLEM" and "5 MB free" in finding.text
    assert "--output_dir on another disk" in finding.remedy and "keep_checkpoints 1" in finding.remedy


def test_a_run_folder_of_another_run_or_nobodys(tmp_path):
    config = debug("--output_dir", str(tmp_path))
    assert next(needs.run_folder(config)).verdict == "ok"
    checkpoint = tmp_path / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    save_config(debug("--output_dir", str(tmp_path), "--train.lr", "0.5"), tmp_path / "config.yaml")
    [finding] = examine("run folder", lambda: needs.run_folder(config))
    assert finding.verdict == "PROBLEM" and "train.lr was 0.5 and is 0.003" in finding.text
    (tmp_path / "file").write_text("")
    [finding] = needs.run_folder(debug("--output_dir", str(tmp_path / "file" / "run")))
    assert finding.verdict == "PROBLEM" and "cannot be written to" in finding.text


def test_data_prepared_of_other_settings_or_out_of_reach(tmp_path, monkeypatch):
    flags = ("--data.data_dir", str(tmp_path), "--data.max_stories", "60", "--tokenizer.vocab_size", "300")
    config = debug(*flags)
    assert "will be made" in next(needs.data(config)).text
    prepare_data(config.data, config.tokenizer)
    found = next(needs.data(config))
    assert found.verdict == "ok" and "prepared" in found.text and needs.vocab_size(config) == 300
    [finding] = examine(
        "data", lambda: needs.data(debug(*flags, "--data.seq_len", "32", "--data.max_stories", "61"))
    )
    assert finding.verdict == "PROBLEM" and "max_stories" in finding.text

    class Offline:
        def dataset_info(self, *_, **__):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(needs, "HfApi", Offline)
    on_hub = debug("--data.source", "roneneldan/TinyStories", "--data.data_dir", str(tmp_path / "hub"))
    [finding] = needs.data(on_hub)
    assert finding.verdict == "PROBLEM" and "no route to host" in finding.text
    assert "--data.source builtin" in finding.remedy
    (tmp_path / "hub" / "raw").mkdir(parents=True)
    (tmp_path / "hub" / "raw" / "source.json").write_text("{}")
    assert next(needs.data(on_hub)).verdict == "ok"  # offline, and nothing to fetch


def test_packages_out_of_range(monkeypatch):
    installed = {"torch": "2.1.0", "datasets": None}
    actual = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: installed.get(name, actual(name)))
    wrong = [finding for finding in machine.packages() if finding.verdict == "PROBLEM"]
    assert [finding.text.split(",")[0] for finding in wrong] == [
        "datasets is not installed",
        "torch is 2.1.0",
    ]
    assert re.fullmatch(r"python -m pip install 'torch>=[\d.]+'", wrong[1].remedy)


def test_threads_and_libraries(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(machine, "loaded_libraries", lambda: "/usr/lib/libtcmalloc.so.4\n/opt/libiomp5.so")
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    few, moving = machine.threads(CPU)
    assert (few.verdict, few.remedy) == ("slow", "export OMP_NUM_THREADS=16")
    assert moving.verdict == "slow" and moving.remedy.startswith("export KMP_AFFINITY=")
    assert next(machine.allocator()).text == "tcmalloc"


def test_a_machine_that_is_busy_with_something_else(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: 8)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert next(machine.load()).verdict == "ok"
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (7.9, 0.0, 0.0))
    assert next(machine.load()).verdict == "slow"


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = by_subject(machine.devices(CPU))
    assert found["device"].verdict == "PROBLEM" and "pytorch.org" in found["device"].remedy


def test_huge_pages_switched_off(monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(machine, "_HUGE_PAGES", setting)
    found = by_subject(machine.allocator())
    assert found["huge pages"].remedy == f"echo madvise | sudo tee {setting}"


def test_page_faults_that_cost_get_the_line_to_type():
    step = {"rows_s": 0.9, "update_s": 0.1}
    [finding] = trial.paging([trial.Timed(**step, kernel_s=0.4, page_faults=200_000)] * 3)
    assert (finding.verdict, finding.remedy) == ("slow", machine.ONE_HEAP)
    assert finding.text == "200,000 page faults a step, 40% of its time in the kernel"
    [finding] = trial.paging([trial.Timed(**step, kernel_s=0.01, page_faults=200_000)] * 3)
    assert finding.verdict == "ok"


@pytest.mark.parametrize("flags", [(), ("--model.family", "modern", "--train.optimizer", "muon")])
def test_the_overfit_check_sees_a_model_that_does_not_learn(monkeypatch, flags):
    config = debug(*flags)
    [finding] = trial.overfit(config, CPU, "no")
    assert finding.verdict == "ok"
    monkeypatch.setattr(trial.Trainee, "_update", lambda self: None)
    [finding] = trial.overfit(config, CPU, "no")
    assert finding.verdict == "PROBLEM"


def test_the_time_of_a_run_is_its_steps_and_evaluations(monkeypatch):
    # A second forward and backward for the 4 sequences of a micro-batch, half a second to update.
    timed = trial.Timed(rows_s=1.0, update_s=0.5, kernel_s=0.0, page_faults=0)
    monkeypatch.setattr(trial.Trainee, "timed_step", lambda self: timed)
    monkeypatch.setattr(trial, "_validation_tokens", lambda config: 4 * 64 * 30)
    config = debug("--train.batch_size", "16", "--train.max_steps", "100", "--train.eval_every", "40")
    found = by_subject(trial.duration(config, CPU, "no"))
    # 100 x (4 x 1 s + 0.5 s) and 3 x 30 x 1/3 s: 480 s
    assert found["time"].text.startswith("about 8 min 0 s on one process: 100 steps of 4.5 s (228 tokens/s)")
    assert found["time"].text.endswith("3 evaluations of 10 s")
    long = debug("--train.max_steps", "1000000")
    assert by_subject(trial.duration(long, CPU, "no"))["time"].verdict == "slow"
    limited = debug("--train.max_steps", "1000000", "--train.max_minutes", "5")
    found = by_subject(trial.duration(limited, CPU, "no"))["time"]
    assert found.verdict == "ok" and "train.max_minutes (5) ends it before" in found.text


def test_a_model_that_is_too_slow_to_time_whole_is_timed_in_part(monkeypatch):
    config = debug("--train.batch_size", "64", "--train.per_device_batch_size", "64")
    monkeypatch.setattr(trial, "matmul_flops", lambda device, dtype: 1e8)
    rows = trial._rows_to_time(config, CPU, "no")
    assert 1 <= rows < 64
    assert f"timed at {rows} sequences at once" in by_subject(trial.duration(config, CPU, "no"))["time"].text


@pytest.mark.parametrize(
    ("seconds", "words"), [(12.4, "12 s"), (310, "5 min 10 s"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_times_are_spelled(seconds, words):
    assert trial.spelled(seconds) == words


def test_a_configuration_that_cannot_be_right_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("train: {max_steps: 5, warmup_steps: 9}\n")
    monkeypatch.setattr("sys.argv", ["doctor.py", "--config", str(path)])
    with pytest.raises(SystemExit) as ended:
        doorway(doctor.doctor, doctor.DoctorArgs)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: train.warmup_steps (9)")
