"""Processes of a sweep: how many run at a time, what a failure and a stop do to the others."""

import os
import signal
import sys
import threading
import time

import pytest

from tinystories_slm.errors import UserError
from tinystories_slm.sweeps import processes
from tinystories_slm.sweeps.processes import SweepCommand, Task, check_cores, last_line, run_tasks
from tinystories_slm.training.signals import StopRequest

SAVES = """import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print('on', flush=True)
"""


@pytest.fixture(autouse=True)
def python_programs(monkeypatch):
    """A command's first flag is a program for a small Python."""
    monkeypatch.setattr(
        SweepCommand, "argv", property(lambda self: [sys.executable, "-I", "-S", "-c", *self.flags])
    )


@pytest.fixture
def make_task(tmp_path):
    def make(name: str, *programs: str) -> Task:
        commands = iter([*(SweepCommand(f"step{i}", (code,)) for i, code in enumerate(programs)), None])
        return Task(name, tmp_path / "logs" / f"{name}.log", commands.__next__)

    return make


def run(*groups: list[Task], jobs: int = 1, cores: tuple[int, ...] = ()) -> str | None:
    with StopRequest() as stop:
        run_tasks(groups, jobs=jobs, cores=cores, stop=stop)
    return stop.received


def test_commands_of_a_task_follow_each_other_and_a_failure_ends_only_its_task(make_task, tmp_path):
    fails = "import sys; print('error: no disk', file=sys.stderr); sys.exit(2)"
    tasks = [
        make_task("good", "print('first')", "print('second')"),
        make_task("failing", fails, "print('never')"),
        make_task("bug", "raise KeyError('x')"),
        make_task("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        make_task("last", "print('still')"),
    ]
    run(*[[task] for task in tasks], jobs=2)
    assert [task.problem for task in tasks] == [
        None,
        "no disk",
        "step0: exit code 1 (KeyError: 'x')",
        "step0: ended by SIGKILL",
        None,
    ]
    assert [task.done for task in tasks] == [True, False, False, False, True]
    logs = {path.stem: path.read_text().splitlines() for path in (tmp_path / "logs").iterdir()}
    assert [line for line in logs["good"] if not line.startswith("$")] == ["first", "second"]
    assert logs["good"][0] == "$ python -m tinystories_slm step0 'print('\"'\"'first'\"'\"')'"
    assert logs["killed"][-1] == "error: step0: ended by SIGKILL"  # the next sweep reads it there


@pytest.mark.parametrize(("jobs", "cores", "expected"), [(1, (), 1), (2, (), 2), (1, (0, 0, 0), 3)])
def test_as_many_processes_as_slots_run_at_a_time(make_task, tmp_path, jobs, cores, expected):
    code = (
        "import glob, os, time\n"
        f"open(r'{tmp_path}/%d.on' % os.getpid(), 'w').close(); time.sleep(0.3)\n"
        f"print(len(glob.glob(r'{tmp_path}/*.on')), os.environ.get('OMP_NUM_THREADS'), flush=True)\n"
        f"time.sleep(0.3); os.unlink(r'{tmp_path}/%d.on' % os.getpid())"
    )
    run(*[[make_task(str(index), code)] for index in range(4)], jobs=jobs, cores=cores)
    seen = [last_line(path).split() for path in (tmp_path / "logs").iterdir()]
    assert max(int(count) for count, _ in seen) == expected
    if cores:
        assert {threads for _, threads in seen} == {"1"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_process_is_held_on_its_core(make_task):
    core = min(os.sched_getaffinity(0))
    task = make_task("pinned", "import os; print(os.sched_getaffinity(0))")
    run([task], cores=(core,))
    assert last_line(task.log) == str({core})
    with pytest.raises(UserError, match=r"cores \(9999\): must be among"):
        check_cores([core, 9999])


def test_group_waits_until_all_of_it_can_start(make_task, tmp_path):
    code = f"import time; open(r'{tmp_path}/NAME', 'w').write(str(time.time())); time.sleep(0.5)"
    names = ("alone", "run", "twin")
    alone, pair, twin = (make_task(name, code.replace("NAME", name)) for name in names)
    run([alone], [pair, twin], jobs=2)
    times = {name: float((tmp_path / name).read_text()) for name in names}
    assert times["run"] > times["alone"] + 0.4 and times["twin"] > times["alone"] + 0.4


def test_stop_signal_is_passed_on_and_nothing_more_starts(make_task):
    saving = make_task("saving", SAVES + "time.sleep(60)", "print('never')")
    dying = make_task("dying", "import time; print('on', flush=True); time.sleep(60)")
    waiting = make_task("waiting", "print('never')")

    def stop_when_both_run() -> None:
        while last_line(saving.log) != "on" or last_line(dying.log) != "on":
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_both_run)
    thread.start()
    received = run([saving], [dying], [waiting], jobs=2)
    thread.join()
    assert received == "SIGTERM"
    # The run itself did not fail, whatever its exit code.
    assert [task.problem for task in (saving, dying, waiting)] == [None] * 3
    assert last_line(saving.log) == "on" and not waiting.log.exists()


def test_run_that_was_stopped_alone_is_a_problem(make_task):
    task = make_task("stopped", "import sys; print('stopped after step 3'); sys.exit(75)", "print('never')")
    run([task])
    assert task.problem == "stopped after step 3" and not task.done


def test_every_process_ends_if_the_sweep_raises(make_task, monkeypatch):
    task = make_task("endless", "import time; time.sleep(60)")
    started = []
    popen = processes.subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[0]
    )
    monkeypatch.setattr(processes.time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run([task])
    assert started[0].returncode == -signal.SIGKILL


def test_command_whose_result_is_not_there_is_not_repeated(tmp_path):
    command = SweepCommand("train", ("print('ran')",))
    task = Task("loop", tmp_path / "loop.log", lambda: command)
    run([task])
    assert task.problem == "train ended without an error, but its result is not there"
    assert (tmp_path / "loop.log").read_text().count("ran\n") == 1
