import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import cosearch.core

CHECKOUT = Path(__file__).resolve().parents[2]


def test_the_core_imports_neither_jax_nor_flax():
    modules = [f"cosearch.core.{module.name}" for module in pkgutil.iter_modules(cosearch.core.__path__)]
    assert "cosearch.core.space" in modules
    code = (
        "import importlib, json, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert not {"jax", "jaxlib", "flax", "optax", "hydra", "wandb"} & set(json.loads(result.stdout))
