"""The model card of an output: a README.md as the hub shows it, made from what the manifest says.

Nothing in it depends on the clock or the machine. What `verify` finds is put between two comments on request, so
that whatever people write around them stays; README.md has no hash in the manifest, because it is for editing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size

CARD_FILE = "README.md"
ORIGINAL_FILE = "README.original.md"  # the source's own card, byte for byte
BEGIN, END = "<!-- pessa verify: begin -->", "<!-- pessa verify: end -->"
MOST_BYTES = 2**20  # of a card that is read
TAKEN_OVER = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets", "tags")
TASKS = (  # of a class under `architectures`, where the source's card does not say
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ("ForCausalLM", "text-generation"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
)
METHOD_SENTENCES = {
    "svd": "The products W_Q W_K^T and W_V W_O of each head were decomposed by SVD, in float64, and the directions of "
    "the smallest singular values cut, without data and without training.",
    "vanilla": "The original dimensions of each head were ranked by the product of their L2 norms and the smallest "
    "cut, without data and without training: a baseline, not pessa's own method.",
    "calibrated": "The products W_Q W_K^T and W_V W_O of each head were decomposed by SVD, in float64, weighted by "
    "what real inputs make of them, the directions that matter least cut, and W_O fitted anew, without training.",
}
Metadata = dict[str, Any]


def model_card(
    summary: Mapping[str, Any],
    config: Mapping[str, Any],
    totals: Mapping[str, Any],
    known: Metadata,
    base_model: str | None,
    original: bool,
) -> str:
    """The whole README.md.

    summary: the manifest, hashes not needed. totals: as `report.totals` counts. known: the front matter of the
    source's card. base_model: the repository that the source is or was made from, if there is one. original: whether
    the source's card lies beside this one.
    """
    parts = [
        f"---\n{_front_matter(config, known, base_model)}\n---",
        f"# {_name(base_model or summary['source'])}, {_deed(summary)}",
        _size(summary, totals),
        _loading(config, summary["layout"]),
        _pruned(summary),
        f"## Compared with the original\n\n{BEGIN}\n{_unverified(base_model or summary['source'])}\n{END}",
    ]
    if original:
        parts.append(
            "## The original\n\n"
            f"What the original's authors say about training, intended use and limits is in [{ORIGINAL_FILE}]"
            f"({ORIGINAL_FILE}). Results reported there are the original's."
        )
    return "\n\n".join(parts) + "\n"


def _front_matter(config: Mapping[str, Any], known: Metadata, base_model: str | None) -> str:
    from huggingface_hub import ModelCardData

    found = {key: known[key] for key in TAKEN_OVER if key in known}
    found.setdefault("library_name", "transformers")
    found.setdefault("pipeline_tag", next((task for end, task in TASKS if _kind(config).endswith(end)), None))
    tags = found.get("tags", [])
    found["tags"] = [*([tags] if isinstance(tags, str) else tags), "pessa", "pruned"]
    return str(ModelCardData(base_model=base_model, **found).to_yaml())


def _kind(config: Mapping[str, Any]) -> str:
    """The class in transformers to load the model with."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return name if name.isascii() and name.isidentifier() else "AutoModel"


def _name(source: str) -> str:
    return _inline(source.rstrip("/").rpartition("/")[2])


def _inline(text: str) -> str:
    """Text from outside in a line of Markdown: nothing in it starts a tag, a comment, a table cell or a new line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _deed(summary: Mapping[str, Any]) -> str:
    return "attention decomposed" if summary["command"] == "decompose" else "attention pruned"


def _size(summary: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    source = _inline(summary["source"])
    how = f"This is {source} with its {_deed(summary)} by pessa {summary['pessa']}"
    if summary["command"] == "export":
        how = f"This is {source}, whose attention was pruned by pessa, in another layout (pessa {summary['pessa']})"
    lines = [
        f"{how}. {METHOD_SENTENCES[summary['method']]} The method is PESSA, published as "
        "[CLOVER](https://arxiv.org/abs/2411.17426).",
    ]
    if summary["command"] == "prune":
        rows = [
            ("parameters", f"{totals['parameters']:,}", f"{totals['parameters_after']:,}"),
            ("of the attention blocks in question", f"{totals['attention_parameters']:,}",
             f"{totals['attention_parameters_after']:,}"),
            ("bytes of weights, compact", f"{totals['bytes']:,}", f"{totals['bytes_after']:,}"),
        ]  # fmt: skip
        lines += [
            _table(("", "before", "after"), rows),
            f"The rule was `{summary['rule']}`. It cut {totals['qk_pruned']:.2%} of Q-K and "
            f"{totals['vo_pruned']:.2%} of V-O, which is "
            f"{totals['attention_pruned']:.2%} of this attention and {totals['model_pruned']:.2%} of the model.",
        ]
    return "\n\n".join(lines)


def _loading(config: Mapping[str, Any], layout: str) -> str:
    kind = _kind(config)
    if layout == "dense":
        why = (
            "All shapes are the original's, with zeros where something was cut: whatever loads the original loads this."
        )
        return f"## How to load\n\n{why}\n\n" + _code(f"from transformers import {kind}", kind)
    why = (
        "This is the compact layout: pruned projections are stored smaller, and `pessa` tells transformers how. Where "
        "that cannot be, `pessa export FOLDER -o dense/ --layout dense` writes the same numbers in original shapes."
    )
    return f"## How to load\n\n{why}\n\n" + _code(
        f"import pessa_cli  # once, before loading; pip install pessa\nfrom transformers import {kind}", kind
    )


def _code(imports: str, kind: str) -> str:
    return f'```python\n{imports}\n\nmodel = {kind}.from_pretrained("FOLDER")  # or its name on the hub\n```'


def _pruned(summary: Mapping[str, Any]) -> str:
    """A row for each block: what stays of all heads together, and the norm of what each head lost at most."""
    rows = []
    for block, ranks in summary["ranks"].items():
        dropped = summary["dropped"].get(block, {})
        cells = [cell for side in ("qk", "vo") for cell in (_ranks(ranks[side]), _norm(dropped.get(side)))]
        rows.append((block, *cells))
    heading = "What each block keeps" if summary["command"] == "decompose" else "What was pruned where"
    headings = ("block", "Q-K directions", "largest norm cut", "V-O directions", "largest norm cut")
    return (
        f"## {heading}\n\nDirections kept of all heads together, with the fewest and the most in a head; and the norm "
        "of what the head that lost most has lost, as a change of its W_Q W_K^T or W_V W_O. Each head's own figures "
        f"are in `pessa.json`.\n\n{_table(headings, rows)}"
    )


def _ranks(text: str) -> str:
    ranks = [int(rank) for rank in text.split()]
    return f"{sum(ranks)} ({min(ranks)} to {max(ranks)})"


def _norm(norms: list[float] | None) -> str:
    return f"{max(norms):.3g}" if norms else ""


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _unverified(source: str) -> str:
    return f"Not compared yet. `pessa verify {_inline(source)} FOLDER --card` writes its figures here."


def front_matter(text: str) -> Metadata:
    """What a card says about license, language and the like: strings and lists of strings, nothing else.

    A card that cannot be read says nothing; it comes from anywhere, and the model is as good without it.
    """
    from huggingface_hub import RepoCard

    if not text.lstrip().startswith("---"):
        return {}
    try:
        found = RepoCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # YAML has many ways to be wrong
        return {}
    return {key: value for key, value in found.items() if key in (*TAKEN_OVER, "base_model") and _plain(value)}


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and len(value) <= 1000


def is_card(text: str) -> bool:
    """Whether pessa wrote this README.md: it has the place for verify's figures."""
    return 0 <= text.find(BEGIN) < text.find(END)


def read_card(folder: Path) -> str:
    """The README.md of a folder; empty where there is none, or one too large to be one."""
    path = folder / CARD_FILE
    try:
        return "" if file_size(path) > MOST_BYTES else path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check_card(folder: Path) -> None:
    """Raise PessaError when the folder has no card with a place for verify's figures."""
    if not is_card(read_card(folder)):
        raise PessaError(
            f"{folder / CARD_FILE} has no place for the figures of verify",
            f"it is between the lines {BEGIN} and {END}; put them where the figures should be",
        )


def write_figures(folder: Path, reference: str, rows: Iterable[Iterable[str]], verdict: str) -> None:
    """Put what `verify` found into the card of a folder, in place of what was found before."""
    check_card(folder)
    text = read_card(folder)
    table = _table(("level", "measure", "worst", "limit", "where"), ([_inline(cell) for cell in row] for row in rows))
    found = f"`pessa verify` against {_inline(reference)}: {_inline(verdict)}\n\n{table}"
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = folder / f".{CARD_FILE}.new"
    try:
        new.write_text(f"{text[:start]}\n{found}\n{text[end:]}", encoding="utf-8")
        new.replace(folder / CARD_FILE)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise PessaError(f"could not write {folder / CARD_FILE}: {error}", "see what is wrong there") from error
