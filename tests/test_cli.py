"""The command line: verbs work on a tiny run, and expected mistakes are one line and exit code 2."""

import json

import pytest
from tiny import corpus

from jaxllm.cli import main

CONFIG = """
from pathlib import Path
from tiny import experiment

def config():
    return experiment(Path({folder!r}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained tiny run: (folder, config file, run directory)."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "config.py"
    config.write_text(CONFIG.format(folder=str(folder)))
    assert main(["train", str(config)]) == 0
    return folder, str(config), str(folder / "run")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def test_train_says_what_matters_and_samples(home, capsys):
    _, config, _ = home
    assert main(["train", config, "log_every=4"]) == 0  # already finished: nothing is trained twice
    out = capsys.readouterr().out
    assert "continuing from step 12" in out
    assert "sample: 'the quick'" in out


def test_generate(home, capsys):
    _, _, run = home
    assert main(["generate", run, "--prompt", "the quick", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    assert main(["generate", run, "--prompt", "a", "--prompt", "b", "--samples", "2", "--max-new-tokens", "4",
                 "--temperature", "1"]) == 0  # fmt: skip


def test_eval_info_data(home, capsys, tmp_path):
    _, config, run = home
    assert main(["eval", run, corpus(tmp_path), "--context", "16"]) == 0
    out = capsys.readouterr().out
    assert "even" in out
    assert "bits per byte" in out
    assert main(["info", config, "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text())["parameters"]["total"] > 0
    assert main(["info", run]) == 0
    assert main(["data", config, "--rows", "1"]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.py"], "does not exist"),
        (["train", "configs/quickstart.py", "optimiser.peak_lr=1"], "did you mean 'optimizer.peak_lr'"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere does not exist"),
        (["plan", "configs/quickstart.py", "--topology", "v5e:3x3"], "v5e"),
        (["info", "nothing"], "nothing"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_mistakes_on_a_run(home, capsys, tmp_path):
    _, _, run = home
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "empty.txt").write_text("")
    for argv, message in [
        (["eval", run, str(tmp_path / "binary.txt")], "binary.txt"),
        (["eval", run, str(tmp_path / "empty.txt")], "empty"),
        (["eval", run, str(tmp_path / "empty.txt"), "--context", "99"], "context=99"),
        (["generate", run, "--prompt", "x " * 100], "context"),
        (["chat", "--model", run], "template"),
    ]:
        assert main(argv) == 2, argv
        assert message in capsys.readouterr().err
