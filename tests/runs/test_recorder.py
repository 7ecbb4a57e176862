import pytest
from matplotlib.figure import Figure

from tinystories_slm.runs import recorder as recorder_module
from tinystories_slm.runs.recorder import RunRecorder


def test_resumed_recorder_deletes_later_records(tmp_path):
    recorder = RunRecorder(tmp_path)
    for step in (10, 20, 30):
        recorder.log({"train/loss": 1.0 / step}, step=step, tokens=step * 7)
        recorder.log_sample(f"Story of {step}.\n\n## step 99\nThe end.", step=step)
    with recorder.run_dir.metrics.open("a") as file:
        file.write('{"step": 31, "tok')  # the process was killed here

    resumed = RunRecorder(tmp_path, step=20)
    assert [line["step"] for line in resumed.run_dir.read_metrics()] == [10, 20]
    assert "Story of 20" in resumed.run_dir.samples.read_text()
    assert "Story of 30" not in resumed.run_dir.samples.read_text()
    resumed.log({"train/loss": 0.5}, step=30, tokens=210)
    assert [line["step"] for line in resumed.run_dir.read_metrics()] == [10, 20, 30]


def test_disabled_recorder_writes_nothing(tmp_path):
    recorder = RunRecorder(tmp_path, enabled=False)
    recorder.log({"train/loss": 1.0}, step=1, tokens=1)
    recorder.log_sample("A story.", step=1)
    recorder.plot()
    assert list(tmp_path.iterdir()) == []


def test_plot_contains_logged_losses_and_entropy(tmp_path, monkeypatch):
    drawn = {}

    def save(figure, path, **_):
        path.write_bytes(b"a plot")
        drawn.update(figure=figure)

    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(recorder_module, "write_report", lambda run_dir: drawn.update(report=run_dir))
    recorder = RunRecorder(tmp_path, entropy=0.25)
    for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
        recorder.log({"train/loss": loss}, step=step, tokens=step)
    recorder.log({"val/loss": 1.5}, step=3, tokens=3)
    recorder.plot()

    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn["figure"].axes[0].lines}
    assert lines["training"] == [[1, 4.0], [2, 2.0], [3, 1.0]]
    assert lines["validation"] == [[3, 1.5]]
    assert {y for _, y in lines["corpus entropy"]} == {0.25}
    assert (tmp_path / "loss.png").read_bytes() == b"a plot"
    assert drawn["report"] == tmp_path


def test_full_disk_stops_the_run_and_other_plot_errors_do_not(tmp_path, monkeypatch, caplog):
    recorder = RunRecorder(tmp_path)
    recorder.log({"train/loss": 1.0}, step=1, tokens=1)
    failures = iter([ZeroDivisionError("a bug"), OSError("No space left on device")])

    def fail(run_dir):
        raise next(failures)

    monkeypatch.setattr(recorder_module, "write_report", fail)
    recorder.plot()
    assert "report.html could not be written; training continues" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        recorder.plot()
