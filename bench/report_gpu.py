"""The GPU tables of docs/performance.md, from every file that `make gpu-right`, `gpu-fast` and `gpu-tune` have written.

    python bench/report_gpu.py           write them between the page's two markers
    python bench/report_gpu.py --print   only show them
    python bench/report_gpu.py DIR       of this folder only

bench/results/ has a folder for each device and day. A rehearsal's numbers are never put on the page.
"""

import argparse
import statistics
import sys
from pathlib import Path

from bench import ROOT, anchors, growth, sections, throughput
from bench.results import RESULTS
from nanostack.kernels.configs import ANY
from study.results import markdown

PAGE = ROOT / "docs/performance.md"
MARKS = ("<!-- begin: python bench/report_gpu.py -->", "<!-- end: python bench/report_gpu.py -->")
FILES = ("right", "fast", "tune")
NOTHING = "These three commands have not run on a GPU yet: `bench/results/` has no file of theirs."


def folders(results: Path) -> list[Path]:
    return sorted(folder for folder in results.iterdir() if folder.is_dir() and any(files_of(folder).values()))


def files_of(folder: Path) -> dict[str, dict]:
    return {name: sections.read(folder / f"{name}.json") for name in (*FILES, "kernels")}


def page_of(results: list[dict[str, dict]]) -> str:
    """All tables of some folders of results, each as files_of has it; rehearsals are left out."""
    texts = []
    for files in results:
        parts = [of_command(name, files[name]) for name in FILES if files[name] and not files[name]["about"]["rehearsal"]]
        parts += [of_kernels_alone(files["kernels"])] if files["kernels"] else []
        texts += parts
    told = [] if any(files[name] for files in results for name in FILES) else [NOTHING]
    return "\n\n".join(told + texts)


def short(commit: str | None) -> str:
    """A commit as the page names it: that files differed from it is said."""
    name, *changed = (commit or "unknown").split("-")
    return "-".join([name[:12], *changed])


def of_command(name: str, found: dict) -> str:
    about = found["about"]
    head = f"### gpu-{name}, {about['device']}, {about['date']}"
    with_what = [f"commit {short(about['git_commit'])}", *(f"{k} {v}" for k, v in about["versions"].items())]
    lacking = f" It lacked {', '.join(about['lacking'])}." if about["lacking"] else ""
    before, now = about["compiled_before"], about.get("compiled_now")
    carried = f" {before} kernels came compiled, {'?' if now is None else now} more were compiled." if before else ""
    texts = [head, ", ".join(with_what) + "." + lacking + carried]
    rows = [
        [part, of["state"], f"{of['seconds']:g}", f"{of['limit']:g}", short(of["git_commit"]), cell(of["said"])]
        for part, of in found["parts"].items()
    ]
    texts.append(markdown(["part", "state", "seconds", "of", "commit", "last line"], rows))
    texts += [TABLES[key](found[key]) for key in TABLES if key in found]
    return "\n\n".join(texts)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def of_tests(found: dict) -> str:
    counts = ", ".join(f"{len(found[how])} {word}" for how, word in (("skipped",) * 2, ("failed",) * 2, ("left", "cut")))
    told = f"Tests: {found['passed']} passed, {counts}."
    lines = [f"- failed: `{name}`: {cell(why)}" for name, why in found["failed"].items()]
    lines += [f"- cut: `{name}`" for name in found["left"]]
    lines += [f"- skipped: `{name}`: {cell(why)}" for name, why in found["skipped"].items()]
    return "\n\n".join([told, "\n".join(lines)] if lines else [told])


def of_options(found: dict) -> str:
    rows = []
    for name, of in found["options"].items():
        if of["state"] == "failed":
            rows.append([name, "failed", cell(of["said"]), "", "", ""])
            continue
        most, mean = of["allowed"]
        numbers = [f"{of['largest']:.1e} ({most:g})", f"{of['mean']:.1e} ({mean:g})"]
        rows.append([name, of["state"], of["said"] or of["against"] or "", *numbers, of["kernels"]])
    head = ["option", "state", "beside", "largest difference (allowed)", "in the mean", "kernels"]
    told = (
        f"Losses of {found['steps']} steps on {found['device']}, grown ×2 after half of them, beside those of the torch path."
    )
    left = f"\n\nCut: {', '.join(found['left'])}." if found["left"] else ""
    return f"{told}\n\n{markdown(head, rows)}{left}"


def of_step(found: dict) -> str:
    turns = {name: len(way["rounds"]) for name, way in found["ways"].items()}
    timed = statistics.mean(len(one["seconds"]) for way in found["ways"].values() for one in way["rounds"])
    kernels = {name: way["rounds"][0]["kernels"] for name, way in found["ways"].items()}
    told = f"The step of {found['config']} on {found['device']}: {found['n_params'] / 1e6:.0f}M parameters, context "
    told += f"{found['seq_len']}, {found['batch_tokens']} tokens in micro-batches of {found['micro_batch']}, {found['dtype']}"
    told += f"{', ' + ' '.join(found['overrides']) if found['overrides'] else ''}; {timed:.0f} steps after {found['warmup']}, "
    told += f"asked for {found['rounds']} rounds of {found['steps']}; "
    told += f"{'random ids' if found['random_ids'] else 'text'}; "
    told += ", ".join(f"{name} in {kernels[name]} ({turns[name]} rounds)" for name in turns)
    told += f"; Hugging Face {'with' if found['liger'] else 'without'} Liger's kernels."
    first = max(one["first_step"] for way in found["ways"].values() for one in way["rounds"])
    peak = max(one["peak_bytes"] for way in found["ways"].values() for one in way["rounds"])
    told += f" The longest first step took {first:.1f} s, the largest peak was {peak / 2**30:.1f} GiB."
    texts = [told, markdown(list(throughput.HEAD), throughput.cells(found))]
    texts += [f"{name} failed: {why}" for name, why in found["failed"].items()]
    return "\n\n".join(texts + anchors.sentences(found["anchors"], on_gpu=True))


def of_kernels(found: dict) -> str:
    """A row an operation, shape and way: milliseconds, the share of the machine's own rate, and how many times ours it took."""
    groups: dict[tuple, dict] = {}
    for row in found["rows"]:
        groups.setdefault((row["op"], row["shape"], row["way"]), {})[row.get("direction", "failed")] = row
    rows = []
    for (op, shape, way), by in groups.items():
        if "failed" in by:
            rows.append([f"{op} {shape}", way, "failed: " + cell(by["failed"]["failed"]), *[""] * 5])
            continue
        cells = []
        for direction in ("forward", "backward", "both"):
            ours = groups[op, shape, "nanostack"].get(direction)
            if direction not in by:
                cells.append("")
                continue
            of = by[direction]
            rate = f"{of['per_s'] / 1e12:.2f}" + (" TB/s" if of["unit"] == "bytes" else " TFLOP/s")
            times = f", {of['seconds'] / ours['seconds']:.2f} × ours" if way != "nanostack" else ""
            share = f"{100 * of['of_roofline']:.0f} %"
            cells.append(f"{1e3 * of['seconds']:.3f} ms ± {100 * of['spread']:.0f} %, {rate}, {share}{times}")
        one = next(iter(by.values()))
        memory = "" if one["extra_bytes"] is None else f"{one['extra_bytes'] / 2**20:,.0f}"
        rows.append([f"{op} {shape}", way, *cells, f"{one['roofline_per_s'] / 1e12:.2f}", memory])
    head = ["operation", "way", "forward", "backward", "both", "the machine's, T/s", "extra MiB"]
    told = f"On {found['device']}, {found['dtype']}, median of {found['samples']}; % of what the machine reaches itself, by a "
    script = found["what"].replace("kernels.py", "kernel_ops.py")  # which had the shorter name
    told += f"copy or a large product measured in turn ({script})."
    return f"{told}\n\n{markdown(head, rows)}"


def of_growth(found: dict) -> str:
    told = f"Growing ×{found['g']} on {found['device']}, {found['samples']} samples ({found['what']})."
    sizes = [
        f"{row['shape']}, {row['way']}: {row['n_params'] / 1e6:.0f}M parameters, {row['state_bytes_before'] / 2**30:.1f} GiB "
        f"of state before and {row['state_bytes'] / 2**30:.1f} after, {row['bytes_copied'] / 2**30:.2f} GiB copied; the "
        f"device's own rate of copying is {row['copy_bytes_per_s'] / 1e12:.2f} TB/s"
        for row in found["rows"]
    ]
    left = "".join(f" {name} is left out: it needs {size / 2**30:.0f} GiB." for name, size in found["left_out"].items())
    return "\n\n".join([told + left, markdown(list(growth.HEAD), growth.cells(found)), "; ".join(sizes) + "."])


def of_rows(found: dict) -> str:
    rows = []
    for row in found["rows"]:
        size = "any" if row["size"] == ANY else str(row["size"])
        gain = f"{row['seconds_before'] / row['seconds']:.2f}"
        numbers = [f"{1e3 * row['seconds']:.3f}, {row['timed']}", gain, str(row["candidates"])]
        rows.append([f"{row['kernel']} {size} ({row['arch']})", f"`{row['row']}`", f"`{row['row_before']}`", *numbers])
    told = f"Rows tuned on {found['device']}; {found['patch']} sets them."
    left = ", ".join(f"{kernel} {size}" for kernel, size in found["left"])
    head = ["row of", "best", "before", "ms", "× as fast", "candidates"]
    return f"{told}\n\n{markdown(head, rows)}" + (f"\n\nCut: {left}." if left else "")


def of_kernels_alone(found: dict) -> str:
    """What bench/kernel_ops.py wrote to a folder by itself."""
    with_what = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    head = f"### Kernels, {found['device']}, {found['date']}"
    return f"{head}\n\ncommit {short(found['git_commit'])}, {with_what}.\n\n{of_kernels(found)}"


TABLES = {
    "tests": of_tests,
    "options": of_options,
    "step": of_step,
    "attention": of_kernels,
    "memory_bound": of_kernels,
    "growth": of_growth,
    "start": of_step,
    "rows": of_rows,
}


def placed(page: str, tables: str) -> str:
    """The page with these tables between its markers."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{tables}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def told(mistake: str) -> int:
    print(f"error: {mistake}", file=sys.stderr)
    return 2


def main() -> int:
    parser = argparse.ArgumentParser("bench/report_gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="*", type=Path, help="folders of results (default: all of bench/results/)")
    parser.add_argument("--print", action="store_true", dest="only_print", help="write nothing")
    options = parser.parse_args()
    try:
        found = {folder: files_of(folder) for folder in options.folder or folders(RESULTS)}
        tables = page_of(list(found.values()))
    except sections.Damaged as error:
        return told(str(error))
    except (KeyError, TypeError, AttributeError) as error:
        return told(f"a file of results is damaged, or of another version: {type(error).__name__} {error}")
    if empty := [str(folder) for folder, files in found.items() if not any(files.values())]:
        return told(f"{' and '.join(empty)} holds no {', '.join(FILES)} or kernels.json: nothing is written")
    if options.only_print:
        print(tables)
    else:
        PAGE.write_text(placed(PAGE.read_text(), tables))
        print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
