from tinystories_slm.training.tracking import RunRecord, read_metrics


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
