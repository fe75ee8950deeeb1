"""`python -m pytest --dry-gpu=sm_90,sm_80`: gpu tests of kernels with no GPU, each launch compiled as the JIT would, none run.

A CPU tensor stands for one on the GPU (kernels/dry.py). A launch that does not compile, spills beyond its row of configs.py,
needs too much shared memory or gives TMA what it refuses fails its test. What a test says about values is passed over and
counted: this tells whether the kernels can be launched, never whether they are right. The tests of test_operations.py and
test_attention.py, which the interpreter runs for their values, run here for their shapes.

`make dry-gpu` runs it whole; `make dry-gpu TRITON=3.6.0` with another Triton, unpacked beside and not installed.
"""

import pytest
import torch

from kernels import dry

# They need a device: streams, graphs, the allocator, the profiler, torch.compile for CUDA, processes of their own, or more
# memory than a machine without a GPU has.
NOT_DRY = {
    "test_batches_arrive_on_the_gpu_as_they_are",
    "test_compiled_model_block_gives_the_numbers_of_eager",
    "test_gpu_run_through_triton_follows_the_torch_path_and_resumes",
    "test_graph_of_all_operations_replays_with_new_inputs",
    "test_growth_leaves_no_memory_that_nothing_can_use",
    "test_kernels_run_on_the_device_of_their_tensors",
    "test_kernels_run_on_the_stream_that_is_current",
    "test_logits_past_2_to_the_31",
    "test_nothing_passes_through_the_host_and_memory_grows_by_the_new_layers",
    "test_offsets_past_2_to_the_31",
    "test_predicted_peak_is_what_a_gpu_allocates_within_five_per_cent",
    "test_scratch_memory_of_descriptors_is_given_back",
    "test_segments_of_a_run_can_grow",
    "test_tune_measures_a_kernel",
}

active = False  # whether this run is dry; set before any test module is imported
_passed_over = 0


def pass_over() -> None:
    """Count an assertion on values that a dry run cannot make."""
    global _passed_over
    _passed_over += 1


def unfilled_product(a: torch.Tensor, b: torch.Tensor, out_dtype=None, out=None) -> torch.Tensor:
    """torch.mm without the work: the vendor library's, which is not under test, and takes minutes at a GPU's sizes."""
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype) if out is None else out


class DryRun:
    """The pytest plugin of a dry run."""

    def __init__(self, names: str):
        global active
        self.gpus = {arch: dry.DryGPU(arch) for arch in dry.architectures(names)}
        self.tests, self.launches, self.assertions, self.compiled = 0, 0, 0, set()
        active = True

    def pytest_generate_tests(self, metafunc):
        metafunc.parametrize("dry_gpu", self.gpus, ids=[dry.named(arch) for arch in self.gpus], indirect=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config, items):
        chosen = [item for item in items if "gpu" in item.keywords and item.originalname not in NOT_DRY]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    @pytest.fixture(autouse=True)
    def dry_gpu(self, request, monkeypatch):
        """Its launches are compiled for one architecture, its comparisons counted."""
        gpu, before = self.gpus[request.param], _passed_over

        def counted(result):
            def compare(*_, **__):
                pass_over()
                return result

            return compare

        monkeypatch.setattr(torch, "mm", unfilled_product)
        monkeypatch.setattr(torch, "equal", counted(True))
        monkeypatch.setattr(torch.testing, "assert_close", counted(None))
        monkeypatch.setattr(torch.library, "opcheck", lambda op, args, **_: (pass_over(), op(*args)))
        launched = gpu.launches
        with gpu:
            yield
        found = {"launches": gpu.launches - launched, "assertions": _passed_over - before}
        request.node.user_properties.append(("dry", found | {"compiled": [f"{request.param} {h}" for h in gpu.compiled]}))

    def pytest_runtest_logreport(self, report):
        found = dict(report.user_properties).get("dry")
        if found and report.when == "teardown":
            self.tests += 1
            self.launches += found["launches"]
            self.assertions += found["assertions"]
            self.compiled |= set(found["compiled"])

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("dry GPU")
        terminalreporter.write_line(
            f"Triton {dry.triton.__version__}, {', '.join(dry.named(arch) for arch in self.gpus)}: {self.tests} tests, "
            f"{self.launches} launches, {len(self.compiled)} kernels compiled; nothing was run, "
            f"and {self.assertions} assertions on values were passed over"
        )
        terminalreporter.write_line(f"{len(NOT_DRY)} tests need a GPU and were left out: {', '.join(sorted(NOT_DRY))}")
