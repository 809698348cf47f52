# SPDX-License-Identifier: Apache-2.0
"""The command line of what renders a run into a page, between two markers."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(doc: str | None, begin: str, end: str, render: Callable[[dict[str, Any]], str]) -> int:
    """doc: the help; render: a run to text, or ValueError. The exit code: 0, 1 if --check finds a difference, 2 for a
    wrong call or run."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what bench/run.py --json wrote")
    parser.add_argument("--readme", type=Path, help=f"the file whose text between {begin} and {end} is replaced")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the text differs")
    arguments = parser.parse_args()
    if arguments.check and arguments.readme is None:
        parser.error("--check needs --readme")
    try:
        text = render(json.loads(arguments.json.read_text()))
    except ValueError as problem:
        print(f"{arguments.json}: {problem}", file=sys.stderr)
        return 2
    if arguments.readme is None:
        print(text, end="")
        return 0
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    old = arguments.readme.read_text()
    if len(marked.findall(old)) != 1:
        parser.error(f"{arguments.readme}: expected {begin} and {end} once, found {len(marked.findall(old))} pairs")
    new = marked.sub(lambda _: f"{begin}\n{text}{end}", old)
    if new == old:
        return 0
    if arguments.check:
        print(f"{arguments.readme}: the text differs from {arguments.json}; run without --check", file=sys.stderr)
        return 1
    arguments.readme.write_text(new)
    return 0
