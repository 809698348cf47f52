# SPDX-License-Identifier: Apache-2.0
"""Compress long user histories into a few hundred tokens (HiSAC, arXiv 2602.21009).

  item embeddings --fit--> codebook
  x --encode--> codes --vote--> interest-agents --route--> tokens

Exit codes: 0; 2 for bad input (one line); 130 if interrupted; 141, without a word, if nobody reads what is printed.
"""  # the head of --help; the ends are the docstrings of `files` and of the commands

import argparse
import inspect
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hisac

from . import commands, demo, files


def line(text: str) -> str:
    """A message as one line that any terminal can print: names come from files and from the file system."""
    text = files.cut(" ".join(text.split()), 1000)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose texts keep their lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {line(message)} (see {self.prog} --help)\n")


def numbers(text: str) -> tuple[int, ...]:
    """'512,512' -> (512, 512)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas, such as 512,512, got {text!r}") from None


def whole(text: str) -> int:
    """A number from 1 to a million."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= 10**6):
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1,000,000, got {text!r}")
    return int(text)


def make_parser() -> Parser:
    parser = Parser(prog="python -m hisac", description=__doc__, epilog=files.__doc__)
    parser.add_argument("--version", action="version", version=f"hisac {hisac.__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def verb(name: str, run: Callable[..., None], text: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=inspect.getdoc(run))
        p.set_defaults(run=run)
        p.add_argument("--threads", type=whole, metavar="N", help="threads to use (default: all processors)")
        return p

    p = verb("demo", demo.run, "the whole way on a bundled sample of purchases, in seconds: start here")
    p.add_argument("--quick", action="store_true", help="a few requests only; its numbers mean little")
    p.add_argument("--png", default="hisac-demo.png", metavar="PATH", help="picture to write (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the codebook, the requests and the negatives (default: 0)")

    p = verb("fit", commands.fit, "learn a codebook from item embeddings")
    p.add_argument("spec", metavar="X", help="embeddings [items, width]")
    p.add_argument("-o", "--out", required=True, metavar="BOOK", help="codebook to write, .safetensors")
    p.add_argument("--sizes", type=numbers, metavar="C,C", help="codes a level (default: 512,512, or those of --init)")
    p.add_argument("--iterations", type=whole, metavar="N", help="most rounds a level (default: 20, or 5 with --init)")
    p.add_argument("--seed", type=int, default=0, help="of the first codes (default: 0)")
    p.add_argument("--init", metavar="OLD", help="codebook to begin with, whose codes keep their numbers")
    p.add_argument("--weights", metavar="W", help="what each row of X counts in means [items]")

    p = verb("encode", commands.encode, "give each embedding its codes, one a level")
    p.add_argument("path", metavar="BOOK", help="codebook of `fit`")
    p.add_argument("spec", metavar="X", help="embeddings [rows, width]")
    p.add_argument("-o", "--out", required=True, metavar="CODES", help="codes to write, .npz, .safetensors or .npy")

    p = verb("compress", commands.compress, "turn each user's history into tokens")
    p.add_argument("path", metavar="BOOK", help="codebook of `fit`")
    p.add_argument("--x", dest="spec", required=True, metavar="X", help="semantic embeddings [rows, width]")
    p.add_argument("--v", metavar="V", help="what is aggregated [rows, width] (default: x)")
    p.add_argument("--codes", metavar="CODES", help="codes of X, of `encode` (default: encode x now)")
    p.add_argument("--unchecked-codes", action="store_true", help="take CODES without the fingerprint of a codebook")
    p.add_argument("--item", metavar="IDS", help="item of each behaviour, or a list of items for each user")
    p.add_argument("--x-item", metavar="IDS", help="item of each row of X (default: 0, 1, 2, ..)")
    p.add_argument("--v-item", metavar="IDS", help="item of each row of V (default: as X)")
    users = p.add_mutually_exclusive_group()
    users.add_argument("--user", metavar="IDS", help="user of each behaviour, or of each list of items")
    users.add_argument("--offsets", metavar="OFFSETS", help="[users + 1]: user b has rows OFFSETS[b] .. OFFSETS[b + 1]")
    rule = p.add_mutually_exclusive_group(required=True)
    rule.add_argument("--budget", type=whole, metavar="M", help="M tokens a user, seats in proportion to votes")
    rule.add_argument("--fanout", type=numbers, metavar="K,K", help="children kept a node and level (the paper's rule)")
    rule.add_argument("--beam", type=numbers, metavar="K,K", help="most voted nodes kept a level; the last is M")
    p.add_argument("--temperature", type=float, metavar="TAU", help="softness of routing (default: the codebook's)")
    p.add_argument("--normalize", choices=("history", "agents"), default="agents", help="default: agents")
    p.add_argument("--sparse", type=whole, metavar="K", help="route a behaviour to K agents near its code, if faster")
    p.add_argument("-o", "--out", required=True, metavar="TOKENS", help="tokens to write, .npz or .safetensors")

    p = verb("migrate", commands.migrate, "map the codes of a codebook to those of the one after it")
    p.add_argument("path", metavar="OLD", help="codebook of `fit`")
    p.add_argument("new", metavar="NEW", help="codebook of `fit --init OLD`")
    p.add_argument("--x", dest="spec", required=True, metavar="X", help="embeddings [items, width]")
    p.add_argument("--votes", metavar="V", help="what each item counts [items], such as its clicks (default: 1)")
    p.add_argument("-o", "--out", required=True, metavar="MAP", help="map to write, .npz or .safetensors")

    p = verb("bundle", commands.bundle, "keep a codebook with its items in one folder, and add new ones")
    p.add_argument("path", metavar="BUNDLE", help="folder")
    p.add_argument("--x", dest="spec", required=True, metavar="X", help="embeddings [items, width]")
    p.add_argument("--item", required=True, metavar="IDS", help="item of each row of X")
    p.add_argument("--book", metavar="BOOK", help="codebook of `fit`, for a new folder")

    p = verb("inspect", commands.inspect, "the health of a codebook: use of codes, dead codes, collisions, error")
    p.add_argument("path", metavar="BOOK", help="codebook of `fit`")
    p.add_argument("--x", dest="spec", metavar="X", help="embeddings [items, width] to try it on")
    for name in ("fit", "encode", "compress", "migrate", "bundle", "inspect"):
        verbs.choices[name].add_argument("--scale", metavar="S", help="of X of int8: a number, or an array [rows of X]")
    return parser


def main(argv: list[str] | None = None) -> int:
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")  # a path need not be UTF-8
    try:
        options = vars(make_parser().parse_args(argv))
        command, run, threads = options.pop("command"), options.pop("run"), options.pop("threads")
        if threads:
            hisac.set_num_threads(threads)
        run(**options)
        print(end="", flush=True)
        return 0
    except BrokenPipeError:
        return 141  # 128 + SIGPIPE, as a shell says it
    except (ValueError, OSError, NotImplementedError, MemoryError, hisac.CorruptFileError) as error:
        text = line(str(error)).removeprefix(f"{command}: ") or type(error).__name__
        print(f"hisac {command}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"hisac {command}: interrupted", file=sys.stderr)
        return 130
    finally:
        for stream in streams:
            try:
                stream.flush()
            except OSError:  # the rest goes nowhere: the interpreter would try again at its end, and say so
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
