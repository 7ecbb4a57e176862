from company import format_table
from harness import Stats


def test_shares_are_of_the_shipped_setting_alone(monkeypatch):
    monkeypatch.setattr("company.num_usable_cores", lambda: 2)
    speeds = {
        ("nothing", "as shipped"): Stats.of([90, 100, 110]),
        ("nothing", "one thread"): Stats.of([60, 60, 60]),
        ("2 programs", "as shipped"): Stats.of([25, 25, 25]),
        ("2 programs", "one thread"): Stats.of([40, 40, 40]),
        ("another run", "as shipped"): Stats.of([45, 45, 45]),
        ("another run", "one thread"): Stats.of([55, 55, 55]),
    }
    assert format_table(speeds, [0, 2], ["as shipped", "one thread"]).splitlines()[2:] == [
        "| nothing | 1.00 | 100 (90 to 110), 1.00 | 60, 0.60 |",
        "| 2 programs | 0.50 | 25, 0.25 | 40, 0.40 |",
        "| another run | 0.50 | 45, 0.45 | 55, 0.55 |",
    ]
