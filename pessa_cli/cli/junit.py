"""Writing a verify report as JUnit XML, for CI systems, which show each check as a test."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pessa_cli.common.errors import UsageError
from pessa_cli.common.files import check_writable, whole_file
from pessa_cli.common.text import visible

if TYPE_CHECKING:
    from pessa_cli.evaluation.report import Report


def check_junit(path: Path) -> None:
    """Raise UsageError if the file cannot be written or is not a report to be replaced, before any long work."""
    check_writable(path, "--junit")
    if path.is_file() and path.read_bytes()[:5] not in (b"", b"<?xml"):
        raise UsageError(f"--junit {path} exists, and is not an XML file", "give another file, or delete that one")


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
    with whole_file(path, "--junit") as file:
        ElementTree.ElementTree(suite).write(file, encoding="utf-8", xml_declaration=True)
