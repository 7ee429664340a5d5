"""Recipes: Python functions that return a Simulation (or a policy), named ``path.py[:function]`` or ``module:function``."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Where a recipe is: a file or module, and the function in it."""

    source: str
    function: str = "simulation"

    @classmethod
    def parse(cls, text: str, default: str = "simulation") -> "Recipe":
        """``recipes/mine.py``, ``recipes/mine.py:small`` or ``package.module:small``."""
        source, _, function = text.partition(":") if not _is_file(text) else (text, "", "")
        if not source:
            raise ValueError(f"a recipe is path.py[:function] or module:function, got {text!r}")
        return cls(source, function or default)

    def __str__(self) -> str:
        source = str(Path(self.source).resolve()) if _is_file(self.source) else self.source
        return f"{source}:{self.function}"

    def module(self) -> ModuleType:
        """Import it. The folder of a file joins the import path, as when Python runs it, so that workers find it too."""
        if not _is_file(self.source):
            try:
                return importlib.import_module(self.source)
            except ModuleNotFoundError as error:
                if error.name is None or not self.source.startswith(error.name):
                    raise
                raise ValueError(f"no module {self.source!r}; a recipe is path.py[:function] or module:function") from error
        return _import_file(Path(self.source).resolve())

    def packages(self) -> tuple[str, ...]:
        """Import it and name its package, or what it brought in from its folder: the code its author vouches for."""
        self.module()
        if not _is_file(self.source):
            return (self.source.partition(".")[0],)
        folder = Path(self.source).resolve().parent
        files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "." not in name}
        return tuple(sorted(name for name, file in files.items() if file and folder in Path(file).resolve().parents))

    def build(self) -> Any:
        """Call the function. ``ValueError`` when it is not there."""
        made = getattr(self.module(), self.function, None)
        if not callable(made):
            raise ValueError(f"{self.source} has no function {self.function!r}")
        return made()


def _is_file(source: str) -> bool:
    return source.endswith(".py")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"no recipe at {path}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if Path(getattr(loaded, "__file__", None) or "").resolve() != path:
            raise ValueError(f"{path.name} has the name of a module that is already imported ({loaded!r}); rename the recipe")
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
