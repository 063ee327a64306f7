"""Modules out of memory: what stands at the top of a train_gpt.py, where `script` copies this file."""

import base64
import json
import lzma
import os
import sys
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import CodeType
from typing import Any


class Bundle(InspectLoader, MetaPathFinder):
    """Imports the modules that `data` holds, before any that is installed. Sources are there for tracebacks, `inspect`
    and torch.compile, under names that no file can have: <this file>/package/module.py."""

    def __init__(self, place: str, data: str) -> None:
        held = json.loads(lzma.decompress(base64.b85decode(data)))
        self.place, self.n_bytes = os.path.abspath(place), os.path.getsize(place)
        self.sources: dict[str, str] = held["sources"]
        self.recipe: dict[str, Any] = held["recipe"]
        sys.meta_path.insert(0, self)

    def path(self, name: str) -> str:
        end = "/__init__.py" if self.is_package(name) else ".py"
        return f"{self.place}/{name.replace('.', '/')}{end}"

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.sources:
            return None
        spec = spec_from_loader(fullname, self, origin=self.path(fullname))
        if spec:
            spec.has_location = True
        return spec

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(fullname + ".") for name in self.sources)

    def get_source(self, fullname: str) -> str:
        if fullname not in self.sources:
            raise ImportError(f"{self.place} holds no {fullname}", name=fullname)
        return self.sources[fullname]

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_source(fullname), self.path(fullname))
