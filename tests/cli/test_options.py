"""Options are defined once, as dataclass fields, from which the command line, recipes and Python take them."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from inspect import unwrap
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import typer
from harness import Pessa
from packages import SOURCE

from pessa_cli.cli.expand import Given, Only, with_options
from pessa_cli.cli.inspect import inspect
from pessa_cli.cli.main import app
from pessa_cli.cli.options import RunOptions, SourceOptions
from pessa_cli.cli.prune import prune
from pessa_cli.cli.tune import tune
from pessa_cli.common.errors import UsageError
from pessa_cli.common.options import Setting, option, settings_of
from pessa_cli.common.toml import from_table
from pessa_cli.evaluation.limits import VerifyOptions
from pessa_cli.ranks.rule import CRITERIA, OF_MLPS, Rule
from pessa_cli.tuning.options import AdapterOptions, DataOptions, TrainOptions, Tuning, load_tuning
from pessa_cli.workflow.recipe import Recipe, load_recipe

COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "prune": prune, "tune": tune}
# The parameters that a command itself declares, except the model; the others are fields of dataclasses.
OWN = {
    "inspect": {"curve", "plot", "json"},
    "prune": {"out", "json"},
    "tune": {"data", "out", "recipe", "eval_data", "tensorboard", "json"},
}
TABLES: dict[str, type] = {
    "prune": Recipe,
    "verify": VerifyOptions,
    "adapter": AdapterOptions,
    "data": DataOptions,
    "train": TrainOptions,
}
DEFINED = (Rule, Recipe, VerifyOptions, AdapterOptions, DataOptions, TrainOptions, RunOptions, SourceOptions)


def options_of(command: str) -> dict[str, Any]:
    """Return the parameters of a command in typer by name, without the model and --help."""
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    return {each.name: each for each in parameters if each.name not in ("model", "help")}


def fields_of(command: str) -> Iterator[tuple[Setting, bool]]:
    """Yield the fields that are options of a command, and whether the command gets only options that are given."""
    for hint in get_type_hints(unwrap(COMMANDS[command]), include_extras=True).values():
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        only = next((note.names for note in notes if isinstance(note, Only)), None)
        given = next((note.kind for note in notes if isinstance(note, Given)), None)
        if given is not None or is_dataclass(kind):
            for setting in settings_of(given or kind):
                if (only is None or setting.name in only) and not setting.option.recipe_only:
                    yield setting, given is not None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_one_field_of_one_dataclass(command: str) -> None:
    found = {name: each for name, each in options_of(command).items() if name not in OWN[command]}
    defined: dict[str, list[tuple[Setting, bool]]] = {}
    for setting, given in fields_of(command):
        defined.setdefault(setting.name, []).append((setting, given))
    assert set(found) == set(defined)
    assert set(options_of(command)) - set(found) == OWN[command]
    for name, each in found.items():
        [(setting, given)] = defined[name]  # exactly one field
        assert tuple(each.opts) == setting.flags, name
        assert each.help == setting.option.help
        if given or setting.items is not None:
            assert each.default is None
        else:
            assert each.default == (setting.default if setting.option.parse is None else setting.option.shown)


def test_prune_and_tune_have_every_field() -> None:
    for command, kind in (("prune", Recipe), ("prune", RunOptions), ("prune", SourceOptions), ("tune", Tuning)):
        wanted = {setting.name for setting in settings_of(kind) if not setting.option.recipe_only}
        assert wanted <= set(options_of(command)), kind
    assert "verify" not in options_of("prune")
    assert not {"mask_prompt", "weight_decay", "max_grad_norm", "options"} & set(options_of("tune"))


def test_help_texts_are_sentences_and_occur_once() -> None:
    """Two fields with the same help text would be one option that is defined twice."""
    strings: Counter[str] = Counter()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        strings.update(value for value in constants if isinstance(value, str))
    for kind in DEFINED:
        for setting in settings_of(kind):
            text = setting.option.help
            assert strings[text] == 1, text
            assert re.match(r"[A-Za-z]", text), text
            assert text.endswith("."), text
            assert len(text.split()) > 2, text


@pytest.mark.parametrize(
    "kind", [Rule, Recipe, AdapterOptions, DataOptions, TrainOptions], ids=lambda kind: str(kind.__name__)
)
def test_no_module_but_the_dataclass_lists_its_fields(kind: type) -> None:
    """A list, set or dict with the names of its fields would be a second definition; a few names are no problem."""
    names = {each.name for each in fields(kind)}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            items = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
            listed = {item.value for item in items if isinstance(item, ast.Constant)} & names
            assert len(listed) <= max(2, len(names) // 3), (
                f"{path.name}:{getattr(node, 'lineno', 0)} lists {sorted(map(str, listed))}"
            )


def example_of(setting: Setting) -> tuple[str, Any]:
    """Return a value of an option that is not its default, as TOML and as the value of the field."""
    if setting.choices:
        value = next(choice for choice in setting.choices if choice != setting.default)
        return f'"{value}"', value
    if setting.option.parse is not None:
        text = {"layers": "0-2,5", "target_size": "1.5 MB"}[setting.name]
        return f'"{text}"', {"layers": frozenset({0, 1, 2, 5}), "target_size": 1_500_000}[setting.name]
    if setting.items is not None:
        return '["a", "b"]', (setting.items("a"), setting.items("b"))
    plain: dict[Any, tuple[str, Any]] = {
        bool: (str(not setting.default).lower(), not setting.default),
        int: ("7", 7),
        float: ("0.25", 0.25),
        str: ('"1%"', "1%"),
        Path: ('"some/file"', Path("some/file")),
    }
    return plain.get(setting.kind, ("{ r = 3 }", {"r": 3}))


def loaded(table: str, line: str, tmp_path: Path) -> Any:
    """Load a recipe with this line in a table, and return the dataclass of the table."""
    path = tmp_path / "recipe.toml"
    path.write_text(f"[{table}]\n{line}\n")
    if table in ("prune", "verify"):
        recipe = load_recipe(path)
        return recipe if table == "prune" else recipe.verify
    return getattr(load_tuning(path), table)


# Fields that are invalid alone, and the line that a recipe needs as well.
BESIDE = {
    "max_wer_increase": 'evaluate = "data"',
    "max_ppl_increase": 'evaluate = "data"',
    "evaluate": "max_wer_increase = 1",
    "uniform": "target_params = 0.5",
    "max_error": 'calibrate = ["data"]',
    "augment": 'calibrate = ["data"]',
    "seconds": "target_flops = 0.5",
    "tokens": "target_flops = 0.5",
}


@pytest.mark.parametrize(
    ("table", "name"), [(table, setting.name) for table, kind in TABLES.items() for setting in settings_of(kind)]
)
def test_every_field_is_a_key_of_recipes(table: str, name: str, tmp_path: Path) -> None:
    setting = next(setting for setting in settings_of(TABLES[table]) if setting.name == name)
    text, value = example_of(setting)
    found = loaded(table, f"{name} = {text}\n{BESIDE.get(name, '')}", tmp_path)
    owner = found if hasattr(found, name) else found.rule
    assert getattr(owner, name) == value
    assert value != setting.default
    wrong = "[1]" if setting.items is None else "3"
    found_type = "a list" if setting.items is None else "an integer"
    with pytest.raises(UsageError, match=rf"recipe\.toml: {name} = {re.escape(wrong)} is {found_type}") as refused:
        loaded(table, f"{name} = {wrong}", tmp_path)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("give ")


@pytest.mark.parametrize(
    ("line", "found", "wanted"),
    [
        ("rank = 2.5", "a number", "an integer"),
        ("rank = true", "true or false", "an integer"),
        ("qk_thr = '0.3'", "a string", "a number"),
        ("qk_thr = [0.3]", "a list", "a number"),
        ("qk_thr = { value = 0.3 }", "a table", "a number"),
        ("qk_thr = 2026-11-26", "a date or time", "a number"),
        ("sequential = 1", "an integer", "true or false"),
        ("layers = 3", "an integer", "a string"),
        ("calibrate = 'a.txt'", "a string", "a list of strings"),
        ("target_size = true", "true or false", "an integer or a string"),
    ],
)
def test_both_types_are_named(line: str, found: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf" is {found}$") as refused:
        loaded("prune", line, tmp_path)
    assert refused.value.hint == f"give {wanted}"


@pytest.mark.parametrize("table", TABLES)
def test_other_keys_are_refused(table: str, tmp_path: Path) -> None:
    for key in ("nonsense", "rule", "out"):
        with pytest.raises(UsageError, match=rf"\[{table}\] has no key '{key}'") as refused:
            loaded(table, f"{key} = 1", tmp_path)
        assert refused.value.hint == f"it has {', '.join(setting.name for setting in settings_of(TABLES[table]))}"


AGREEING = {
    "thresholds": (
        "--qk-thr 5e-3 --vo-thr 6e-3 --sites encoder.self,decoder.cross",
        'qk_thr = 5e-3\nvo_thr = 6e-3\nsites = ["encoder.self", "decoder.cross"]',
        Recipe(Rule(qk_thr=5e-3, vo_thr=6e-3), sites=("encoder.self", "decoder.cross")),
    ),
    "size": (
        "--target-size 1.5MB --round-to 4 --layers 0-1,3 --layout dense",
        'target_size = "1.5 MB"\nround_to = 4\nlayers = "0-1,3"\nlayout = "dense"',
        Recipe(Rule(target_size=1_500_000, round_to=4), layers=frozenset({0, 1, 3}), layout="dense"),
    ),
    "size in bytes": ("--target-size 1.5MB", "target_size = 1500000", Recipe(Rule(target_size=1_500_000))),
    "lossless": ("--lossless --min-rank 2", "lossless = true\nmin_rank = 2", Recipe(Rule(lossless=True, min_rank=2))),
    "data": (
        "--calibrate a.txt --calibrate b --statistics c --sequential --rank 3",
        'calibrate = ["a.txt", "b"]\nstatistics = ["c"]\nsequential = true\nrank = 3',
        Recipe(Rule(rank=3), calibrate=(Path("a.txt"), Path("b")), statistics=(Path("c"),), sequential=True),
    ),
    "search": (
        "--max-ppl-increase 1% --evaluate text.txt",
        'max_ppl_increase = "1%"\nevaluate = "text.txt"',
        Recipe(max_ppl_increase="1%", evaluate=Path("text.txt")),
    ),
    "vanilla": (
        "--method vanilla --ratio 0.5",
        'method = "vanilla"\nratio = 0.5',
        Recipe(Rule(ratio=0.5), method="vanilla"),
    ),
    "nothing": ("", "", Recipe()),
}


class StoppedError(Exception):
    """Raised instead of running the command."""


@pytest.mark.parametrize("case", AGREEING)
def test_options_recipes_and_python_give_the_same_recipe(
    case: str, pessa: Pessa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, toml, expected = AGREEING[case]
    path, seen = tmp_path / "recipe.toml", []

    def stopped(_model: str, _out: Path, recipe: Recipe, *_: Any, **__: Any) -> None:
        seen.append(recipe)
        raise StoppedError

    monkeypatch.setattr("pessa_cli.workflow.prune.prune", stopped)
    path.write_text(f"[prune]\n{toml}\n")
    for line in (f"prune model -o out {options}", f"run {path} model -o out"):
        with pytest.raises(StoppedError):
            pessa(*line.split())
    assert seen == [expected, expected]


def test_options_of_tune_override_its_recipe(tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "recipe.toml", []
    path.write_text("[adapter]\nmethod = 'lora'\nrank = 4\n[train]\nepochs = 3\nbatch = 2\n[data]\npacking = true\n")

    def stopped(tuning: Tuning, **given: Any) -> Tuning:
        seen.append((tuning, given))
        raise StoppedError

    monkeypatch.setattr(Tuning, "changed", stopped)
    with pytest.raises(StoppedError):
        pessa(*f"tune model --data d -o out --recipe {path} --rank 8 --lr 1e-2 --targets q_proj, --seed 0".split())
    [(tuning, given)] = seen
    assert tuning == Tuning(
        AdapterOptions(method="lora", rank=4), DataOptions(packing=True), TrainOptions(epochs=3, batch=2)
    )
    assert given == {"rank": 8, "learning_rate": 1e-2, "targets": ("q_proj", ""), "seed": 0}


# Errors for fields that are defined wrongly


@dataclass(frozen=True)
class WithoutHelp(Rule):
    surprise: float = 0.5


@dataclass(frozen=True)
class EmptyHelp(Recipe):
    surprise: float = option(0.5, " ")


@pytest.mark.parametrize("kind", [WithoutHelp, EmptyHelp])
def test_a_field_without_a_help_text_is_refused(kind: type) -> None:
    def command(options: Any) -> None: ...

    command.__annotations__["options"] = kind
    for use in (settings_of, lambda k: from_table(k, Path("recipe.toml"), "prune", {})):
        with pytest.raises(TypeError, match=f"{kind.__name__}.surprise has no help text"):
            use(kind)
    with pytest.raises(TypeError, match=f"{kind.__name__}.surprise has no help text"):
        with_options(command)


def test_a_field_of_an_unsupported_type_is_refused() -> None:
    @dataclass
    class Mixed:
        value: int | str = option(1, "A number or a word.")

    Mixed.__annotations__["value"] = int | str
    with pytest.raises(TypeError, match="is not the type of an option"):
        settings_of(Mixed)


def test_two_options_of_the_same_name_are_refused() -> None:
    def command(rule: Rule, recipe: Annotated[Recipe, Only("rank", "sites")]) -> None: ...

    command.__annotations__ |= {"rule": Rule, "recipe": Annotated[Recipe, Only("rank", "sites")]}
    with pytest.raises(ValueError, match="duplicate parameter name: 'rank'"):
        with_options(command)


def test_a_field_that_does_not_exist_is_refused() -> None:
    def command(recipe: Annotated[Recipe, Only("sight")]) -> None: ...

    command.__annotations__["recipe"] = Annotated[Recipe, Only("sight")]
    with pytest.raises(ValueError, match=r"Recipe has no options \['sight'\]"):
        with_options(command)


# Rules


@pytest.mark.parametrize(("one", "other"), list(combinations(CRITERIA, 2)), ids=lambda setting: setting.name)
def test_rules_that_exclude_each_other(one: Setting, other: Setting) -> None:
    values = {setting.name: example_of(setting)[1] for setting in (one, other)}
    if {one.name, other.name} == {"qk_thr", "vo_thr"}:
        assert Rule(**values).given == ["qk_thr", "vo_thr"]
        return
    with pytest.raises(UsageError, match="cannot be combined") as refused:
        Rule(**values)
    assert all(setting.flag in refused.value.message for setting in (one, other))


@pytest.mark.parametrize("name", ["qk_thr", "vo_thr", "ratio", "max_error"])
def test_zero_is_a_value_that_is_given(name: str) -> None:
    zero: dict[str, Any] = {name: 0}
    rule = Rule(**zero)
    assert rule.given == [name]
    assert str(rule) == f"{name} 0"
    with pytest.raises(UsageError, match="cannot be combined"):
        Rule(**zero, rank=3)


@pytest.mark.parametrize("setting", settings_of(Rule), ids=lambda setting: setting.name)
def test_a_rule_in_words_names_every_field(setting: Setting) -> None:
    """These texts are stored in pessa.json and must not change."""
    value = example_of(setting)[1]
    alone = {setting.name: value}
    if setting in (*CRITERIA, *OF_MLPS) and setting.name != "lossless":
        assert str(Rule(**alone)) == f"{setting.name} {value:.12g}"
    elif setting.name == "uniform":
        assert str(Rule(target_params=0.5, uniform=True)) == "target_params 0.5, uniform"
    elif setting.name in ("seconds", "tokens"):
        assert str(Rule(target_flops=0.5, **alone)) == f"target_flops 0.5, {setting.name} {value:g}"
    elif setting.name == "lossless":
        assert str(Rule(lossless=True)) == str(Rule()) == "lossless"
    else:
        assert str(Rule(**alone)) == f"lossless, {setting.name} {value:g}"
        assert str(Rule(ratio=0.5, **alone)) == f"ratio 0.5, {setting.name} {value:g}"


@pytest.mark.parametrize(
    ("kind", "setting"),
    [(kind, s) for kind in (Rule, TrainOptions, VerifyOptions) for s in settings_of(kind) if s.kind in (int, float)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_numbers_have_ranges(kind: type, setting: Setting) -> None:
    if setting.name == "seed":
        return
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=re.escape(f"{setting.flag} {value}")):
            kind(**{setting.name: value})
    plain = Rule(target_flops=0.5) if BESIDE.get(setting.name) == "target_flops = 0.5" else kind()
    assert replace(plain, **{setting.name: example_of(setting)[1]}) != plain


@pytest.mark.parametrize(
    "kind", [Recipe, VerifyOptions, DataOptions, TrainOptions], ids=lambda kind: str(kind.__name__)
)
def test_choices_are_checked_in_python_too(kind: type) -> None:
    chosen = [setting for setting in settings_of(kind) if setting.choices]
    assert chosen
    for setting in chosen:
        with pytest.raises(UsageError, match=f"{setting.flag} 'magic' is not known"):
            kind(**{setting.name: "magic"})
