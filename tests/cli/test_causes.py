"""What the command line shows of the causes of an error, and of an error that it did not expect."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from harness import Pessa

from pessa_cli.cli import main as cli
from pessa_cli.cli import prune as commands


def test_the_cause_is_shown_on_request(pessa: Pessa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "r.toml"
    broken.write_text("[prune")
    command = ("run", broken, "model", "-o", tmp_path / "out")
    plain = pessa(*command)
    assert plain.code == 1
    assert "Traceback" not in plain.err
    monkeypatch.setenv(cli.TRACEBACK, "1")
    whole = pessa(*command)
    assert whole.code == 1
    assert "TOMLDecodeError" in whole.err
    assert whole.err.endswith(plain.err)


def test_a_bug_is_called_a_bug(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_path: Path) -> None:
        raise KeyError("nothing expects this")

    monkeypatch.setattr(commands, "load_recipe", broken)
    monkeypatch.setattr(sys, "argv", ["pessa", "run", "r.toml", "model", "-o", "out"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == cli.BUG
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "bug in pessa" in printed


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99"])
def test_every_command_checks_the_device(pessa: Pessa, device: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    for command in (
        ("inspect", "nowhere"),
        ("prune", "nowhere", "--ratio", "0.1", "-o", tmp_path / "out"),
        ("bench", "nowhere", "nowhere"),
        ("eval", "nowhere", "--text", tmp_path / "t.txt"),
    ):
        found = pessa(*command, "--device", device)
        assert (found.code, f"--device {device}" in found.err) == (2, True), found.err


def test_a_missing_path_is_not_taken_for_a_name_on_a_hub(
    pessa: Pessa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "models/none does not exist" in pessa("inspect", "models/none").err
    assert "r.toml does not exist" in pessa("run", "r.toml", "models", "-o", "out").err
