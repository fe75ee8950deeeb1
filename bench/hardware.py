"""The table of docs/hardware.md: for each kind of GPU and CPU what was compiled, what has run, and what was not done.

    python -m nanostack.kernels.aot --arch gfx942 --json > out/gfx942.json    every row, in minutes; any architectures
    python bench/hardware.py out/gfx942.json    keep what that told in bench/results/compiled.json, and write the table
    python bench/hardware.py --print            only show the table

What has run is what a file in bench/results/ proves. What was compiled before a row changed counts no more: the table says so.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from bench import ROOT, sections
from bench.results import RESULTS
from nanostack.kernels import aot
from nanostack.kernels.configs import TABLE
from nanostack.kernels.dispatch import Arch
from nanostack.kernels.machine_code import ARCHITECTURES, named

PAGE = ROOT / "docs/hardware.md"
COMPILED = RESULTS / "compiled.json"
MARKS = ("<!-- begin: python bench/hardware.py -->", "<!-- end: python bench/hardware.py -->")
HEAD = ("device", "architecture", "served by", "compiled", "bytes spilled to the stack", "has run", "not done")
CARDS: dict[Arch, str] = {
    80: "A100, A30",
    86: "RTX 3060, 3070, 3080, 3090, A10, A40",
    89: "RTX 4060, 4070, 4080, 4090, L4, L40S",
    90: "H100, H200, GH200",
    100: "B200, GB200",
    120: "RTX 5060, 5070, 5080, 5090",
    "gfx90a": "MI210, MI250",
    "gfx942": "MI300A, MI300X",
    "gfx1100": "RX 7900",
}
NOTHING = "–"
FAKED = "nothing; tested: the choice, with a faked device"
OTHERS = (  # for which no kernel is compiled
    ("V100, T4, RTX 20 and older", "sm_75 and older", "torch, in float32", "no", NOTHING, FAKED, "everything on such a GPU"),
    ("MI50, MI100, MI350, RX 6000, RX 9000", "AMD's others", "torch", "no", NOTHING, FAKED, "everything on such a GPU"),
    ("Apple (MPS)", NOTHING, "torch, on the CPU", "no", NOTHING, FAKED, "everything on such a machine"),
    ("CPU without a C compiler", "any", "torch", "no", NOTHING, "tests: a training run", "macOS, Windows (use WSL)"),
)


def told_by(reports: list[dict], arch: Arch, triton: str) -> dict:
    """What the gate's reports say of an architecture. ValueError unless they are of all its calls."""
    mine = [r for r in reports if r["arch"] == arch]
    cases = list(aot.cases(arch, list(TABLE)))
    calls = {(c.kernel, None if c.size == aot.ANY else c.size, c.call, c.dtype) for c in cases}
    if {(r["kernel"], r["size"], r["call"], r["dtype"]) for r in mine} != calls:
        raise ValueError(f"{len(mine)} calls of {named(arch)} were compiled, and it has {len(cases)}: compile them all")
    odd = {id(r): aot.calls_of(r["kernel"])[r["call"]].odd for r in mine}
    low = [r for r in mine if r["dtype"] != "fp32"]
    return {
        "triton": triton,
        "date": date.today().isoformat(),
        "rows": rows_of(cases),
        "fingerprint": fingerprint(arch),
        "calls": len(mine),
        "faults": sum(bool(r["faults"]) for r in mine),
        "stack": most(r for r in low if not odd[id(r)]),
        "odd_stack": most(r for r in low if odd[id(r)]),
        "fp32_stack": most(r for r in mine if r["dtype"] == "fp32"),
    }


def most(reports: Iterator[dict]) -> list:
    """The largest stack and whose it is."""
    found = max(reports, key=lambda r: r["stack"])
    return [found["stack"], f"{found['kernel']} {found['size'] or ''}".strip() if found["stack"] else ""]


def rows_of(cases: list[aot.Case]) -> int:
    return len({(c.kernel, c.size, c.dtype == "fp32") for c in cases})


def fingerprint(arch: Arch) -> str:
    """Of all rows of an architecture, as each is called: another one where one of them has changed."""
    return hashlib.sha256(repr(list(aot.cases(arch, list(TABLE)))).encode()).hexdigest()[:12]


def compiled_by(found: dict[str, dict], arch: Arch) -> tuple[str, str]:
    """What was compiled for an architecture, and what of it spills: the last Triton's word counts."""
    now = [told for told in found.values() if told["fingerprint"] == fingerprint(arch)]
    if not now:
        return ("not since its rows changed" if found else "no"), NOTHING
    last = now[0]
    texts = [f"{last['rows']} rows, {last['calls']} calls"]
    for told in now:
        faults = f", {told['faults']} with faults" if told["faults"] else ""
        texts.append(f"Triton {told['triton']} ({told['date']}{faults})")
    spills = [("training", last["stack"]), ("odd calls", last["odd_stack"]), ("float32", last["fp32_stack"])]
    told = [f"{what} {size} ({whose})" if size else f"{what} 0" for what, (size, whose) in spills]
    return ", ".join(texts), "; ".join(told)


def runs() -> list[tuple[str, str]]:
    """(device, what) of every file of results from a GPU: what was timed there."""
    found = []
    for file in sorted(RESULTS.glob("*/kernels.json")):
        told = sections.read(file)
        ops = dict.fromkeys(row["op"] for row in told["rows"] if row["way"] == "nanostack")
        found.append((told["device"], f"{', '.join(ops)}: `{file.relative_to(ROOT)}`"))
    for file in sorted(RESULTS.glob("*/right.json")) + sorted(RESULTS.glob("*/fast.json")):
        about = sections.read(file)["about"]
        if not about["rehearsal"]:
            found.append((about["device"], f"`{file.relative_to(ROOT)}`"))
    return found


def cpus() -> str:
    """The CPUs that files of results are from."""
    devices = {str(sections.read(file).get("device", "")) for file in RESULTS.glob("*.json")}
    names = {re.sub(r"\(R\)| Processor", "", name.split(",")[0]) for name in devices if "threads" in name}
    return ", ".join(sorted(names))


def table() -> str:
    found, lines = sections.read(COMPILED), [HEAD, ("---",) * len(HEAD)]
    for arch in ARCHITECTURES:
        models = set(re.findall(r"\w*\d\w*", CARDS[arch]))
        ran = [f"{device}: {what}" for device, what in runs() if models & set(device.split())]
        left = "attention, SwiGLU, cross entropy, training" if ran else "everything on such a GPU: right or wrong, and how fast"
        of = compiled_by(found.get(named(arch), {}), arch)
        lines.append((CARDS[arch], named(arch), "Triton", *of, "; ".join(ran) or "nothing", left))
    ran = f"tests and benchmarks: {cpus()}"
    lines += [("CPU with a C compiler (Linux)", "x86-64", "C", "where it runs", NOTHING, ran, "other processors"), *OTHERS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def placed(page: str, text: str) -> str:
    """The page with this table between its markers."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def keep(files: list[Path]) -> None:
    """Put what the gate has written to these files into COMPILED. ValueError for what is no whole word on an architecture."""
    kept = sections.read(COMPILED)
    for file in files:
        told = sections.read(file)
        for arch in sorted({r["arch"] for r in told["kernels"]}, key=ARCHITECTURES.index):
            before = kept.get(named(arch), {})
            before.pop(told["triton"], None)
            kept[named(arch)] = {told["triton"]: told_by(told["kernels"], arch, told["triton"])} | before
    kept = {named(arch): kept[named(arch)] for arch in ARCHITECTURES if named(arch) in kept}
    COMPILED.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser("bench/hardware.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", nargs="*", type=Path, help="what python -m nanostack.kernels.aot --json has written")
    parser.add_argument("--print", action="store_true", dest="only_print", help="write nothing")
    options = parser.parse_args()
    if options.only_print:
        print(table())
        return 0
    try:
        if missing := [str(file) for file in options.file if not file.exists()]:
            raise ValueError(f"there is no {' and no '.join(missing)}")
        if options.file:
            keep(options.file)
    except (ValueError, KeyError) as error:  # sections.Damaged is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 2
    PAGE.write_text(placed(PAGE.read_text(), table()))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
