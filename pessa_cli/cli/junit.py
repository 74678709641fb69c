"""Writing a verify report as JUnit XML, for CI systems, which show each check as a test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import visible

if TYPE_CHECKING:
    from pessa_cli.evaluation.report import Report


def check_junit(path: Path) -> None:
    """Raise UsageError if the file cannot be written, before any long work."""
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UsageError(f"--junit {path}: no file can be written there", "give a file in a folder that exists")


def write_junit(path: Path, report: Report) -> None:
    """Write one test case for each check: every head and block, the other tensors, the outputs, and each text.

    Raises PessaError if the file cannot be written.
    """
    failed = sum(not check.passed for check in report.checks)
    suite = ElementTree.Element("testsuite", name="pessa verify", tests=str(len(report.checks)), failures=str(failed))
    for check in report.checks:
        case = ElementTree.SubElement(suite, "testcase", classname=f"pessa.{check.level}", name=visible(check.where))
        if not check.passed:
            ElementTree.SubElement(case, "failure", message=visible(check.finding))
    try:
        ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
    except OSError as error:
        raise PessaError(f"cannot write {path}: {error}", "give --junit a file in a folder that exists") from error
