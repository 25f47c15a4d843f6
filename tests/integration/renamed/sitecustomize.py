"""On PYTHONPATH: another Prefect than the installed one, with another version and with names that it has not.

``PHASEWISE_TEST_RENAMED`` is JSON: module → [[text, what stands there instead], …], applied to the module's source.
Whatever process has this folder on its path reads it before it imports anything.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

CHANGES: dict[str, list[list[str]]] = json.loads(os.environ.get("PHASEWISE_TEST_RENAMED", "{}"))


class Rewriter(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        source = self.get_data(path).decode()
        for text, instead in CHANGES[fullname]:
            assert text in source, f"{fullname} has no {text}"
            source = source.replace(text, instead)
        return compile(source, path, "exec")


class Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Rewriter(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())  # type: ignore[arg-type] # it has the shape of one
