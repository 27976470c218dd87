"""`weft papers`: every parameter count that the papers print, recomputed and compared."""

from __future__ import annotations

import argparse

from .common import add_json_option, write_json

HELP = "every parameter count that the papers print, recomputed from the real models and compared"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `weft papers`."""
    parser.add_argument("--table", metavar="NAME", help="one table only, for example vera-1")
    add_json_option(parser, "write the rows to this file too")


def run(args: argparse.Namespace) -> int:
    """Returns 0 if every row is reproduced or explained, else 1."""
    from .. import papers

    known = papers.tables()
    chosen = known if args.table is None else [papers.find_table(args.table, known)]
    results = papers.rebuild(chosen)
    print(papers.papers_text(results, forms=args.table is None))
    write_json(args.json, papers.papers_json(results))
    return 1 if any(result.status == "different" for result in results) else 0
