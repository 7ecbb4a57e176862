from company import _format_table
from harness import Stats


def test_shares_are_of_the_first_setting_alone(monkeypatch):
    monkeypatch.setattr("company.num_usable_cores", lambda: 2)
    speeds = {
        (0, "as shipped"): Stats.of([90, 100, 110]),
        (0, "one thread"): Stats.of([60, 60, 60]),
        (2, "as shipped"): Stats.of([25, 25, 25]),
        (2, "one thread"): Stats.of([40, 40, 40]),
    }
    assert _format_table(speeds, [0, 2], ["as shipped", "one thread"]).splitlines()[2:] == [
        "| 0 | 1.00 | 100 (90 to 110), 1.00 | 60, 0.60 |",
        "| 2 | 0.50 | 25, 0.25 | 40, 0.40 |",
    ]
