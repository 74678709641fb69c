"""Names and values from files are shown as they are: no markup, no control characters, no lines of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from harness import WEIGHTS, Pessa, TinyFolder, copy_of, is_refusal
from safetensors.torch import load_file, save_file

from pessa_cli.common.text import json_text, visible
from pessa_cli.surgery.card import BEGIN, END

ODD = {
    "markup": "a[/b]",
    "an open style": "[bold red]a",
    "an emoji by name": ":warning:",
    "a link": "[link=file:///x]a[/link]",
    "a backslash": "a\\[b]",
}
STEERING = {
    "an escape sequence": "a\x1b[2Jb",
    "the same in one byte": "a\x9b2Jb",
    "right to left": "a\u202eb",
    "a line of ours": "a\nerror: b",
    "a carriage return": "a\rb",
    "a zero width space": "a\u200bb",
    "a line separator": "a\u2028b",
}


@pytest.mark.parametrize("kind", ODD)
def test_verify_names_a_tensor_as_it_is(kind: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    model, name = copy_of(tiny_folder("bert"), place / "model"), ODD[kind]
    save_file(load_file(model / WEIGHTS) | {name: torch.zeros(1)}, model / WEIGHTS)
    report = place / "report.xml"
    result = pessa("verify", tiny_folder("bert"), model, "--level", "weights", "--junit", report)
    assert result.code == 1
    assert name in result.out
    assert "Traceback" not in result.err
    failures = [case.get("message", "") for case in ElementTree.parse(report).iter("failure")]
    assert any(name in message for message in failures)


@pytest.mark.parametrize("kind", STEERING)
def test_names_of_folders_do_not_steer_the_terminal(
    kind: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    name = STEERING[kind]
    model, out = copy_of(tiny_folder("bert"), place / f"model{name}"), place / f"out{name}"
    done = pessa("prune", model, "-o", out)
    assert done.code == 0
    refused = pessa("prune", model, "-o", out)
    is_refusal(refused, f"out{visible(name)} ")
    shown = pessa("inspect", out)
    assert visible(name) in shown.out
    verified = pessa("verify", model, out, "--level", "weights", "--card", "--junit", place / "report.xml")
    assert verified.code == 0
    document = pessa("inspect", out, "--json").out
    assert json.loads(document)["model"] == str(out)
    card = (out / "README.md").read_text(encoding="utf-8")
    for text in (done.out, done.err, refused.err, shown.out, verified.out, verified.err, document, card):
        assert name not in text
        assert all(character.isprintable() or character == "\n" for character in text)
    assert BEGIN in card
    assert END in card
    ElementTree.parse(place / "report.xml")


def test_values_in_errors_do_not_steer_the_terminal(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    for number, name in enumerate((*STEERING.values(), *ODD.values(), "\ud800", "x" * 5000)):
        model = copy_of(tiny_folder("bert"), place / f"model{number}")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": name}))
        result = pessa("inspect", model)
        is_refusal(result, "is not supported")
        assert len(result.err) < 6000
        assert all(character.isprintable() or character == "\n" for character in result.err)


def test_a_name_of_bytes_that_are_no_text(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    """Python reads such a name with lone surrogates, which no encoding can write."""
    model = Path(os.fsdecode(os.fsencode(place) + b"/model\xff"))
    copy_of(tiny_folder("bert"), model)
    result = pessa("inspect", model)
    assert result.code == 0
    assert "model\\udcff" in result.out
    assert json.loads(pessa("inspect", model, "--json").out)["model"] == str(model)


def test_long_names(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    model = copy_of(tiny_folder("bert"), place / ("m" * 250))
    assert "m" * 250 in pessa("inspect", model).out
    for length in (255, 300, 5000):
        result = pessa("inspect", place / ("x" * length))
        is_refusal(result, "x" * 255)
        assert len(result.err) < 5000


def test_the_escapes() -> None:
    for character in map(chr, (*range(0x300), 0x200B, 0x202E, 0x2028, 0xD800, 0xFEFF, 0xE0001, 0x1F600)):
        shown = visible(f"<{character}>")
        assert shown.isprintable()
        assert (shown == f"<{character}>") == character.isprintable()
        value = {character: [character]}
        text = json_text(value)
        assert all(letter.isprintable() or letter == "\n" for letter in text)
        assert json.loads(text) == value
    assert visible("what\n  a\n  b") == "what\n  a\n  b"
    assert visible("what\nhint: b") == "what\\nhint: b"
