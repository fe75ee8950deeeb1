"""The table of docs/hardware.md: for each kind of GPU and CPU what was compiled, what has run, and what was not done.

    python -m nanostack.kernels.aot --arch gfx942 --json > out/gfx942.json    every row, in minutes; any architectures
    python bench/hardware.py out/gfx942.json    keep what that told in bench/results/compiled.json, and write the table
    python bench/hardware.py --print            only show the table

What has run is what a file in bench/results/ proves. What was compiled before a row, or a kernel, changed counts no more: the
table says so.
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
PARTS = {  # of training: the operations that bench/kernel_ops.py times
    "attention": "flash_attention",
    "RMSNorm": "rms_norm",
    "rotary": "rotary",
    "SwiGLU": "swiglu",
    "cross entropy": "linear_cross_entropy",
}
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
    (
        "MI50, MI100, MI350, RX 6000, RX 7600 to 7800, RX 9000",
        "AMD's others",
        "torch",
        "no",
        NOTHING,
        FAKED,
        "everything on such a GPU",
    ),
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
    """Of all rows of an architecture, as each is called, and of the kernels: another one where any of them has changed."""
    sources = [aot.source_of(name) for name in TABLE]
    return hashlib.sha256(repr((list(aot.cases(arch, list(TABLE))), sources)).encode()).hexdigest()[:12]


def allowed(arch: Arch) -> str:
    """The rows that may spill in calls that people train with, in bf16 or fp16, and how much: the gate fails beyond."""
    found: dict[str, int] = {}
    for case in aot.cases(arch, list(TABLE)):
        if case.dtype != "fp32" and not aot.calls_of(case.kernel)[case.call].odd:
            whose = f"{case.kernel} {case.size}"
            found[whose] = max(found.get(whose, 0), case.config.may_spill(arch, odd=False))
    return ", ".join(f"{whose}: {size}" for whose, size in found.items() if size)


def compiled_by(found: dict[str, dict], arch: Arch) -> tuple[str, str]:
    """What was compiled for an architecture, and what of it spills: the last Triton's word counts."""
    now = [told for told in found.values() if told["fingerprint"] == fingerprint(arch)]
    if not now:
        return ("not since a row or a kernel changed" if found else "no"), NOTHING
    last = now[0]
    texts = [f"{last['rows']} rows, {last['calls']} calls"]
    for told in now:
        faults = f", {told['faults']} with faults" if told["faults"] else ""
        texts.append(f"Triton {told['triton']} ({told['date']}{faults})")
    spills = [("training", last["stack"]), ("odd calls", last["odd_stack"]), ("float32", last["fp32_stack"])]
    told = [f"{what} {size} ({whose})" if size else f"{what} 0" for what, (size, whose) in spills]
    told[0] += f"; allowed in training: {rows}" if (rows := allowed(arch)) else ""
    return ", ".join(texts), "; ".join(told)


def runs() -> list[tuple[str, str, set[str]]]:
    """(device, file and what is in it, parts of training that it timed) of every file of results from a GPU."""
    found = []
    for file in sorted(RESULTS.glob("*/kernels.json")):
        told = sections.read(file)
        ops = dict.fromkeys(row["op"] for row in told["rows"] if row["way"] == "nanostack")
        found.append((told["device"], f"{', '.join(ops)}: `{shown(file)}`", {part for part, op in PARTS.items() if op in ops}))
        if (tests := file.with_name("tests.txt")).exists():
            found.append((told["device"], f"gpu tests: `{shown(tests)}`", set()))
    for file in sorted(RESULTS.glob("*/right.json")) + sorted(RESULTS.glob("*/fast.json")):
        about = sections.read(file)["about"]
        if not about["rehearsal"]:
            found.append((about["device"], f"`{shown(file)}`", {"training"}))
    return found


def shown(file: Path) -> str:
    """As the page names a file of results."""
    return f"bench/results/{file.relative_to(RESULTS)}"


def cpus() -> str:
    """The CPUs that files of results are from."""
    devices = {str(sections.read(file).get("device", "")) for file in RESULTS.glob("*.json")}
    names = {re.sub(r"\(R\)| Processor", "", name.split(",")[0]) for name in devices if "threads" in name}
    return ", ".join(sorted(names))


def table() -> str:
    found, lines = sections.read(COMPILED), [HEAD, ("---",) * len(HEAD)]
    for arch in ARCHITECTURES:
        models = set(re.findall(r"\w*\d\w*", CARDS[arch]))
        ran = [run for run in runs() if models & set(re.findall(r"\w+", run[0]))]
        left = [part for part in (*PARTS, "training") if not any(part in parts for *_, parts in ran)]
        undone = f"timing {', '.join(left)}" if ran else "everything on such a GPU: right or wrong, and how fast"
        told = "; ".join(f"{device}: {what}" for device, what, _ in ran) or "nothing"
        of = compiled_by(found.get(named(arch), {}), arch)
        lines.append((CARDS[arch], named(arch), "Triton", *of, told, undone if left else NOTHING))
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
