import json
from dataclasses import replace

import along_the_way
import pytest


@pytest.mark.slow
def test_quick_run_measures_each_kept_step(tmp_path, monkeypatch):
    config_of = along_the_way.config_of

    def small(folder, num_steps, num_stories):
        config = config_of(folder, num_steps, num_stories)
        model = replace(config.model, num_hidden_layers=1, hidden_size=32)
        data = replace(config.data, seq_len=64)
        return replace(config, model=model, data=data)

    monkeypatch.setattr(along_the_way, "config_of", small)
    along_the_way.main(["--quick", "--folder", str(tmp_path)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [step["step"] for step in result["steps"]] == [0, 1, 2, 4]
    assert [canary["count"] for canary in result["canaries"]] == [0, 4, 64]
    assert all(len(step["exposure"]) == 3 and 4 < step["loss"] < 9 for step in result["steps"])
    assert (tmp_path / "along_the_way.png").stat().st_size > 5000
