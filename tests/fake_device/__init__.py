"""A device for tests of devices without one: ``make test-device``."""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

__all__ = ["load"]

SOURCE = Path(__file__).parent / "fake_device.cpp"


@cache
def load() -> None:
    """Makes the device ``"fake"``: compiles it (a minute, once for each version of torch), and tells torch of it."""
    folder = Path(tempfile.gettempdir()) / "pyro_amortized_fake_device"
    folder.mkdir(exist_ok=True)
    library = folder / f"{torch.__version__}-{int(SOURCE.stat().st_mtime)}.so"
    if not library.exists():
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", abi]
        links = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
        subprocess.run(["c++", *flags, *includes, str(SOURCE), *links, "-o", str(library)], check=True)
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("fake")
    module = ModuleType("fake")
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True}
    more = {"_is_in_bad_fork": False, "manual_seed_all": None, "get_amp_supported_dtype": [torch.bfloat16]}
    for name, answer in {**answers, **more, "get_rng_state": torch.empty(0), "set_rng_state": None}.items():
        setattr(module, name, lambda *_, answer=answer: answer)
    torch._register_device_module("fake", module)
    torch.utils.generate_methods_for_privateuse1_backend()
