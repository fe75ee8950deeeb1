"""Prepare."""

import json
import signal
import sys
import time

import tyro

from nanostack.errors import UserError, exits_cleanly
from nanostack.text.corpus import Args, prepare
from nanostack.text.manifest import manifest_sha256


def _report(args: Args, manifest: dict, seconds: float):
    splits = manifest["splits"]
    if args.json:
        print(json.dumps({"out": str(args.out), "manifest_sha256": manifest_sha256(args.out), "seconds": seconds} | manifest))
        return
    for split, entry in splits.items():
        print(
            f"{split:>5}: {entry['tokens']:>13,} tokens, {entry['bytes']:>13,} bytes, {entry['documents']:>9,} "
            f"documents, {len(entry['shards'])} shards"
        )
    tokens, size = (sum(entry[key] for entry in splits.values()) for key in ("tokens", "bytes"))
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items()) or "nothing"
    print(f"{args.out}: {size / tokens:.2f} bytes per token, left out: {left_out}; {seconds:.1f} s")


def run() -> None:
    args = tyro.cli(Args, prog="nanostack prepare", description=__doc__, use_underscores=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is cleared away
    start = time.perf_counter()
    with exits_cleanly():
        try:
            _report(args, prepare(args), time.perf_counter() - start)
        except KeyboardInterrupt:
            print(f"interrupted; {args.out} is as it was before", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else f"writing {args.out}: "
            raise UserError(where + (error.strerror or str(error))) from None
