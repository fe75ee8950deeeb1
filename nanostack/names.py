"""Names that modules had, and the second name that one package has.

`import kernels`, in a clone, is `import nanostack.kernels`: the same modules, so that no operator is registered twice. What has
moved says where it is now, as a command (`python -m nanostack.prepare`: one line, exit code 2) and as an import.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

COMMANDS = {  # module that was run: what is typed now
    "nanostack.prepare": "prepare",
    "nanostack.sample": "sample",
    "nanostack.evaluate": "evaluate",
    "nanostack.export": "export",
    "nanostack.import_hf": "import",
    "nanostack.fit": "fit",
    "nanostack.plan": "plan",
    "nanostack.plot": "plot",
    "nanostack.track": "track",
}
MODULES = {  # module that was imported: where its contents are
    "nanostack.prepare": "nanostack.text.corpus",
    "nanostack.sample": "nanostack.generate",
    "nanostack.evaluate": "nanostack.validation and nanostack.commands.evaluate",
    "nanostack.harness": "nanostack.commands.harness",
    "nanostack.export": "nanostack.hf.export",
    "nanostack.import_hf": "nanostack.commands.import_hf",
    "nanostack.fit": "nanostack.memory",
    "nanostack.plan": "nanostack.growth.budget",
    "nanostack.plot": "nanostack.curves",
    "nanostack.data": "nanostack.text.dataset and nanostack.text.manifest",
    "nanostack.sources": "nanostack.text.sources",
    "nanostack.encoding": "nanostack.text.encoding",
    "nanostack.tokenizer": "nanostack.text.tokenizer",
    "nanostack.hub": "nanostack.text.hub",
    "nanostack.metrics": "nanostack.recorder",
    "nanostack.depth": "nanostack.growth.depth",
    "nanostack.width": "nanostack.growth.width",
    "nanostack.learn": "nanostack.growth.learn",
    "nanostack.moments": "nanostack.growth.moments",
}


class Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds modules under the names that they had, only to say where they are now."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in COMMANDS or fullname in MODULES else None

    def get_code(self, fullname: str) -> CodeType:
        """What `python -m` runs."""
        said = f"error: python -m {fullname} is now: nanostack {COMMANDS.get(fullname, '--help')}"
        return compile(f"import sys; print({said!r}, file=sys.stderr); sys.exit(2)", f"<{fullname}>", "exec")

    def get_source(self, fullname: str) -> str | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} is now {MODULES.get(module.__name__, 'a command')}", name=module.__name__)


class Alias(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds `kernels` and all in it as what `nanostack.kernels` holds."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if not fullname.startswith("kernels."):
            return None
        real = importlib.util.find_spec(f"nanostack.{fullname}")
        return real and importlib.util.spec_from_loader(fullname, self, origin=real.origin)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"nanostack.{spec.name}")
        spec.loader_state = module.__spec__  # which the import system is about to replace
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        module.__spec__ = spec.loader_state if spec is not None else None

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m kernels.aot` runs."""
        real = importlib.util.find_spec(f"nanostack.{fullname}")
        return real.loader.get_code(real.name) if real is not None else None

    def get_source(self, fullname: str) -> str | None:
        return None


def install() -> None:
    """Let old names say what they are now."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())


def alias_kernels() -> None:
    """Make `kernels`, which is being imported, another name of `nanostack.kernels`."""
    sys.meta_path.insert(0, Alias())
    importlib.import_module("nanostack.kernels")
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith("nanostack.kernels."):  # found now: a later import would replace kernels.rotary, the function
            sys.modules[name.removeprefix("nanostack.")] = module
