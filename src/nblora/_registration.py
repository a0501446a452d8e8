"""Registers NB-LoRA with PEFT as soon as PEFT is imported, without importing it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

# Note [Light import and automatic registration]
#
# `import nblora` followed by PeftModel.from_pretrained(...) must work, so PEFT must learn of NB-LoRA.
# But importing PEFT takes seconds and pulls in transformers, which a user of the mathematics alone
# does not want. So registration waits for PEFT: at once if it is there already, else after its import,
# through the standard import machinery: a finder that answers only for "peft", until that is loaded.


def when_peft_is_imported() -> None:
    """Register now if PEFT is imported already, else right after it is. Safe to call again."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


def _register() -> None:
    importlib.import_module("nblora.tuner")  # registers when it is imported


class _PeftFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """PEFT's own spec, with a loader that registers. Asking for it alone loads and changes nothing."""
        if fullname != "peft":
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """The given loader, and registration after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # what PEFT and pkgutil see is the original
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PeftFinder)]
        self._loader.exec_module(module)
        _register()
