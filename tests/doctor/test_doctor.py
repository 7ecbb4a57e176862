import copy
import json
import math
import re
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT, ignore_the_cache, run_script
from huggingface_hub import DatasetInfo

from tinystories_slm import doctor
from tinystories_slm.commands.cli import run_command
from tinystories_slm.config import RunConfig, parse_config, save_config
from tinystories_slm.config.command_args.doctor import DoctorArgs, ModelDoctorArgs, doctor_args
from tinystories_slm.data.prepare import prepare_data
from tinystories_slm.data.sources import hub
from tinystories_slm.doctor import dry_run, machine, numerics, resources, run_diagnostics
from tinystories_slm.doctor.diagnostic import Diagnostic, run_check
from tinystories_slm.kernels.training.bindings import load_kernels
from tinystories_slm.kernels.training.layers import FusedDecoderLayer, fused_linear_cross_entropy
from tinystories_slm.model_folder import save_model_folder
from tinystories_slm.training.runtime import resolve_runtime

CPU = torch.device("cpu")


def debug_config(*flags: str) -> RunConfig:
    return parse_config(["--config", str(ROOT / "configs" / "debug.yaml"), *flags])


def by_subject(diagnostics) -> dict[str, Diagnostic]:
    return {diagnostic.subject: diagnostic for diagnostic in diagnostics}


@pytest.fixture
def set_matmul_speed(monkeypatch):
    """Set the measured matmul speed of a thread: 100 GFLOP/s in float32, `bf16` FLOP/s in bfloat16."""

    def set_speed(bf16: float) -> None:
        flops = {torch.float32: 100e9, torch.bfloat16: bf16}
        monkeypatch.setattr(numerics, "measure_matmul_flops", lambda device, dtype, *_, **__: flops[dtype])

    return set_speed


def test_doctor_finds_no_problem_in_the_debug_preset(tmp_path):
    folders = ("--output_dir", str(tmp_path / "run"), "--data.data_dir", str(tmp_path / "data"))
    output = tmp_path / "doctor.json"
    done = run_script("doctor.py", "--config", "configs/debug.yaml", *folders, "--output", str(output))

    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 problems"
    assert all(re.match(r"(ok|note|slow|PROBLEM) +\S| +-> ", line) for line in lines[:-1])
    subjects = {line[9:23].strip() for line in lines[:-1] if not line.startswith(" ")}
    assert subjects >= {
        "packages", "processor", "device", "threads", "load", "allocator", "run directory", "data", "disk",
        "memory", "precision", "attention", "torch.compile", "learning", "time", "page faults",
    }  # fmt: skip
    assert f"torch {version('torch')}" in done.stdout
    assert re.search(r"matmul: fp32 \de-\d+, bf16 \de-\d+, fp16 \de-\d+, used", done.stdout)
    assert re.search(r"about \d+ s on one process: 20 steps of ", done.stdout)
    result = json.loads(output.read_text())
    assert result["problems"] == 0 and len(result["findings"]) >= 15
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "doctor.json"
    ]  # the doctor writes nothing else


def test_doctor_counts_problems_and_exits_with_one(capsys, monkeypatch):
    args = DoctorArgs()
    monkeypatch.setattr(
        doctor, "run_diagnostics", lambda args: iter([Diagnostic("disk", "PROBLEM", "full", "make room")])
    )
    with pytest.raises(SystemExit) as exit_info:
        doctor.doctor(args)
    assert exit_info.value.code == 1
    assert capsys.readouterr().out == f"PROBLEM  disk           full\n{' ' * 23} -> make room\n1 problem\n"


@pytest.fixture
def model_folder(tmp_path, tokenizer, model_with_tokenizer):
    return save_model_folder(model_with_tokenizer, tokenizer, tmp_path / "best")


def test_doctor_checks_a_model_instead_of_a_configuration(model_folder, tmp_path, capsys):
    output = tmp_path / "findings.json"
    assert doctor_args(["--model", "x"]) is doctor_args(["--model=x"]) is ModelDoctorArgs
    assert doctor_args(["--model.dropout=0.1", "--config=a.yaml"]) is DoctorArgs
    doctor.doctor(ModelDoctorArgs(model=str(model_folder), output=output))

    printed = capsys.readouterr().out
    assert re.search(r"ok +generation +with and without the cache, logits differ by \S+e-0[678] ", printed)
    assert re.search(r"ok +forward pass +loss \d+\.\d+ nats per token", printed)
    assert re.search(r"ok +weights +TinyStoriesForCausalLM, [\d,]+ parameters, context of 48", printed)
    assert printed.splitlines()[-1] == "0 problems"
    assert json.loads(output.read_text())["problems"] == 0


def test_doctor_reports_a_model_that_ignores_its_cache(model_folder, monkeypatch, capsys):
    ignore_the_cache(monkeypatch)
    with pytest.raises(SystemExit) as exit_info:
        doctor.doctor(ModelDoctorArgs(model=str(model_folder)))
    assert exit_info.value.code == 1
    assert re.search(
        r"PROBLEM +generation .*does not match the model's forward pass", capsys.readouterr().out
    )


def test_doctor_reports_weights_that_are_not_finite(tmp_path, tokenizer, model_with_tokenizer, capsys):
    model = copy.deepcopy(model_with_tokenizer)
    model.model.norm.weight.data[3] = float("nan")
    save_model_folder(model, tokenizer, tmp_path / "best")
    with pytest.raises(SystemExit):
        doctor.doctor(ModelDoctorArgs(model=str(tmp_path / "best")))
    printed = capsys.readouterr().out
    assert "1 weight tensors contain NaN or infinity, first model.norm.weight" in printed
    assert re.search(r"PROBLEM +forward pass +loss nan", printed)


def test_run_diagnostics_continues_after_a_check_that_raises(tmp_path, monkeypatch, set_matmul_speed):
    set_matmul_speed(bf16=100e9)

    def broken(*_):
        raise RuntimeError("the driver\nand its trace")

    for module, name in (
        (resources, "check_disk"), (numerics, "check_compile"), (numerics, "check_attention"),
        (dry_run, "check_duration"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, broken)
    found = by_subject(run_diagnostics(debug_config("--output_dir", str(tmp_path / "run"))))
    assert found["disk"].verdict == "PROBLEM"
    assert found["disk"].text == "the check failed (RuntimeError: the driver)"
    assert found["memory"].verdict == "ok" and found["learning"].verdict == "ok"


def test_run_check_reports_the_error_message_of_training():
    config = debug_config("--train.cpu_kernels", "fused", "--model.dropout", "0.1")
    [diagnostic] = run_check("memory", lambda: resources.check_memory(config, CPU, "no"))
    assert diagnostic == Diagnostic(
        "memory",
        "PROBLEM",
        "train.cpu_kernels (fused) cannot be used: no kernel for dropout; use auto or torch",
    )


def test_check_precision_recommends_the_faster_precision(set_matmul_speed):
    set_matmul_speed(bf16=400e9)
    [diagnostic] = numerics.check_precision(debug_config("--train.mixed_precision", "no"), CPU)
    assert (diagnostic.verdict, diagnostic.remedy) == ("slow", "--train.mixed_precision bf16")
    set_matmul_speed(bf16=10e9)
    [diagnostic] = numerics.check_precision(debug_config("--train.mixed_precision", "bf16"), CPU)
    assert (diagnostic.verdict, diagnostic.remedy) == ("slow", '--train.mixed_precision "no"')
    [diagnostic] = numerics.check_precision(fp16 := debug_config("--train.mixed_precision", "fp16"), CPU)
    assert diagnostic.verdict == "PROBLEM" and "needs a GPU" in diagnostic.text
    assert numerics.precision_or_fallback(fp16, CPU) == "no"


@pytest.mark.parametrize("factor", [1.5, math.nan])
def test_check_attention_detects_wrong_results(monkeypatch, factor):
    correct = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **kwargs: correct(q, k, v, **kwargs) * factor,
    )
    config = debug_config("--train.attention", "sdpa")
    found = list(numerics.check_attention(config, CPU, "no"))
    verdicts = {diagnostic.text.split(":")[0]: diagnostic.verdict for diagnostic in found}
    assert verdicts["eager"] == "ok" and verdicts["sdpa"] == "PROBLEM"
    sdpa = next(diagnostic for diagnostic in found if diagnostic.text.startswith("sdpa"))
    assert "fp32" in sdpa.text and "WRONG" in sdpa.text and sdpa.text.endswith("used")


def test_check_attention_examines_the_backend_of_the_run(monkeypatch):
    """On a CPU that is `matmul`, which the doctor once left out."""
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *args: 1.5 * baddbmm(*args))
    found = list(numerics.check_attention(debug_config(), CPU, "no"))
    [problem] = [diagnostic for diagnostic in found if diagnostic.verdict == "PROBLEM"]
    assert problem.text.startswith("matmul: fp32") and problem.text.endswith("used")


def test_check_attention_covers_every_precision():
    eager, matmul, sdpa, flex, flash = numerics.check_attention(debug_config(), CPU, "no")
    assert (eager.verdict, matmul.verdict, sdpa.verdict) == ("ok", "ok", "ok")
    errors = [float(e) for e in re.findall(r"\w+ (\de[-+]\d+)", sdpa.text)]
    assert errors[0] < 1e-5 < errors[2] < errors[1] < 0.1  # fp32, fp16, bf16
    assert (flex.verdict, flash.verdict) == ("note", "note")


def test_check_compile_detects_errors_after_the_first_step(monkeypatch):
    losses = {False: [4.0, 3.9, 3.8, 3.7], True: [4.0, math.nan, math.nan, math.nan]}
    monkeypatch.setattr(numerics, "_losses", lambda *_, compiled: (losses[compiled], 1.0))
    [diagnostic] = numerics.check_compile(debug_config(), CPU, "no")
    assert diagnostic.verdict == "note" and "are 4.0000 nan nan nan, not 4.0000 3.9000" in diagnostic.text
    [diagnostic] = numerics.check_compile(debug_config("--train.compile", "true"), CPU, "no")
    assert (diagnostic.verdict, diagnostic.remedy) == ("PROBLEM", "--train.compile false")

    def no_compiler(*_, compiled):
        if compiled:
            raise RuntimeError("no C++ compiler")
        return losses[False], 1.0

    monkeypatch.setattr(numerics, "_losses", no_compiler)
    [diagnostic] = numerics.check_compile(debug_config("--train.compile", "true"), CPU, "no")
    assert diagnostic.verdict == "PROBLEM" and "no C++ compiler" in diagnostic.text


def test_check_memory_recommends_a_micro_batch_that_fits(monkeypatch):
    config = debug_config(
        "--data.seq_len", "1024", "--train.batch_size", "64", "--train.per_device_batch_size", "64"
    )
    monkeypatch.setattr(resources, "free_memory", lambda device: 10**12)
    assert next(resources.check_memory(config, CPU, "no")).verdict == "ok"
    monkeypatch.setattr(resources, "free_memory", lambda device: 1_400_000_000)
    [diagnostic] = resources.check_memory(config, CPU, "no")
    assert diagnostic.verdict == "PROBLEM" and "1.4 GB free" in diagnostic.text
    rows = int(re.search(r"--train.per_device_batch_size (\d+)", diagnostic.remedy)[1])
    assert 1 < rows < 64 and 64 % rows == 0
    monkeypatch.setattr(resources, "free_memory", lambda device: 10**6)
    assert "smaller preset" in next(resources.check_memory(config, CPU, "no")).remedy


def test_check_disk_reports_too_little_space(monkeypatch):
    config = debug_config("--train.keep", "newest:20,log", "--train.save_every", "1")
    monkeypatch.setattr(resources, "free_disk", lambda folder: 5_000_000)
    [diagnostic] = resources.check_disk(config, CPU, "no")
    assert diagnostic.verdict == "PROBLEM" and "5.0 MB free" in diagnostic.text
    assert "20 checkpoints of" in diagnostic.text and "6 model folders of" in diagnostic.text
    assert (
        "--output_dir on another disk" in diagnostic.remedy and "--train.keep newest:1" in diagnostic.remedy
    )


def test_check_run_dir_reports_another_run_and_no_write_access(tmp_path):
    config = debug_config("--output_dir", str(tmp_path))
    assert next(resources.check_run_dir(config)).verdict == "ok"
    checkpoint = tmp_path / "checkpoints" / "step_000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{}")
    save_config(debug_config("--output_dir", str(tmp_path), "--train.lr", "0.5"), tmp_path / "config.yaml")
    [diagnostic] = run_check("run directory", lambda: resources.check_run_dir(config))
    assert diagnostic.verdict == "PROBLEM" and "train.lr was 0.5 and is 0.003" in diagnostic.text
    (tmp_path / "file").write_text("")
    [diagnostic] = resources.check_run_dir(debug_config("--output_dir", str(tmp_path / "file" / "run")))
    assert diagnostic.verdict == "PROBLEM" and "is not writable" in diagnostic.text


def test_check_data_reports_other_settings_and_an_unreachable_hub(tmp_path, monkeypatch):
    flags = ("--data.data_dir", str(tmp_path), "--data.max_stories", "60", "--tokenizer.vocab_size", "300")
    config = debug_config(*flags)
    assert "will be created" in next(resources.check_data(config)).text
    prepare_data(config.data, config.tokenizer)
    found = next(resources.check_data(config))
    assert found.verdict == "ok" and "prepared" in found.text and resources.vocab_size(config) == 300
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = debug_config(*flags, "--data.seq_len", "32", "--data.max_stories", "61")
    note, found = run_check("data", lambda: resources.check_data(other))
    assert note.verdict == "note" and found.verdict == "ok"
    assert "will be built again, as data.max_stories is 60 (configured: 61)" in note.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # nothing was built

    class Offline:
        def dataset_info(self, *_, **__):
            raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "HfApi", Offline)
    on_hub = debug_config("--data.source", "roneneldan/TinyStories", "--data.data_dir", str(tmp_path / "hub"))
    [diagnostic] = resources.check_data(on_hub)
    assert diagnostic.verdict == "PROBLEM" and "no route to host" in diagnostic.text
    assert "--data.source builtin" in diagnostic.remedy
    (tmp_path / "hub" / "raw").mkdir(parents=True)
    (tmp_path / "hub" / "raw" / "source.json").write_text("{}")
    assert next(resources.check_data(on_hub)).verdict == "ok"  # offline, but nothing to download


def test_check_data_counts_the_files_that_are_read(tmp_path, monkeypatch):
    mb = 10**6
    sizes = {
        "README.md": 1000,
        "TinyStories-train.txt": 1900 * mb,
        "TinyStories_all_data.tar.gz": 1600 * mb,
        "data/train-00000-of-00002.parquet": 500 * mb,
        "data/train-00001-of-00002.parquet": 490 * mb,
        "data/validation-00000-of-00001.parquet": 10 * mb,
    }
    siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
    card = {}

    class Hub:
        def dataset_info(self, *_, **__):
            return DatasetInfo(id="roneneldan/TinyStories", siblings=siblings, cardData=card)

    monkeypatch.setattr(hub, "HfApi", Hub)
    flags = ["--data.source", "roneneldan/TinyStories", "--data.data_dir", str(tmp_path / "hub")]
    text_only = [{"config_name": "default", "data_files": [{"split": "train", "path": "*.txt"}]}]
    for configs, more, download, disk in (
        ([], [], "1.0 GB", "3.0 GB"),
        ([], ["--data.validation_split", "holdout"], "990 MB", "3.0 GB"),
        (text_only, [], "1.9 GB", "5.7 GB"),
    ):
        card["configs"] = configs
        [diagnostic] = resources.check_data(debug_config(*flags, *more))
        assert f"will be downloaded ({download}); it needs about {disk} of disk" in diagnostic.text
        with monkeypatch.context() as patch:
            patch.setattr(resources, "free_disk", lambda path: 10**6)
            [diagnostic] = resources.check_data(debug_config(*flags, *more, "--data.streaming", "true"))
        assert diagnostic.verdict == "ok"  # however full the disk is
        assert f"will be read over the network ({download} an epoch); of each split" in diagnostic.text
    # `datasets` selects the files of this repository.
    siblings[:] = [{"rfilename": "a.arrow", "size": 7 * mb}, {"rfilename": "notes.txt", "size": mb}]
    assert "(8.0 MB)" in next(resources.check_data(debug_config(*flags))).text
    siblings[0]["rfilename"], card["configs"] = "a.csv", []
    assert "(7.0 MB)" in next(resources.check_data(debug_config(*flags))).text


def test_check_packages_reports_missing_and_old_versions(monkeypatch):
    installed = {"torch": "2.1.0", "datasets": None}
    actual = machine.installed_version
    monkeypatch.setattr(machine, "installed_version", lambda name: installed.get(name, actual(name)))
    wrong = [diagnostic for diagnostic in machine.check_packages() if diagnostic.verdict == "PROBLEM"]
    assert [diagnostic.text.split(",")[0] for diagnostic in wrong] == [
        "datasets is not installed",
        "torch is 2.1.0",
    ]
    assert re.fullmatch(r"python -m pip install 'torch>=[\d.]+'", wrong[1].remedy)


def test_check_threads_reports_idle_cores_and_moving_threads(monkeypatch):
    monkeypatch.setattr(machine, "num_physical_cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(
        machine, "loaded_libraries", lambda: ["/usr/lib/libtcmalloc.so.4", "/opt/libiomp5.so"]
    )
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    few, moving = machine.check_threads(CPU)
    assert (few.verdict, few.remedy) == ("slow", "export OMP_NUM_THREADS=16")
    assert moving.verdict == "slow" and moving.remedy.startswith("export KMP_AFFINITY=")
    assert next(machine.check_allocator()).text == "tcmalloc"


def test_check_load_reports_a_busy_machine(monkeypatch):
    monkeypatch.setattr(machine, "num_physical_cores", lambda: 8)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert next(machine.check_load()).verdict == "ok"
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (7.9, 0.0, 0.0))
    assert next(machine.check_load()).verdict == "slow"


def test_check_device_reports_a_gpu_that_torch_does_not_find(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = by_subject(machine.check_device(CPU))
    assert found["device"].verdict == "PROBLEM" and "pytorch.org" in found["device"].remedy


def test_check_allocator_reports_disabled_huge_pages(monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(machine, "_HUGE_PAGES", setting)
    found = by_subject(machine.check_allocator())
    assert found["huge pages"].remedy == f"echo madvise | sudo tee {setting}"


def test_check_page_faults_recommends_malloc_tunables():
    step = {"backward_s": 0.9, "update_s": 0.1}
    [diagnostic] = dry_run.check_page_faults(
        [dry_run.StepTiming(**step, kernel_s=0.4, page_faults=200_000)] * 3
    )
    assert (diagnostic.verdict, diagnostic.remedy) == ("slow", machine.MALLOC_TUNABLES)
    assert diagnostic.text == "200,000 page faults per step, 40% of its time in the kernel"
    [diagnostic] = dry_run.check_page_faults(
        [dry_run.StepTiming(**step, kernel_s=0.01, page_faults=200_000)] * 3
    )
    assert diagnostic.verdict == "ok"


@pytest.mark.parametrize("flags", [(), ("--model.family", "llama", "--train.optimizer", "muon")])
def test_check_learning_detects_a_model_that_does_not_learn(monkeypatch, flags):
    config = debug_config(*flags)
    [diagnostic] = dry_run.check_learning(config, CPU, "no")
    assert diagnostic.verdict == "ok"
    monkeypatch.setattr(dry_run.TrialRun, "_update", lambda self: None)
    [diagnostic] = dry_run.check_learning(config, CPU, "no")
    assert diagnostic.verdict == "PROBLEM"


def test_check_duration_adds_up_steps_and_evaluations(monkeypatch):
    # One second of forward and backward for a micro-batch of 4 sequences, half a second for the update.
    timing = dry_run.StepTiming(backward_s=1.0, update_s=0.5, kernel_s=0.0, page_faults=0)
    monkeypatch.setattr(dry_run.TrialRun, "timed_step", lambda self: timing)
    monkeypatch.setattr(dry_run, "_validation_tokens", lambda config: 4 * 64 * 30)
    config = debug_config("--train.batch_size", "16", "--train.max_steps", "100", "--train.eval_every", "40")
    found = by_subject(dry_run.check_duration(config, CPU, "no"))
    # 100 x (4 x 1 s + 0.5 s) and 3 x 30 x 1/3 s: 480 s
    assert found["time"].text.startswith("about 8 min on one process: 100 steps of 4.5 s (228 tokens/s)")
    assert found["time"].text.endswith("3 evaluations of 10 s")
    long = debug_config("--train.max_steps", "1000000")
    assert by_subject(dry_run.check_duration(long, CPU, "no"))["time"].verdict == "slow"
    limited = debug_config("--train.max_steps", "1000000", "--train.max_minutes", "5")
    found = by_subject(dry_run.check_duration(limited, CPU, "no"))["time"]
    assert found.verdict == "ok" and "train.max_minutes (5) stops it earlier" in found.text


def test_check_duration_times_part_of_a_slow_micro_batch(monkeypatch):
    config = debug_config("--train.batch_size", "64", "--train.per_device_batch_size", "64")
    monkeypatch.setattr(numerics, "measure_matmul_flops", lambda *_, **__: 1e8 / torch.get_num_threads())
    num_rows = dry_run._timing_batch_size(config, CPU, "no")
    assert 1 <= num_rows < 64
    assert (
        f"timed with a micro-batch of {num_rows}"
        in by_subject(dry_run.check_duration(config, CPU, "no"))["time"].text
    )


@pytest.mark.parametrize("cpu_kernels", ["fused", "torch"])
@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_trial_run_uses_the_kernels_and_precision_of_the_run(cpu_kernels, precision, dtype):
    if cpu_kernels == "fused" and load_kernels(dtype) is None:
        pytest.skip("no C compiler")
    config = debug_config(
        "--train.cpu_kernels", cpu_kernels, "--train.mixed_precision", precision, "--train.optimizer", "muon"
    )
    runtime = resolve_runtime(config, CPU)
    assert runtime.fused == (cpu_kernels == "fused")

    trial = dry_run.TrialRun(config, CPU, precision, num_rows=1, seq_len=16)
    assert {isinstance(layer, FusedDecoderLayer) for layer in trial.model.model.layers} == {runtime.fused}
    assert (trial.model.linear_loss is fused_linear_cross_entropy) == runtime.fused
    assert trial.model.config._attn_implementation == runtime.attention
    _, muon = trial.optimizers
    assert muon.dtype == dtype


def test_trial_run_accepts_the_fallback_of_an_invalid_precision():
    config = debug_config("--train.mixed_precision", "fp16")
    trial = dry_run.TrialRun(config, CPU, numerics.precision_or_fallback(config, CPU), num_rows=1, seq_len=16)
    assert math.isfinite(trial.step())


def test_doctor_rejects_an_invalid_configuration(tmp_path, monkeypatch, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text("train: {max_steps: 5, warmup_steps: 9}\n")
    monkeypatch.setattr("sys.argv", ["doctor.py", "--config", str(path)])
    with pytest.raises(SystemExit) as exit_info:
        run_command(doctor.doctor, DoctorArgs)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: train.warmup_steps (9)")
