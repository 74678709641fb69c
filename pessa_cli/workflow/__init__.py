"""One function for each command, for the command line and for Python: inspect, decompose, prune, export, verify."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.workflow.inspect import InspectedBlock as InspectedBlock
    from pessa_cli.workflow.inspect import InspectedSeam as InspectedSeam
    from pessa_cli.workflow.inspect import Inspection as Inspection
    from pessa_cli.workflow.recipe import Recipe as Recipe
    from pessa_cli.workflow.recipe import load_recipe as load_recipe
    from pessa_cli.workflow.steps import Overview as Overview
    from pessa_cli.workflow.steps import TooLittleData as TooLittleData
    from pessa_cli.workflow.steps import check_output as check_output
    from pessa_cli.workflow.steps import named as named
    from pessa_cli.workflow.steps import opened as opened
    from pessa_cli.workflow.verify import Verification as Verification
    from pessa_cli.workflow.verify import verify_files as verify_files
    from pessa_cli.workflow.written import WrittenModel as WrittenModel
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "inspect": ["InspectedBlock", "InspectedSeam", "Inspection"],
            "recipe": ["Recipe", "load_recipe"],
            "steps": ["Overview", "TooLittleData", "check_output", "named", "opened"],
            "verify": ["Verification", "verify_files"],
            "written": ["WrittenModel"],
        },
    )
