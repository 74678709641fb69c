"""The model card of an output: a README.md for the hub, which is generated from the manifest.

Its text does not depend on the time or the machine. `pessa verify --card` writes its results between two comments, so
that all other text, which users may edit, is kept. For the same reason the manifest has no hash of README.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pessa_cli.blocks.seam import TITLES
from pessa_cli.checkpoint.manifest import CARD_FILE
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size, write_file
from pessa_cli.common.text import visible
from pessa_cli.surgery.totals import BLOCKS, cut_kinds, kinds_text, pruned_parts

ORIGINAL_FILE = "README.original.md"  # the card of the source, unchanged
BEGIN, END = "<!-- pessa verify: begin -->", "<!-- pessa verify: end -->"
MOST_BYTES = 2**20  # larger cards are not read
TAKEN_OVER = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "datasets", "tags")
TASKS = (  # by the end of the class name in `architectures`; used if the source's card has no pipeline_tag
    ("WhisperForConditionalGeneration", "automatic-speech-recognition"),
    ("ForCausalLM", "text-generation"),
    ("ForMaskedLM", "fill-mask"),
    ("ForSequenceClassification", "text-classification"),
)
PRODUCTS = "The products W_Q W_K^T and W_V W_O of each head were decomposed by SVD, in float64"
CHANNELS = "The channels of each MLP were ranked by the product of the L2 norms of their weights"
SMALLEST = ", and the smallest were cut"
METHODS = {  # by method and kind of block: what was done, and how it was cut
    ("svd", "attention"): (PRODUCTS, ", and the directions of the smallest singular values were cut"),
    ("svd", "mlp"): (CHANNELS, SMALLEST),
    ("vanilla", "attention"): (
        "The original dimensions of each head were ranked by the product of their L2 norms",
        SMALLEST + ": a baseline, not pessa's own method",
    ),
    ("vanilla", "mlp"): (CHANNELS, SMALLEST),
    ("calibrated", "attention"): (
        PRODUCTS + ", weighted by what real inputs make of them",
        ", the directions that matter least were cut, and W_O was fitted anew",
    ),
    ("calibrated", "mlp"): (
        "The channels of each MLP were ranked by what their removal changes for real inputs",
        ", those that matter least were cut, and the matrix that reads the others was fitted anew",
    ),
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
    """Return the text of README.md.

    summary: the content of the manifest; its hashes are not needed. config: the content of config.json. totals: the
    result of `surgery.totals.totals`. known: the front matter of the source's card. base_model: the hub repository of
    the source, if it is known. original: whether the source's card is stored as README.original.md.
    """
    parts = [
        f"---\n{_front_matter(config, known, base_model)}\n---",
        f"# {_name(base_model or summary['source'])}, {_action(summary, cut_kinds(totals))}",
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
    """Return the name of the transformers class that loads the model."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    return name if name.isascii() and name.isidentifier() else "AutoModel"


def _name(source: str) -> str:
    return _inline(source.rstrip("/").rpartition("/")[2])


def _inline(text: str) -> str:
    """Escape text from outside for one line of Markdown, so that it starts no tag, comment, table cell or new line."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", visible(" ".join(text.split())))


def _action(summary: Mapping[str, Any], kinds: Sequence[str]) -> str:
    """What was done to which kinds of blocks, such as "attention and MLPs pruned"."""
    if summary["command"] == "decompose":
        done = {"attention": "attention decomposed", "mlp": "channels of MLPs sorted"}
        return " and ".join(done[kind] for kind in kinds)
    return f"{kinds_text(kinds)} pruned"


def _size(summary: Mapping[str, Any], totals: Mapping[str, Any]) -> str:
    source, kinds = _inline(summary["source"]), cut_kinds(totals)
    how = f"This is {source} with its {_action(summary, kinds)} by pessa {summary['pessa']}."
    if summary["command"] == "export":
        were = "were" if "mlp" in kinds else "was"
        how = (
            f"This is {source}, whose {kinds_text(kinds)} {were} pruned by pessa, in another layout "
            f"(pessa {summary['pessa']})."
        )
    sentences = [how]
    for kind in kinds:
        done, cut = METHODS[summary["method"], kind]
        sentences.append(f"{done}{'' if summary['command'] == 'decompose' else cut}.")
    sentences.append(f"There was no training{'' if summary['method'] == 'calibrated' else ', and no data were used'}.")
    if "attention" in kinds:
        what = " for attention" if "mlp" in kinds else ""
        sentences.append(f"The method{what} is PESSA, published as [CLOVER](https://arxiv.org/abs/2411.17426).")
    lines = [" ".join(sentences)]
    if summary["command"] == "prune":
        rows = [
            ("parameters", f"{totals['parameters']:,}", f"{totals['parameters_after']:,}"),
            *(
                (f"of the {what} in question", f"{totals[f'{kind}_parameters']:,}",
                 f"{totals[f'{kind}_parameters_after']:,}")
                for kind, what in BLOCKS.items()
                if totals[f"{kind}_parameters"]
            ),
            ("bytes of weights, compact", f"{totals['bytes']:,}", f"{totals['bytes_after']:,}"),
        ]  # fmt: skip
        lines += [
            _table(("", "before", "after"), rows),
            f"The rule was `{summary['rule']}`. It cut {' and '.join(pruned_parts(totals, '({} of this attention)'))}, "
            f"which is {totals['model_pruned']:.2%} of the model.",
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
        f"import pessa_cli  # once, before loading; needs pessa to be installed\nfrom transformers import {kind}", kind
    )


def _code(imports: str, kind: str) -> str:
    return f'```python\n{imports}\n\nmodel = {kind}.from_pretrained("FOLDER")  # or its name on the hub\n```'


def _pruned(summary: Mapping[str, Any]) -> str:
    """Return the table of blocks: the ranks summed over the heads, and the largest norm that a head has lost."""
    rows = []
    for block, ranks in summary["ranks"].items():
        dropped = summary["dropped"].get(block, {})
        for seam in (name for name in TITLES if name in ranks):
            rows.append((block, TITLES[seam], _ranks(ranks[seam]), _norm(dropped.get(seam))))
    heading = "What each block keeps" if summary["command"] == "decompose" else "What was pruned where"
    headings = ("block", "", "kept", "largest norm cut")
    seams = {seam for ranks in summary["ranks"].values() for seam in ranks}
    kept, lost = [], []
    if seams & {"qk", "vo"}:
        kept.append("the directions of all heads together, with the fewest and the most in a head")
        lost.append("of the singular values that the head that lost most has lost")
    if "mlp" in seams:
        kept.append("the channels of an MLP")
        calibrated = summary["method"] == "calibrated"
        values = "what its removal changes in the output" if calibrated else "the product of the norms of its weights"
        lost.append(f"of the values of the channels that the MLP has lost, each {values}")
    text = f"Kept: {', or '.join(kept)}. The norm is that {', or '.join(lost)}."
    if seams & {"qk", "vo"}:
        text += " The figures of each head are in `pessa.json`."
    return f"## {heading}\n\n{text}\n\n{_table(headings, rows)}"


def _ranks(text: str) -> str:
    ranks = [int(rank) for rank in text.split()]
    return f"{sum(ranks)} ({min(ranks)} to {max(ranks)})" if len(ranks) > 1 else text


def _norm(norms: list[float] | None) -> str:
    return f"{max(norms):.3g}" if norms else ""


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _unverified(source: str) -> str:
    return f"Not compared yet. `pessa verify {_inline(source)} FOLDER --card` writes its figures here."


def front_matter(text: str) -> Metadata:
    """Parse the front matter of a card: license, language and other fields that hold strings or lists of strings.

    Returns {} for a card that cannot be parsed. That is no error, because the model does not depend on its card.
    """
    from huggingface_hub import RepoCard

    if not text.lstrip().startswith("---"):
        return {}
    try:
        found = RepoCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # invalid YAML raises errors of many types
        return {}
    return {key: value for key, value in found.items() if key in (*TAKEN_OVER, "base_model") and _plain(value)}


def _plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= 1000 and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and len(value) <= 1000


def is_card(text: str) -> bool:
    """Return whether pessa wrote this README.md: it then has a place for the results of verify."""
    return 0 <= text.find(BEGIN) < text.find(END)


def read_card(folder: Path) -> str:
    """Return the text of a folder's README.md; "" if there is none, or if it is larger than MOST_BYTES."""
    path = folder / CARD_FILE
    try:
        return "" if file_size(path) > MOST_BYTES else path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def check_card(folder: Path) -> None:
    """Raise PessaError if the folder has no README.md with a place for the results of verify."""
    if not is_card(read_card(folder)):
        raise PessaError(
            f"{folder / CARD_FILE} has no place for the results of verify",
            f"add the lines {BEGIN} and {END} where the results should be",
        )


def write_figures(folder: Path, reference: str, rows: Iterable[Iterable[str]], verdict: str) -> None:
    """Write the results of `verify` into the card of a folder, in place of earlier results.

    Raises PessaError if the card has no place for them, or cannot be written.
    """
    check_card(folder)
    text = read_card(folder)
    table = _table(("level", "measure", "worst", "limit", "where"), ([_inline(cell) for cell in row] for row in rows))
    found = f"`pessa verify` against {_inline(reference)}: {_inline(verdict)}\n\n{table}"
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    write_file(folder / CARD_FILE, f"{text[:start]}\n{found}\n{text[end:]}".encode())
