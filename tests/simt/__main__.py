"""Builds every library of the shim."""

import importlib
import os
from concurrent.futures import ThreadPoolExecutor

from tests import simt

for path in simt.HERE.glob("test_*.py"):
    importlib.import_module(f"tests.simt.{path.stem}")
# The longest first; what lies in the thread's hands is a compiler's process.
libraries = sorted(simt.LIBRARIES, key=lambda library: (library.optimise, len(library.text)), reverse=True)
with ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(simt.Library.build, libraries))
