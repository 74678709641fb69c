"""Run PEFT's own tests, unedited, with pessa's methods in place of PEFT's.

    python scripts/peft_tests.py            # all tests that are parametrised with methods
    python scripts/peft_tests.py --quick    # one case of each method on a toy model and on a tiny LLaMA

The tests come with PEFT's source distribution, which pip downloads once into the cache ($PESSA_CACHE, by default
~/.cache/pessa). They are parametrised with lists of configurations and of models on the hub: this module, as a plugin
of pytest, replaces the contents of those lists by pessa's configurations and by tiny models that it builds, before the
tests are collected, and keeps only the tests that use one of pessa's configurations. Packages that the tests import but
do not need here (diffusers, datasets) are replaced by empty modules, so only pytest has to be installed.

A test may fail only if EXPLAINED below has an entry for it; every other failure is a failure of this run, and so is an
entry that matches no failure in a full run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pessa_cli.common.errors import PessaError

if TYPE_CHECKING:
    import pytest

SUITES = ("custom", "decoder", "encoder_decoder", "feature_extraction", "seq_classifier")
FILES = {name: f"test_{name}{'' if name == 'seq_classifier' else '_models'}.py" for name in SUITES}
STAND_INS = {"diffusers": ("StableDiffusionPipeline",), "datasets": ("load_dataset",)}

# Expected failures: a regular expression on "file.py::test[parameters]", and why the failure is correct.
EXPLAINED: tuple[tuple[str, str], ...] = (
    (
        r"custom_models.py::test_load_model_low_cpu_mem_usage\[PiCa shared",
        "everything up to its last step passes; the last step injects into a bare model unless the method's class "
        "declares shared state, and whether PiCa shares state depends on its configuration: it raises a clear error",
    ),
    (
        # The fifth configuration is the one with sharing.
        r"::test_training(_decoders|_encoder_decoders)?_layer_indexing\[PicaConfig-config_kwargs4-",
        "it expects fewer trained tensors for the first layer than for all layers, but a shared M is one tensor in "
        "both cases; the test skips PEFT's own methods with shared state by their names",
    ),
    (
        r"custom_models.py::test_parameters_after_loading_model\[SORSA",
        "SGD with a learning rate of 0.5 on inputs up to 90 makes the product of three trained factors infinite, and "
        "NaN compares unequal; the test lowers the rate for eight of PEFT's own methods, by their names",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """The names of the tests by their result."""

    passed: list[str]
    skipped: list[str]
    failed: dict[str, str]  # with the last line of the error

    @property
    def explained(self) -> dict[str, str]:
        """The failures that EXPLAINED expects, with the reasons."""
        reasons = {name: reason for name in self.failed for pattern, reason in EXPLAINED if re.search(pattern, name)}
        return dict(sorted(reasons.items()))

    @property
    def unexplained(self) -> dict[str, str]:
        return {name: error for name, error in sorted(self.failed.items()) if name not in self.explained}

    @property
    def stale(self) -> list[str]:
        """The entries of EXPLAINED that match no failure."""
        return [pattern for pattern, _ in EXPLAINED if not any(re.search(pattern, name) for name in self.failed)]


def source(cache: Path) -> Path:
    """Return the folder in the cache with the tests of the installed PEFT version; downloads them if missing."""
    name = f"peft-{metadata.version('peft')}"
    place = cache / name
    if place.is_dir():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        request = ["--no-build-isolation", "--no-binary", ":all:", "--dest", work, name.replace("-", "==")]
        if subprocess.run([*pip, *request], check=False).returncode:
            raise PessaError(
                f"pip could not download the source of {name}", "check whether the package index can be reached"
            )
        with tarfile.open(Path(work) / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
        (Path(work) / name / "tests" / "__init__.py").touch()
        with suppress(OSError):  # a concurrent run was faster
            (Path(work) / name).rename(place)
    return place


def run(suites: list[str], quick: bool, jobs: int, more: list[str]) -> Outcome:
    """Run PEFT's tests with pessa's methods and return the outcome; `more` are further arguments for pytest."""
    cache = Path(os.environ.get("PESSA_CACHE") or Path.home() / ".cache" / "pessa").absolute()
    root = source(cache)
    with tempfile.TemporaryDirectory(prefix="pessa-peft-") as work:
        models, report, settings = Path(work) / "models", Path(work) / "report.xml", Path(work) / "pytest.ini"
        build_models(models)
        settings.write_text("[pytest]\naddopts =\n")
        paths = os.pathsep.join([str(Path(__file__).resolve().parent), str(root)])
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "PESSA_PEFT_MODELS": str(models),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-p", "peft_tests", "-c", str(settings), f"--rootdir={root}"]
        command += ["-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", f"--junitxml={report}", *more]
        command += ["--quick"] * quick + (["-n", str(jobs)] if jobs > 1 else ["-p", "no:xdist"])
        files = [str(root / "tests" / FILES[suite]) for suite in suites]
        subprocess.run([*command, *files], env=environment, check=False)
        return read(report)


def read(report: Path) -> Outcome:
    """Read pytest's JUnit report. Raises FileNotFoundError if pytest failed before it wrote one."""
    outcome = Outcome([], [], {})
    for case in ElementTree.parse(report).iter("testcase"):
        file = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), "")
        name = f"{file}.py::{case.get('name')}"
        broken = next((child for child in case if child.tag in ("failure", "error")), None)
        if broken is not None:
            outcome.failed[name] = (broken.get("message") or "").partition("\n")[0]
        elif case.find("skipped") is not None:
            outcome.skipped.append(name)
        else:
            outcome.passed.append(name)
    return outcome


def build_models(folder: Path) -> None:
    """Build tiny models of the tested architectures, with names that contain the parts PEFT's tests look for."""
    import torch
    import transformers

    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    feed = {"intermediate_size": 48, "max_position_embeddings": 64}
    llama = transformers.LlamaConfig(**ids, **sizes, **feed, num_key_value_heads=2)
    opt = transformers.OPTConfig(**ids, **sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
    gpt2 = transformers.GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    bert = transformers.BertConfig(**ids, **sizes, **feed)
    roberta = transformers.RobertaConfig(**{**ids, "pad_token_id": 1, "bos_token_id": 0}, **sizes, **feed)
    t5 = transformers.T5Config(
        **ids, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=0
    )
    bart = transformers.BartConfig(
        **ids,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    configs = {"Llama": llama, "OPT": opt, "GPT2": gpt2, "Bert": bert, "Roberta": roberta, "T5": t5, "Bart": bart}
    for names in MODELS.values():
        for name in names:
            kind = name.removeprefix("tiny-random-")
            config = next(value for key, value in configs.items() if kind.startswith(key))
            getattr(transformers, kind)(config).save_pretrained(folder / name)


MODELS = {
    "decoder": ("tiny-random-LlamaForCausalLM", "tiny-random-OPTForCausalLM", "tiny-random-GPT2LMHeadModel"),
    "encoder_decoder": ("tiny-random-T5ForConditionalGeneration", "tiny-random-BartForConditionalGeneration"),
    "feature_extraction": ("tiny-random-BertModel", "tiny-random-RobertaModel"),
    "seq_classifier": ("tiny-random-BertForSequenceClassification", "tiny-random-LlamaForSequenceClassification"),
}
MODEL_LISTS = {
    "decoder": "PEFT_DECODER_MODELS_TO_TEST",
    "encoder_decoder": "PEFT_ENCODER_DECODER_MODELS_TO_TEST",
    "feature_extraction": "PEFT_FEATURE_EXTRACTION_MODELS_TO_TEST",
    "seq_classifier": "PEFT_SEQ_CLS_MODELS_TO_TEST",
}
TASKS = {
    "decoder": "CAUSAL_LM",
    "encoder_decoder": "SEQ_2_SEQ_LM",
    "feature_extraction": "FEATURE_EXTRACTION",
    "seq_classifier": "SEQ_CLS",
}
# PESSA's default choice of modules needs an architecture that it knows.
OTHER_TARGETS = {
    ("decoder", "PESSA"): ["q_proj", "k_proj", "v_proj", "c_attn"],
    ("encoder_decoder", "PESSA"): ["q", "k", "v", "q_proj", "k_proj", "v_proj"],
    ("feature_extraction", "PESSA"): ["key", "value"],
}


# The pytest plugin.


def configurations(quick: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield a name, class and keyword arguments for every method and its variants, small enough for PEFT's models."""
    from pessa_cli.tuning.tuner_lora_xs import LoraXsConfig
    from pessa_cli.tuning.tuner_pica import PicaConfig
    from pessa_cli.tuning.tuner_sorsa import MiloraConfig, SorsaConfig
    from pessa_cli.tuning.tuner_svft import SvftConfig

    yield "PESSA", _pessa_config(), {}
    yield "SORSA", SorsaConfig, {"r": 4}
    yield "MiLoRA", MiloraConfig, {"r": 4}
    yield "PiCa", PicaConfig, {"r": 4, "share": False}
    yield "PiCa shared", PicaConfig, {"r": 4, "share": True}
    yield "SVFT", SvftConfig, {}
    yield "LoRA-XS", LoraXsConfig, {"r": 4}
    if not quick:
        yield "SVFT banded", SvftConfig, {"pattern": "banded"}
        yield "SVFT random", SvftConfig, {"pattern": "random", "band": 2}
        yield "SVFT top-k", SvftConfig, {"pattern": "top-k", "r": 8}


def _pessa_config() -> Any:
    """Return PESSA's configuration class with heads of size two, since PEFT's toy models have no attention heads."""
    from pessa_cli.tuning.tuner_pessa import PessaTunerConfig

    @dataclass
    class HeadsOfTwo(PessaTunerConfig):
        head_dim: int | None = 2

    return HeadsOfTwo


def custom_cases(quick: bool) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Return the rows for TEST_CASES: name, toy model, class, keyword arguments."""
    targets: tuple[tuple[str, dict[str, Any]], ...] = (
        ("MLP", {"target_modules": ["lin0", "lin1"]}),
        ("MLP", {"target_modules": "lin0"}),
        ("MLP", {"target_modules": ["lin1"]}),
        ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("EmbConv1D", {"target_modules": ["conv1d"]}),
    )
    seen = set()
    for name, kind, options in configurations(quick):
        few = quick or kind in seen
        seen.add(kind)
        for i, (model, target) in enumerate(targets[:1] if few else targets):
            heads = {"head_dim": 1} if (name, model) == ("PESSA", "EmbConv1D") else {}  # a layer with one row
            yield f"{name} {i} {model}", model, kind, {**target, **options, **heads}


def replace_cases(module: ModuleType, suite: str, quick: bool) -> None:
    """Replace the cases in the lists of one of PEFT's test modules, in place, because decorators refer to the lists."""
    lists: Any = module
    if suite == "custom":
        cases = list(custom_cases(quick))
        lists.TEST_CASES[:] = cases
        lists.ALL_PEFT_CONFIG_CLASSES[:] = list(dict.fromkeys(kind for _, _, kind, _ in cases))
        same, other = {"target_modules": ["lin0"], "init_weights": False}, {"target_modules": ["lin1"]}
        pairs = [("Same", same, same), ("Different", same, {**same, **other})]
        lists.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
            (f"{name} {how}", kind.method, kind, {**options, **first}, {**options, **second})
            for name, kind, options in configurations(quick)
            for how, first, second in pairs
        ]
        lists.MIXED_ADAPTER_TEST_CASES[:] = [
            (f"{name} mixed", kind(**options, **same), kind(**options, **same))
            for name, kind, options in configurations(quick)
        ]
        return
    folder = Path(os.environ["PESSA_PEFT_MODELS"])
    getattr(lists, MODEL_LISTS[suite])[:] = [str(folder / name) for name in MODELS[suite][: 1 if quick else None]]
    lists.ALL_CONFIGS[:] = [
        (kind, {"task_type": TASKS[suite], "target_modules": OTHER_TARGETS.get((suite, name)), **options})
        # These tests do not check anything in which the variants differ.
        for name, kind, options in configurations(quick=True)
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of each method")


def pytest_configure(config: pytest.Config) -> None:  # noqa: ARG001
    for name, attributes in STAND_INS.items():
        if name not in sys.modules:
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            for attribute in attributes:
                setattr(module, attribute, type(attribute, (), {}))
            sys.modules[name] = module
    import pessa_cli  # noqa: F401  # registers our methods once PEFT is imported


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> None:  # noqa: ARG001
    """Replace the cases when a module has been imported but none of its tests has been parametrised."""
    module = getattr(collector, "module", None)
    suite = next((key for key, file in FILES.items() if module and Path(str(module.__file__)).name == file), None)
    if suite is not None and not hasattr(module, "_pessa_cases"):
        assert isinstance(module, ModuleType)
        module.__dict__["_pessa_cases"] = True
        replace_cases(module, suite, collector.config.getoption("--quick"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that have one of pessa's configurations among their parameters."""
    from pessa_cli.tuning.tuner_base import TunerConfig

    def ours(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        kinds = [value if isinstance(value, type) else type(value) for value in values]
        return any(issubclass(kind, TunerConfig) for kind in kinds)

    config.hook.pytest_deselected(items=[item for item in items if not ours(item)])
    items[:] = [item for item in items if ours(item)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES) + " (default: all)")
    parser.add_argument("--quick", action="store_true", help="one case of each method, on the first two suites")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("-k", dest="expression", help="run only matching tests, as pytest's -k")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.suites) - set(SUITES)):
        parser.error(f"no suite {unknown[0]}: give {', '.join(SUITES)}")
    more = ["-k", arguments.expression] if arguments.expression else []
    suites = list(SUITES[:2] if arguments.quick else SUITES)
    try:
        outcome = run(arguments.suites or suites, arguments.quick, arguments.jobs, more)
    except PessaError as error:
        print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    report(outcome, print)
    whole = not (arguments.suites or arguments.quick or arguments.expression)
    if whole and outcome.stale:
        print("entries of EXPLAINED that match no failure: " + ", ".join(outcome.stale))
    return 1 if outcome.unexplained or not outcome.passed or (whole and outcome.stale) else 0


def report(outcome: Outcome, say: Callable[[str], object]) -> None:
    """Pass the failures with their explanations, and then the counts, to `say` line by line."""
    for name, reason in outcome.explained.items():
        say(f"explained: {name}: {reason}")
    for name, error in outcome.unexplained.items():
        say(f"FAILED: {name}: {error}")
    passed, failed = len(outcome.passed), len(outcome.failed)
    say(
        f"PEFT {metadata.version('peft')}: {passed + failed} run, {passed} passed, {len(outcome.explained)} explained, "
        f"{len(outcome.unexplained)} failed; {len(outcome.skipped)} skipped by PEFT itself"
    )


if __name__ == "__main__":
    sys.exit(main())
