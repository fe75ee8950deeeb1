"""Former names of modules, and the second name of one package.

`import kernels`, in a clone, is `import nanostack.kernels`: the same modules, so that no operator is registered twice. A
module that has moved says where it is now, when it is run (`python -m nanostack.prepare`: one line, exit code 2) and when it is
imported.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {  # module that there was: (where its contents are now, the command that ran it)
    "nanostack.prepare": ("nanostack.text.corpus", "prepare"),
    "nanostack.sample": ("nanostack.generate", "sample"),
    "nanostack.evaluate": ("nanostack.commands.evaluate and nanostack.validation", "evaluate"),
    "nanostack.export": ("nanostack.hf.export", "export"),
    "nanostack.import_hf": ("nanostack.commands.import_hf", "import"),
    "nanostack.fit": ("nanostack.memory", "fit"),
    "nanostack.plan": ("nanostack.growth.budget", "plan"),
    "nanostack.plot": ("nanostack.curves", "plot"),
    "nanostack.track": ("nanostack.track", "track"),  # still a module, which ends in refuse()
    "nanostack.kernels.flash_attention": ("nanostack.kernels.attention and nanostack.kernels.attention_triton", None),
    "nanostack.harness": ("nanostack.commands.harness", None),
    "nanostack.data": ("nanostack.text.dataset and nanostack.text.manifest", None),
    "nanostack.sources": ("nanostack.text.sources", None),
    "nanostack.encoding": ("nanostack.text.encoding", None),
    "nanostack.tokenizer": ("nanostack.text.tokenizer", None),
    "nanostack.hub": ("nanostack.text.hub", None),
    "nanostack.metrics": ("nanostack.recorder", None),
    "nanostack.depth": ("nanostack.growth.depth", None),
    "nanostack.width": ("nanostack.growth.width", None),
    "nanostack.learn": ("nanostack.growth.learn", None),
    "nanostack.moments": ("nanostack.growth.moments", None),
}


def refuse(name: str) -> None:
    """End `python -m NAME` with one line that says what to type instead, and exit code 2."""
    place, command = MOVED[name]
    print(
        f"error: python -m {name} is now: " + (f"nanostack {command}" if command else f"no command; see {place}"),
        file=sys.stderr,
    )
    sys.exit(2)


class Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds modules under the names that they had, only to say where they are now."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def get_code(self, fullname: str) -> CodeType:
        """What `python -m` runs."""
        return compile(f"from nanostack.names import refuse; refuse({fullname!r})", f"<{fullname}>", "exec")

    def get_source(self, fullname: str) -> str | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(f"{module.__name__} is now {MOVED[module.__name__][0]}", name=module.__name__)


class Alias(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds a module of `kernels` that is not loaded yet as the one of `nanostack.kernels`."""

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
        loader = real.loader if real is not None else None
        return loader.get_code(f"nanostack.{fullname}") if isinstance(loader, importlib.abc.InspectLoader) else None

    def get_source(self, fullname: str) -> str | None:
        return None


def install() -> None:
    """Let old names say what they are now."""
    if not any(isinstance(finder, Moved) for finder in sys.meta_path):
        sys.meta_path.append(Moved())


def alias_kernels() -> None:
    """Make `kernels`, which is being imported, another name of `nanostack.kernels`."""
    sys.meta_path.insert(0, Alias())
    package = sys.modules["kernels"] = importlib.import_module("nanostack.kernels")
    for name, module in list(sys.modules.items()):
        _, inside, leaf = name.rpartition("nanostack.kernels.")
        if inside and getattr(package, leaf, None) is not module:
            # kernels.rotary is the function. An import of the module of that name would set it as the attribute instead.
            sys.modules[f"kernels.{leaf}"] = module
