"""The commands of docs/, run as they stand there but for their size; and the job script under a Slurm of two small scripts."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY
from pages import Shell, commands, lines_of, workshop

DOCS = ROOT / "docs"
# In the order in which they build on each other
PAGES = ("data", "train", "evaluate", "grow_yours", "use_it_elsewhere", "scale", "add_a_kernel")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_commands_of_the_pages_work_in_order(tmp_path):
    workshop(tmp_path)
    shell = Shell(tmp_path)
    base = "torchrun --nproc_per_node 8 train.py config/1b_base.py --data.path data/texts"
    for page in PAGES:
        found = commands(DOCS / f"{page}.md")
        assert found, page
        for line in found:
            if "pytest" in line:  # tests that run beside this one
                assert all((ROOT / word).exists() for word in shlex.split(line, comments=True) if word.startswith("tests/"))
            else:
                shell(line)
        if page == "train":
            shell(base)  # which the README's commands have trained before
    assert (tmp_path / "exported-x2/model.safetensors").exists() and (tmp_path / "out/imported/ckpt.pt").exists()


def test_every_page_is_linked_and_every_link_leads_somewhere():
    pages = {path.name: path.read_text() for path in DOCS.glob("*.md")}
    linked = set(re.findall(r"\]\(docs/([\w.]+)", (ROOT / "README.md").read_text()))
    for name, text in pages.items():
        for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
            assert (DOCS / target).exists(), f"{name}: {target}"
            linked.add(target)
    assert linked >= pages.keys()


def test_site_is_built_and_a_dead_link_fails(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md", "CITATION.cff", "docs"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for name in ("config", "nanostack"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}

    def build() -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = build()
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "out/site"
    assert {path.stem for path in site.glob("*.html")} == {path.stem for path in DOCS.glob("*.md")} | {"index", "404"}
    front = (site / "index.html").read_text()
    assert 'src="quickstart.png"' in front and 'href="runs.html"' in front
    assert not re.search(r'(src|href)="(https?:)?//(?!arxiv\.org|squidfunk)', front), "nothing is asked of other hosts"
    dead = ("nowhere.md", "nowhere.py", "runs.md#nowhere")
    (tmp_path / "docs/first_aid.md").write_text(" ".join(f"[dead]({one})" for one in dead))
    done = build()
    assert done.returncode != 0 and all(f"'{one}'" in done.stderr for one in dead), done.stderr


def test_no_page_has_commands_that_are_not_run():
    others = [path for path in DOCS.glob("*.md") if path.stem not in (*PAGES, "add_an_operator")]
    assert not {path.name: found for path in others if (found := commands(path))}


def test_tools_that_the_pages_call_are_installed():
    tools = {line.split()[0] for path in DOCS.glob("*.md") for line in lines_of(path)} - {"sbatch", "tensorboard"}
    assert not [tool for tool in tools if not shutil.which(tool, path=os.path.dirname(sys.executable))]


@pytest.mark.slow
def test_operator_of_the_page_passes_the_tests_once_added(tmp_path):
    for name in ("nanostack", "kernels", "tests", "config"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for name in ("train.py", "grow.py", "pyproject.toml", "docs/draw_growth.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    operator, sequence = re.findall(r"```python\n(.*?)```", (DOCS / "add_an_operator.md").read_text(), re.S)
    with open(tmp_path / "nanostack/growth/depth.py", "a") as file:
        file.write(f"\n\n{operator}")
    tests = tmp_path / "tests/growth/test_growth.py"
    opening = re.search(r"SEQUENCES = {.*\n", tests.read_text())[0]
    tests.write_text(tests.read_text().replace(opening, opening + sequence))
    for line, said in zip(
        commands(DOCS / "add_an_operator.md"), ("3 passed", ""), strict=True
    ):  # tied, untied, what holds for all
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "docs/growth.png").stat().st_size > 10_000


SRUN = """#!/bin/bash
# srun as far as the job script uses it: a process per task, the first bad exit ends all; a SIGTERM kills them, as srun's does
while [ "${1#--}" != "$1" ]; do shift; done
trap 'kill -KILL $tasks' TERM
for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" &
    tasks="$tasks $!"
done
echo $tasks > "$STEP"
status=0
for task in $tasks; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; last=$?; done
    [ "$last" -eq 0 ] || status=$last
done
exit $status
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && echo "$2" >> "$REQUEUED" || echo 127.0.0.1
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 4711.0" ] && kill -TERM $(cat "$STEP")
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_script_saves_requeues_and_goes_on(corpus, tmp_path):
    (tmp_path / "bin").mkdir()
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL), ("python", python)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    requeued, out = tmp_path / "requeued", tmp_path / "out"
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here"}
    slurm |= {"REQUEUED": str(requeued), "STEP": str(tmp_path / "step")}
    environment = os.environ | slurm | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    options = ["--data.path", corpus, "--out", out, "--stages.0.tokens", 400000, "--log_interval", 256]
    options += ["--eval_interval", 400000]  # a record that waits for its evaluation would be written anew
    command = ["bash", "docs/slurm.sh", TINY, *map(str, options)]
    before: list[str] = []
    for number in (1, 2):
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(lines(out)) <= len(before) + 5:
            assert job.poll() is None, job.communicate()[0]
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        said = job.communicate(timeout=120)[0]
        assert job.returncode == 0 and "stopped by a signal" in said, said
        assert requeued.read_text() == "4711\n" * number
        assert lines(out)[1 : len(before)] == before[1:], "the second job goes on where the first one saved"
        before = lines(out)


def lines(out) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_slurm_script_says_that_it_is_one():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(["bash", "docs/slurm.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode and "this is a job script: sbatch docs/slurm.sh CONFIG.py" in done.stderr
