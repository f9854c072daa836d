"""`polopt certify`: what can be proven about a method, in one line and one JSON file."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from polopt.errors import CallError

EPILOG = """\
Identities (tests), the exact oracle, the golden trajectory, kill and resume, invariance to micro-batches and padding, and the
learning floor. Status 1 if a method is not certified.

examples
  polopt certify ppo
  polopt certify --all --jobs 2
  polopt certify my_file.py:MINE --golden golden --record --out certificates"""


def arguments(sub: argparse.ArgumentParser) -> None:
    """Arguments of `certify`."""
    sub.formatter_class = argparse.RawDescriptionHelpFormatter
    sub.epilog = EPILOG
    sub.add_argument("method", nargs="?", metavar="METHOD", help="a name, or file.py:NAME")
    sub.add_argument("--all", action="store_true", help="every registered method")
    sub.add_argument("--jobs", type=int, metavar="N", help="with --all: methods side by side [one per core]")
    sub.add_argument("--out", metavar="DIR", help="where certificates are stored [evidence/certificates]")
    sub.add_argument("--golden", metavar="DIR", help="where golden trajectories are stored [evidence/golden]")
    sub.add_argument("--record", action="store_true", help="store the golden trajectory anew instead of repeating it")
    sub.add_argument("--json", action="store_true", help="print the certificate as JSON")


def certify(args: argparse.Namespace) -> int:
    """`polopt certify METHOD | --all`."""
    from polopt.evidence.proof import stored
    from polopt.evidence.proof.certify import certify as check
    from polopt.evidence.proof.certify import certify_all, registered
    from polopt.registry import all_methods, get_method

    if args.all == (args.method is not None):
        raise CallError("certify takes a method or --all ('polopt certify --help' shows how)")
    if args.jobs is not None and (args.jobs < 1 or not args.all):
        raise CallError(f"--jobs {args.jobs}: expected at least 1, with --all")
    out = Path(args.out) if args.out else None
    golden = Path(args.golden) if args.golden else None
    if golden is not None and not golden.is_dir() and not args.record:
        raise CallError(f"--golden {args.golden}: there is no such folder; --record makes it")
    if args.all:
        quiet = (lambda c: None) if args.json else (lambda c: print(c.line, flush=True))
        made = certify_all(
            list(all_methods()), jobs=args.jobs or os.cpu_count() or 1, out=out, record=args.record, golden=golden, echo=quiet
        )
        if args.json:
            print(json.dumps([c.json() for c in made], indent=2))
        return 0 if all(c.certified for c in made) else 1
    method = get_method(args.method)
    found = check(method, record=args.record, golden=golden, command=f"polopt certify {args.method}")
    if out is not None or registered(method):
        found.write(out or stored.home() / stored.CERTIFICATES)
    print(json.dumps(found.json(), indent=2) if args.json else found.line)
    return 0 if found.certified else 1


__all__ = ["arguments", "certify"]
