import pytest
from matplotlib.figure import Figure

from tinystories_slm.training.watching import tracking
from tinystories_slm.training.watching.record import read_metrics
from tinystories_slm.training.watching.tracking import RunRecord


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    record = RunRecord(tmp_path)
    for step in (10, 20, 30):
        record.log({"train/loss": 1.0 / step}, step=step, tokens=step * 7)
        record.sample(f"Story of {step}.\n\n## step 99\nThe end.", step=step)
    with record.metrics_path.open("a") as file:
        file.write('{"step": 31, "tok')  # the process died here

    again = RunRecord(tmp_path, step=20)
    assert [line["step"] for line in read_metrics(again.metrics_path)] == [10, 20]
    assert "Story of 20" in again.samples_path.read_text()
    assert "Story of 30" not in again.samples_path.read_text()
    again.log({"train/loss": 0.5}, step=30, tokens=210)
    assert [line["step"] for line in read_metrics(again.metrics_path)] == [10, 20, 30]


def test_other_processes_write_nothing(tmp_path):
    record = RunRecord(tmp_path, written=False)
    record.log({"train/loss": 1.0}, step=1, tokens=1)
    record.sample("A story.", step=1)
    record.plot()
    assert list(tmp_path.iterdir()) == []


def test_the_plot_shows_what_was_logged_and_the_entropy(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.update(figure=figure, path=path))
    monkeypatch.setattr(tracking, "write_report", lambda run_dir: drawn.update(report=run_dir))
    record = RunRecord(tmp_path, entropy=0.25)
    for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
        record.log({"train/loss": loss}, step=step, tokens=step)
    record.log({"val/loss": 1.5}, step=3, tokens=3)
    record.plot()

    lines = {line.get_label(): line.get_xydata().tolist() for line in drawn["figure"].axes[0].lines}
    assert lines["training"] == [[1, 4.0], [2, 2.0], [3, 1.0]]
    assert lines["validation"] == [[3, 1.5]]
    assert {y for _, y in lines["the corpus's entropy"]} == {0.25}
    assert drawn["path"] == tmp_path / "loss.png"
    assert drawn["report"] == tmp_path


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run_and_a_full_disk_does(
    tmp_path, monkeypatch, caplog
):
    record = RunRecord(tmp_path)
    record.log({"train/loss": 1.0}, step=1, tokens=1)
    failures = iter([ZeroDivisionError("a fault of ours"), OSError("No space left on device")])

    def fail(run_dir):
        raise next(failures)

    monkeypatch.setattr(tracking, "write_report", fail)
    record.plot()
    assert "report.html could not be drawn; the run goes on" in caplog.text
    with pytest.raises(OSError, match="No space left"):
        record.plot()
