import re
import sys

from experiments.studies import warm_start

TINY = {
    "data.image_size": 16,
    "data.split_seed": 0,
    "model.features": "(4,8)",
    "model.dense": 16,
    "train.epochs": 2,
    "report.detail": "none",
    "report.reference": "false",
}


def test_the_study_prints_the_accuracies_of_three_networks(tmp_path, monkeypatch, capsys):
    flags = [f"--output={tmp_path}", "--source=shapes:200", "--logged=100", "--epochs=1"]
    settings = [f"--config.{key}={value}" for key, value in TINY.items()]
    monkeypatch.setattr(sys, "argv", ["warm_start.py", *flags, *settings])
    warm_start.main()
    table = capsys.readouterr().out
    for name in ("champion", "from scratch", "from the champion"):
        assert re.search(rf"\| {name} \| \d+\.\d% \| \d+\.\d% \| \d+ \|", table)
