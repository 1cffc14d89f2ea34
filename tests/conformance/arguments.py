"""The arguments of `mlx-sidecar conformance`, apart from what needs them: other commands start fast."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments of the command."""
    parser.add_argument("--model", metavar="NAME", help="a model that the target can load")
    parser.add_argument("--adapter", metavar="FOLDER", help="a LoRA adapter of that model")
    parser.add_argument(
        "--framing", choices=["ndjson", "lsp", "both"], default="both", help="(default: %(default)s)"
    )
    cutting = parser.add_mutually_exclusive_group()
    for name, help_text in (("whole", "whole messages only"), ("bytewise", "one byte at a time only")):
        cutting.add_argument(f"--{name}", dest="cutting", action="store_const", const=name, help=help_text)
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        default="*",
        help="transcripts by name, with wildcards: 'batch/*'",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=10.0,
        help="for every single wait (default: %(default)s)",
    )
    parser.add_argument("--socket", type=Path, metavar="PATH", help="a Unix socket that a server listens on")
    parser.add_argument(
        "target", nargs="*", metavar="COMMAND", help="after --: a server that speaks over stdin and stdout"
    )
