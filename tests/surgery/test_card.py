"""The model card of an output: its front matter, its text, and the results that `verify --card` writes into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Pessa, TinyFolder, copy_of, is_refusal
from huggingface_hub import ModelCard

from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.card import BEGIN, END, front_matter, is_card, model_card
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run

SOURCE_CARD = """---
license: cc-by-4.0
language: [en, fr]
library_name: sentence-transformers
tags: [speech, tiny]
base_model: someone/else
model-index: [{name: x, results: []}]
widget: [{text: hello}]
---
# The original

Trained on moonlight.
"""


@pytest.fixture
def source(tiny_folder: TinyFolder, place: Path) -> Path:
    folder = copy_of(tiny_folder("whisper"), place / "moonlight")
    (folder / "README.md").write_text(SOURCE_CARD)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture
def out(source: Path, place: Path) -> Path:
    prune_model(open_model(source), place / "out", Rule(rank=5), run=Run(source="owner/moonlight"))
    return place / "out"


def test_a_link_is_the_name_of_its_model(source: Path, place: Path, pessa: Pessa) -> None:
    """What the user calls it, and neither the folder behind it nor a path of this machine."""
    (place / "short").symlink_to(source, target_is_directory=True)
    assert pessa("prune", place / "short", "-o", place / "pruned", "--ratio", "0.3").code == 0
    assert json.loads((place / "pruned" / "pessa.json").read_text())["source"] == "short"
    card = (place / "pruned" / "README.md").read_text()
    assert "short" in card
    assert "moonlight" not in card.replace("Trained on moonlight.", "")
    assert str(place) not in card


def test_the_front_matter_is_that_of_the_source_with_our_tags(out: Path) -> None:
    data = ModelCard.load(out / "README.md").data.to_dict()
    assert data == {
        "base_model": "owner/moonlight",
        "language": ["en", "fr"],
        "library_name": "sentence-transformers",
        "license": "cc-by-4.0",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["speech", "tiny", "pessa", "pruned"],
    }


def test_side_files_and_the_card_of_the_source_are_copied(source: Path, out: Path, pessa: Pessa) -> None:
    assert (out / "README.original.md").read_bytes() == (source / "README.md").read_bytes()
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    manifest = json.loads((out / "pessa.json").read_text())
    assert manifest["source_sha256"]["README.md"] == manifest["sha256"]["README.original.md"]
    assert pessa("verify", out).code == 0


def test_the_text_of_the_card(out: Path) -> None:
    text = (out / "README.md").read_text()
    before, after = open_model(out.parent / "moonlight"), open_model(out)
    assert f"| parameters | {before.parameters:,} | {after.parameters:,} |" in text
    assert f"| bytes of weights, compact | {before.nbytes:,} | {after.nbytes:,} |" in text
    assert "# moonlight, attention pruned" in text
    assert "`rank 5`" in text
    assert "import pessa_cli" in text
    assert 'WhisperForConditionalGeneration.from_pretrained("FOLDER")' in text
    dropped = json.loads((out / "pessa.json").read_text())["dropped"]["decoder.cross.1"]
    lines = [line for line in text.splitlines() if line.startswith("| decoder.cross.1 |")]
    assert lines == [
        f"| decoder.cross.1 | {title} | 20 (5 to 5) | {max(dropped[seam]):.3g} |"
        for seam, title in (("qk", "Q-K"), ("vo", "V-O"))
    ]
    assert "[README.original.md](README.original.md)" in text


def test_the_code_in_the_card_runs(out: Path) -> None:
    text = (out / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(out))
    scope: dict[str, object] = {}
    exec(code, scope)
    assert type(scope["model"]).__name__ == "WhisperForConditionalGeneration"


def test_cards_of_other_layouts_and_commands(out: Path, source: Path, pessa: Pessa, place: Path) -> None:
    export_model(open_model(out), place / "dense", "dense")
    text = (place / "dense" / "README.md").read_text()
    assert "import pessa_cli" not in text
    assert front_matter(text)["base_model"] == "owner/moonlight"  # read from the card of the pruned model
    assert front_matter(text)["tags"] == ["speech", "tiny", "pessa", "pruned"]
    assert (place / "dense" / "README.original.md").read_text() == SOURCE_CARD
    assert pessa("decompose", source, "-o", place / "whole").code == 0
    text = (place / "whole" / "README.md").read_text()
    assert "# moonlight, attention decomposed" in text
    # The source is a folder and not a repository, and the base model in its card is not what was decomposed.
    assert "base_model" not in front_matter(text)
    assert pessa("prune", source, "--ratio", 0.1, "--method", "vanilla", "-o", place / "vanilla").code == 0
    assert "L2 norms" in (place / "vanilla" / "README.md").read_text()


ATTENTION, MLPS = ("W_Q W_K^T", "of the attention blocks", "CLOVER"), ("channels", "of the MLPs")


@pytest.mark.parametrize(
    ("options", "title", "named", "unnamed"),
    [
        (("--rank", 5), "attention pruned", ATTENTION, MLPS),
        (("--mlp-ratio", 0.3), "MLPs pruned", MLPS, (*ATTENTION, "attention")),
        (("--target-layers", 0.7), "attention and MLPs pruned", (*ATTENTION, *MLPS), ()),
        (("--rank", 5, "--sites", "all"), "attention pruned", (*ATTENTION, "0.00% of the channels"), ()),
    ],
    ids=["attention", "MLPs", "both", "MLPs in full"],
)
def test_the_card_names_the_kinds_of_blocks_that_are_cut(
    source: Path,
    place: Path,
    pessa: Pessa,
    options: tuple[object, ...],
    title: str,
    named: tuple[str, ...],
    unnamed: tuple[str, ...],
) -> None:
    assert pessa("prune", source, *options, "-o", place / "out").code == 0
    text = (place / "out" / "README.md").read_text()
    assert f"# moonlight, {title}\n" in text
    assert f"with its {title} by pessa" in text
    assert [each for each in named if each not in text] == []
    assert [each for each in unnamed if each in text] == []
    assert pessa("export", place / "out", "-o", place / "dense").code == 0
    kinds = title.removesuffix(" pruned")
    if "--sites" not in options:
        assert f"whose {kinds} {'were' if 'MLPs' in kinds else 'was'} pruned" in (place / "dense/README.md").read_text()


def test_the_card_of_a_decomposed_model_says_that_nothing_was_cut(source: Path, place: Path, pessa: Pessa) -> None:
    assert pessa("decompose", source, "--sites", "all", "-o", place / "out").code == 0
    text = (place / "out" / "README.md").read_text()
    assert "# moonlight, attention decomposed and channels of MLPs sorted\n" in text
    assert "were cut" not in text.partition("## How to load")[0]


def test_a_source_without_a_card(tiny_folder: TinyFolder, place: Path, pessa: Pessa) -> None:
    assert pessa("prune", tiny_folder("llama"), "--rank", 3, "-o", place / "out").code == 0
    text = (place / "out" / "README.md").read_text()
    assert not (place / "out" / "README.original.md").exists()
    assert "README.original.md" not in text
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pessa", "pruned"],
    }
    assert "0.00% of Q-K" in text


def test_verify_writes_its_results_into_the_card(source: Path, out: Path, pessa: Pessa) -> None:
    card = out / "README.md"
    card.write_text(card.read_text() + "\nMine.\n")  # as a user may edit it
    for _ in range(2):  # the second results replace the first
        result = pessa("verify", source, out, "--card", "--level", "weights")
        assert result.code == 1, result
        text = card.read_text()
        figures = text[text.index(BEGIN) : text.index(END)]
        assert "against moonlight: not the same model" in figures
        assert figures.count("| weights | Q-K, relative error |") == 1
        assert text.endswith("\nMine.\n")
        assert is_card(text)
        assert ModelCard.load(card).data.license == "cc-by-4.0"
    assert pessa("verify", out).code == 0  # the manifest has no hash of the card, which users may edit
    (out / "chat_template.jinja").write_text("changed")
    assert pessa("verify", out).code == 1


def test_cards_without_a_place_for_results(source: Path, out: Path, pessa: Pessa) -> None:
    is_refusal(pessa("verify", out, source, "--card"), "README.md")  # pessa did not write this card
    assert (source / "README.md").read_text() == SOURCE_CARD
    is_refusal(pessa("verify", out, "--card"), "--card", code=2)
    (out / "README.md").unlink()
    assert pessa("verify", out).code == 0
    is_refusal(pessa("verify", source, out, "--card"), "README.md")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no front matter",
        "---\n[a, b]\n---\n",
        "---\n{broken\n---\n",
        "---\nlicense: {a: b}\ntags: [1, 2]\nlanguage: " + "x" * 2000 + "\n---\n",
        "---\nself: 1\n---\n",
        "---\nignore_metadata_errors: 1\n---\n",
        "---\n1: 2\n---\n",
        "---\nlicense: !!python/object/apply:os.system ['false']\n---\n",
        "---\na: &a [x]\nb: &b [*a, *a]\nlicense: *b\n---\n",
        "---\nlicense: " + "[" * 3000 + "\n---\n",
    ],
)
def test_front_matter_that_cannot_be_used_is_ignored(text: str) -> None:
    assert front_matter(text) == {}


def test_names_are_escaped() -> None:
    bad = "a|b](http://x) <script> `x`\n# heading <!-- pessa verify: end -->"
    summary = {
        **{"pessa": "0", "command": "prune", "source": bad, "method": "svd", "rule": "lossless", "layout": "compact"},
        **{"ranks": {"encoder.self.0": {"qk": "1 2", "vo": "0 3"}}, "dropped": {}},
    }
    totals = dict.fromkeys(("parameters", "parameters_after", "attention_parameters", "bytes", "bytes_after"), 10)
    totals |= {
        "attention_parameters_after": 1,
        "mlp_parameters": 0,
        "mlp_parameters_after": 0,
        "qk_pruned": 0,
        "vo_pruned": 0,
        "attention_pruned": 0,
        "model_pruned": 0,
    }
    text = model_card(summary, {"architectures": ["import os; x"]}, totals, {}, None, False)
    assert "<script>" not in text
    assert "\n# heading" not in text
    assert text.count(END) == 1
    assert "import os" not in text
    assert is_card(text)
    assert front_matter(text)["tags"] == ["pessa", "pruned"]
