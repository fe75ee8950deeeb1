"""A plugin of pytest: what a dry GPU compiles (kernels/dry.py) goes to Triton's cache under the keys that another Python's
Triton looks for, so that it can be carried to a machine with a GPU.

    TRITON_CACHE_DIR=cache python -m pytest -p bench.carried --compiled-for out/triton-3.6.0-cp312 --dry-gpu=sm_90 ...

A key is made of the source of a kernel, how it is specialised, and the files of the Triton that compiles it, its library among
them. The library differs from one Python's wheel to the next, though what it compiles does not: so that wheel, unpacked beside,
is hashed in place of the one at work. Both must be of one version.
"""

import types
from pathlib import Path

import pytest


def key_of(folder: Path) -> str:
    """The share of the key that stands for the Triton in `folder`, as Triton itself computes it there.

    Raises ValueError where there is none, or one of another version.
    """
    import triton
    from triton.runtime import cache

    file = folder / "triton/runtime/cache.py"
    if not file.is_file():
        raise ValueError(f"{folder} holds no Triton: unpack a wheel of triton {triton.__version__} there")
    if f"__version__ = '{triton.__version__}'" not in (folder / "triton/__init__.py").read_text():
        raise ValueError(f"the Triton in {folder} is not {triton.__version__}, which compiles here")
    original = getattr(cache.triton_key, "__wrapped__", cache.triton_key)  # it keeps what it found
    return types.FunctionType(original.__code__, vars(cache) | {"__file__": str(file)})()


def pytest_addoption(parser):
    parser.addoption("--compiled-for", metavar="FOLDER", type=Path, help="a wheel of Triton for another Python, unpacked")


def pytest_configure(config):
    if config.option.compiled_for is None:
        return
    from triton.runtime import cache

    try:
        key = key_of(config.option.compiled_for)
    except ValueError as error:
        raise pytest.UsageError(f"--compiled-for: {error}") from error
    cache.triton_key = lambda: key
