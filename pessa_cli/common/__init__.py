"""Helpers that every other package may import: errors, options, progress, message text, threads and lazy exports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.common.errors import PessaError as PessaError
    from pessa_cli.common.errors import PessaWarning as PessaWarning
    from pessa_cli.common.errors import UsageError as UsageError
    from pessa_cli.common.files import FULL_DISK as FULL_DISK
    from pessa_cli.common.files import TEMPORARY as TEMPORARY
    from pessa_cli.common.files import check_file as check_file
    from pessa_cli.common.files import check_there as check_there
    from pessa_cli.common.files import check_writable as check_writable
    from pessa_cli.common.files import disk_error as disk_error
    from pessa_cli.common.files import file_size as file_size
    from pessa_cli.common.files import is_there as is_there
    from pessa_cli.common.files import reason as reason
    from pessa_cli.common.files import rename_new as rename_new
    from pessa_cli.common.files import sync_folder as sync_folder
    from pessa_cli.common.files import whole_file as whole_file
    from pessa_cli.common.files import write_file as write_file
    from pessa_cli.common.jobs import in_order as in_order
    from pessa_cli.common.jobs import one_thread as one_thread
    from pessa_cli.common.lazy import lazy_exports as lazy_exports
    from pessa_cli.common.memory import MORE_MEMORY as MORE_MEMORY
    from pessa_cli.common.memory import out_of_memory as out_of_memory
    from pessa_cli.common.memory import raise_if_out_of_memory as raise_if_out_of_memory
    from pessa_cli.common.options import Range as Range
    from pessa_cli.common.options import Setting as Setting
    from pessa_cli.common.options import at_least as at_least
    from pessa_cli.common.options import check_options as check_options
    from pessa_cli.common.options import made as made
    from pessa_cli.common.options import option as option
    from pessa_cli.common.options import settings_of as settings_of
    from pessa_cli.common.packages import need as need
    from pessa_cli.common.progress import Progress as Progress
    from pessa_cli.common.progress import Tick as Tick
    from pessa_cli.common.progress import quietly as quietly
    from pessa_cli.common.text import badness as badness
    from pessa_cli.common.text import json_text as json_text
    from pessa_cli.common.text import listed as listed
    from pessa_cli.common.text import read_text as read_text
    from pessa_cli.common.text import shortened as shortened
    from pessa_cli.common.text import visible as visible
    from pessa_cli.common.toml import from_table as from_table
    from pessa_cli.common.toml import read_toml as read_toml
    from pessa_cli.common.values import check_device as check_device
    from pessa_cli.common.values import parse_layers as parse_layers
    from pessa_cli.common.values import size_of as size_of
    from pessa_cli.common.version import VERSION as VERSION
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "errors": ["PessaError", "PessaWarning", "UsageError"],
            "files": [
                "FULL_DISK",
                "TEMPORARY",
                "check_file",
                "check_there",
                "check_writable",
                "disk_error",
                "file_size",
                "is_there",
                "reason",
                "rename_new",
                "sync_folder",
                "whole_file",
                "write_file",
            ],
            "jobs": ["in_order", "one_thread"],
            "lazy": ["lazy_exports"],
            "memory": ["MORE_MEMORY", "out_of_memory", "raise_if_out_of_memory"],
            "options": ["Range", "Setting", "at_least", "check_options", "made", "option", "settings_of"],
            "packages": ["need"],
            "progress": ["Progress", "Tick", "quietly"],
            "text": ["badness", "json_text", "listed", "read_text", "shortened", "visible"],
            "toml": ["from_table", "read_toml"],
            "values": ["check_device", "parse_layers", "size_of"],
            "version": ["VERSION"],
        },
    )
