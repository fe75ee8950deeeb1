"""The commands for a GPU's minutes, without one: parts begin, end and are cut as they should; all they write is read."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import tyro
from conftest import ROOT

from bench import carried, gpu, growth, kernel_ops, options, sections, throughput, tuning, wheels
from bench.results import place
from kernels import tune
from kernels.configs import TABLE, attention
from kernels.tune import Tuned, as_row
from nanostack.config import load
from nanostack.errors import UserError, split

H100 = "NVIDIA H100 80GB HBM3"
COMMANDS = {"throughput": throughput, "kernel_ops": kernel_ops, "growth": growth, "options": options, "tuning": tuning}


@pytest.fixture
def with_h100(tmp_path):
    """An environment in which nvidia-smi names an H100."""
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin/nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '{H100}'\n")
    smi.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def command(*words, environment=None):
    return subprocess.run(
        [sys.executable, "bench/gpu.py", *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def told(done):
    assert done.returncode == 2 and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


def test_results_of_another_device_or_a_file_of_another_commit_are_refused_in_one_line(tmp_path, with_h100, monkeypatch):
    out = tmp_path / "results"
    out.mkdir()
    about = {"device": "NVIDIA H200", "git_commit": gpu.git_commit()}
    sections.write(out / "right.json", {"about": about})
    said = told(command("fast", "--out", out, environment=with_h100))
    assert f"right.json is of the device NVIDIA H200, this is {H100}: add ARGS='--out DIR'" in said
    of_another = {"about": {"device": H100, "git_commit": "a" * 40}}
    sections.write(out / "right.json", of_another)
    said = told(command("right", "--out", out, environment=with_h100))
    assert f"is of commit {'a' * 40}, this is {gpu.git_commit()}: add ARGS" in said
    assert sections.read(out / "right.json") == of_another
    now = {"out": out, "device": H100, "commit": "b" * 40}
    for name, only, rehearse in (("fast", [], False), ("right", ["tests"], False), ("right", [], True)):
        gpu.refuse_others(SimpleNamespace(name=name, only=only, rehearse=rehearse, **now))
    for damaged, why in (("{", "is damaged"), ("[]", "holds no JSON object"), ('{"about": {}}', "does not say of what device")):
        (out / "tune.json").write_text(damaged)
        assert why in told(command("fast", "--out", out, environment=with_h100))
    assert gpu.short(H100) == "h100" and gpu.short("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb" and gpu.short("cpu") == "cpu"


def test_mistakes_of_the_commands_are_told_in_one_line(tmp_path, with_h100):
    nobody = os.environ | {"PATH": str(tmp_path)}
    assert "there is no GPU here" in told(command("right", environment=nobody))
    assert "right has no part fun; it has tests, options" in told(command("right", "--only", "fun"))
    assert "name the folder" in told(command("wheels"))
    with pytest.raises(UserError, match="there is no way nobody; there are nanostack, torch eager"):
        kernel_ops.main(kernel_ops.Command(way=("nobody",)))
    (tmp_path / "fast.json").write_text("{")
    with pytest.raises(UserError, match=r"--out: .*fast.json is damaged"):
        place("step", "cpu", tmp_path / "fast.json#step")
    make = ["make", "gpu-cache", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "name the folder to fill" in done.stderr and not (tmp_path / "venv").exists()
    said = told(command("right", "--rehearse", "--wheels", tmp_path / "none", "--out", tmp_path / "out"))
    assert f"there is no folder {tmp_path / 'none'}: `make gpu-wheels" in said and not (tmp_path / "out").exists()


def test_what_this_python_lacks_comes_from_wheels_and_those_of_another_python_are_refused(tmp_path, monkeypatch):
    folder, target = tmp_path / "wheels", tmp_path / "target"
    folder.mkdir()
    monkeypatch.setattr(wheels, "NEEDED", {"no_such_module": "no-such.module"})
    monkeypatch.setattr(wheels, "PEERS", {"no_such_peer": "no-such-peer"})
    with pytest.raises(wheels.Unusable, match=r"lacks no-such\.module: add WHEELS=DIR"):
        wheels.complete(None, target, False)
    with pytest.raises(wheels.Unusable, match=r"lacks no-such\.module, and .* has no wheel of it; install it there"):
        wheels.complete(folder, target, False)
    monkeypatch.setattr(wheels, "TRAVEL", ("no-such.module", *wheels.TRAVEL))
    with pytest.raises(wheels.Unusable, match=r"no wheel of it; make gpu-wheels WHEELS=\S+ fetches it"):
        wheels.complete(folder, target, False)
    monkeypatch.setattr(wheels, "TESTS", {"no_such_test": "no-such-test"})
    other = folder / "no_such_module-1.0-cp27-cp27m-manylinux1_x86_64.whl"
    other.write_bytes(b"")
    with pytest.raises(wheels.Unusable, match=r"no_such_module-1.0-cp27\S+, which is for another Python than .*FOR=3\.\d+$"):
        wheels.complete(folder, target, False)
    other.unlink()
    about = "no_such_module-1.0.dist-info"
    with zipfile.ZipFile(folder / "no_such_module-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("no_such_module.py", "here = True")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: no-such.module\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: me\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    with pytest.raises(wheels.Unusable, match="lacks no-such-test"):
        wheels.complete(folder, target, tests=True)
    assert wheels.complete(folder, target, tests=False) == ["no-such-peer"] and (target / "no_such_module.py").is_file()


STOPPABLE = (
    "import time\nprint('begun', flush=True)\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n raise SystemExit('saved')"
)


def test_part_that_fails_or_is_late_costs_only_itself_and_its_output_is_live(tmp_path):
    parts = {"fine": "print('all is well')", "broken": "raise SystemExit('it broke')", "late": STOPPABLE}
    log = tmp_path / "log.txt"
    found = {
        name: gpu.run_part(["-c", code], log, 3 if name == "late" else 60, dict(os.environ)) for name, code in parts.items()
    }
    assert [of["state"] for of in found.values()] == ["whole", "failed (exit 1)", "cut"]
    assert [of["said"] for of in found.values()] == ["", "it broke", "saved"] and found["late"]["seconds"] < 30
    assert "all is well" in log.read_text() and "begun" in log.read_text()


def test_three_commands_fit_their_minutes_and_ten_together():
    assert gpu.ALLOWED == {"right": 120, "fast": 240, "tune": 240}
    for name, parts in gpu.PARTS.items():
        *asked_for, last = parts  # the last has what is left
        assert sum(part.seconds for part in asked_for) + 10 <= gpu.ALLOWED[name] - gpu.PATIENCE, name
        assert last.seconds <= gpu.ALLOWED[name] - gpu.PATIENCE


@pytest.mark.parametrize("part", [part for parts in gpu.PARTS.values() for part in parts], ids=lambda part: part.name)
def test_options_of_every_part_are_known_to_its_command(part):
    """What no GPU has run: a misspelt one would cost its minutes."""
    for words in (part.arguments, part.rehearsal):
        words = [word.format(json="fast.json", out="out") for word in words]
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).is_file() for word in words if word.startswith("tests/"))
            file, _, test = gpu.LEFT_OUT[0].removeprefix("--deselect=").partition("::")
            assert f"def {test}(" in (ROOT / file).read_text()
            continue
        module = COMMANDS[Path(words[0]).stem]
        mine, others = split({field.name for field in fields(module.Command)}, words[1:])
        parsed = tyro.cli(module.Command, args=mine, use_underscores=True)
        assert parsed.out.name.startswith("fast.json#")
        if module is throughput:
            config = load(str(ROOT / parsed.config), others)
            each = config.micro_batch * config.model.seq_len
            assert config.batch_tokens % each == 0 and config.micro_batch == (2 if "quickstart" in parsed.config else 8)
        elif others:
            raise AssertionError(others)
        if module is kernel_ops:
            known = {"x".join(map(str, shape)) for op in parsed.op for shape in kernel_ops.SHAPES["cuda"][op]}
            assert all(any(part in shape for shape in known) for part in parsed.shape)


def test_gpu_tests_are_those_of_every_file_that_has_one():
    named = {Path(name).name for name in gpu.gpu_tests()}
    assert {"test_gpu.py", "test_fit.py", "test_dataset.py", "test_growth.py", "test_parallel.py"} <= named
    assert "test_flops.py" not in named


TESTS = """
import os, pytest
def test_a(): pass
def test_b(): assert 1 == 2, "not the same"
@pytest.mark.skip("no reason")
def test_c(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("on its way out")
def test_t(broken): pass
def test_d(): os.kill(os.getpid(), 9)
def test_e(): pass
"""


def test_recorded_tests_of_a_killed_run_say_what_failed_and_what_is_left(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    out = tmp_path / "right.json"
    sections.write(out, {"about": 1})
    words = [sys.executable, "-m", "pytest", "-q", "-p", "bench.recorded", "--recorded", f"{out}#tests", "--rootdir", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*words, tmp_path / "test_some.py"], cwd=tmp_path, env=environment, capture_output=True)
    found = json.loads(out.read_text())
    assert found["about"] == 1 and found["tests"]["passed"] == 1
    assert found["tests"]["skipped"] == {"test_some.py::test_c": "Skipped: no reason"}
    assert found["tests"]["failed"] == {
        "test_some.py::test_b": "AssertionError: not the same",
        "test_some.py::test_t": "OSError: on its way out",
    }
    assert found["tests"]["left"] == ["test_some.py::test_d", "test_some.py::test_e"]
    subprocess.run([*words, "-n", "1", tmp_path / "test_some.py"], cwd=tmp_path, env=environment, capture_output=True)
    found = json.loads(out.read_text())["tests"]
    assert "crashed" in found["failed"]["test_some.py::test_d"] and (found["passed"], found["left"]) == (2, [])


def test_key_of_an_unpacked_triton_is_the_one_that_it_computes_itself(tmp_path):
    from triton.runtime.cache import triton_key

    assert carried.key_of(Path(triton.__file__).parent.parent) == triton_key()
    with pytest.raises(ValueError, match="holds no Triton: unpack a wheel of triton"):
        carried.key_of(tmp_path)
    (tmp_path / "triton/runtime").mkdir(parents=True)
    (tmp_path / "triton/runtime/cache.py").touch()
    (tmp_path / "triton/__init__.py").write_text("__version__ = '0.1'\n")
    with pytest.raises(ValueError, match=f"is not {triton.__version__}, which compiles here"):
        carried.key_of(tmp_path)


KEEPS = """
import os, sys
from pathlib import Path
from bench import sections
assert (Path(os.environ["TRITON_CACHE_DIR"]) / "KEY").is_dir()
sections.write(Path(sys.argv[1]), dict(found=1))
"""


@pytest.mark.parametrize("name", gpu.PARTS)
def test_rehearsal_of_a_command_keeps_every_part_in_one_file(name, tmp_path, monkeypatch, capsys):
    stand_ins = [gpu.Part(part.name, 1, (), ("-c", KEEPS, f"{{json}}#{part.name}")) for part in gpu.PARTS[name][:-1]]
    stand_ins.append(gpu.Part("last", 1, (), ("-c", "raise SystemExit('it broke')")))
    monkeypatch.setitem(gpu.PARTS, name, tuple(stand_ins))
    monkeypatch.setattr(wheels, "complete", lambda folder, target, tests: ["liger-kernel"])
    cache = tmp_path / "cache"
    (cache / "KEY").mkdir(parents=True)
    (cache / "KEY/kernel.cubin").touch()
    tmp_path = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", name, "--rehearse", "--cache", str(cache), "--out", str(tmp_path)])
    assert gpu.main() == 1
    found = json.loads((tmp_path / f"{name}.json").read_text())
    about = found["about"]
    assert about["rehearsal"] and about["lacking"] == ["liger-kernel"] and "torch" in about["versions"]
    assert about["compiled_before"] == 1 and about["compiled_now"] == 0
    states = {part: of["state"] for part, of in found["parts"].items()}
    assert states == dict.fromkeys((part.name for part in stand_ins[:-1]), "whole") | {"last": "failed (exit 1)"}
    assert all(found[part.name] == {"found": 1} for part in stand_ins[:-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.txt"], "a flat folder"
    kept = {part: of for part, of in found.items() if part != "about"}
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "last"])
    gpu.main()
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert {part: of for part, of in found.items() if part not in ("about", "parts")} == {
        part: of for part, of in kept.items() if part != "parts"
    }
    assert "it broke" in capsys.readouterr().out


def test_patch_of_tuned_rows_is_one_that_git_applies_and_changes_those_rows_only(tmp_path):
    source = (ROOT / "kernels/configs.py").read_text()
    kernel, new = "attention_dq", attention(64, 64, 4, 2, TMA=True)
    rows = [
        asdict(Tuned(kernel, size, 90, as_row(new), as_row(TABLE[kernel][90][size]), 1e-3, 2e-3, 40, "the whole backward"))
        for size in (64, 128)
    ]
    rows.append(
        asdict(Tuned("swiglu_forward", tuning.ANY, 80, "row(8, BLOCK=512)", "row(4, BLOCK=1024)", 1e-4, 2e-4, 20, "the call"))
    )
    rows.append(
        asdict(Tuned("attention_forward", 64, 90, "attention(1, 1, 1, 1)", "attention(1, 1, 1, 1)", 1e-3, 1e-3, 40, "the call"))
    )
    spilled = as_row(TABLE["rms_norm_backward"][80][8192])  # with parentheses within
    rows.append(asdict(Tuned("rms_norm_backward", 8192, 80, "row(8, BLOCK_ROWS=2)", spilled, 1e-4, 2e-4, 20, "the call")))
    made = tuning.patched(source, rows, f"{H100}, triton 3.6.0, 2026-11-28")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/configs.py").write_text(source)
    patch = tmp_path / "tune.patch"
    patch.write_text(tuning.difference(source, made))
    subprocess.run(["git", "apply", patch], cwd=tmp_path, check=True)
    assert (tmp_path / "kernels/configs.py").read_text() == made
    scope = {"__name__": "kernels.configs", "__package__": "kernels"}
    exec(compile(made, "configs.py", "exec"), scope)
    changed = [
        (name, arch, size)
        for name, of in TABLE.items()
        for arch, by_size in of.items()
        for size in by_size
        if as_row(scope["TABLE"][name][arch][size]) != as_row(by_size[size])
    ]
    norm = [("rms_norm_backward", rows_of, 8192) for rows_of in (80, "cdna")]  # which has those of 80
    assert changed == [(kernel, 90, 64), (kernel, 90, 128), *norm, ("swiglu_forward", 80, tuning.ANY)]
    assert "2026-11-28: the whole backward 1000 µs, 2.00 × as fast as before\n" in made and all(
        len(line) <= 128 for line in made.splitlines()
    )
    with pytest.raises(ValueError, match="has no row of attention_dq, 70, 64"):
        tuning.patched(source, [rows[0] | {"arch": 70}], "")


def test_torch_path_as_a_yardstick_on_a_gpu_has_no_attention_of_cudnn(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, allowed in (("torch", False), ("auto", before)):
        with options.yardstick(replace(options.base(True), kernels=name)):
            assert torch.backends.cuda.cudnn_sdp_enabled() == allowed and torch.backends.cuda.math_sdp_enabled()
    assert before == torch.backends.cuda.cudnn_sdp_enabled() and before


def test_option_that_is_apart_or_failed_is_told_by_the_exit_code():
    states = ("reference", "alike", "APART", "failed")
    found = [options.faulty({"options": {"torch": {"state": "reference"}, "plain": {"state": state}}}) for state in states]
    assert found == [False, False, True, True]
    assert not options.faulty({"losses": [1.0]})


def test_tuning_begins_no_row_when_its_time_is_over():
    assert list(tune.tuned([("swiglu_forward", tuning.ANY)], 4, 0.0, torch.device("cpu"))) == []
