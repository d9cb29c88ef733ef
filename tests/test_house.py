"""The house rules of ARCHITECTURE.md, read off the source: who imports whom, and what no module may do."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "server", ROOT / "kernels")

# Which of our own parts each part may import, itself aside. Imports run one way:
# cli -> api -> engine -> (model, tol) -> kernels; train sits beside engine, study above both.
MAY_IMPORT = {
    "cli": {"settings", "metrics", "logs", "api", "engine", "model", "tol", "train", "study"},
    "settings": set(),
    "metrics": set(),
    "logs": set(),
    "api": {"settings", "metrics", "logs", "engine"},
    "engine": {"metrics", "logs", "model", "tol", "kernels"},
    "train": {"model", "tol"},
    "study": {"settings", "metrics", "engine", "train", "model", "tol", "kernels"},
    "model": {"tol", "kernels"},
    "tol": {"metrics", "kernels"},
    "kernels": set(),
}
# What runs on a bare GPU machine imports these and the standard library.
NUMERIC = {"torch", "triton", "numpy", "safetensors"}
OPTIONAL = {"tolserve.tol.table": {"zlib_ng"}, "tolserve.model.hf": {"transformers"}}  # behind `except ImportError`
NOT_BARE = {"tolserve.model.hf"}  # an extra; nothing of ours imports it
BARE_PARTS = ("engine", "tol", "model", "kernels")
WIRE = {"msgspec", "zmq"}
WIRE_MODULES = {f"tolserve.engine.{name}" for name in ("messages", "client", "child", "boot", "pulse", "process")}
WITHOUT_TORCH = ("api", "settings", "metrics", "logs")

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    tree: ast.Module
    lines: int

    @property
    def part(self) -> str:
        """The entry of MAY_IMPORT that it belongs to."""
        return part_of(self.name)


def part_of(name: str) -> str:
    top, _, rest = name.partition(".")
    if top == "tolkernels":
        return "kernels"
    part = rest.split(".")[0]
    # The package itself and `python -m tolserve` are doors to the command line.
    return "cli" if part == "__main__" else part


@cache
def modules() -> list[Module]:
    found = []
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            name = ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text()
            found.append(Module(name, path, ast.parse(text, str(path)), len(text.splitlines())))
    return found


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those inside functions included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{module.path}:{node.lineno}: a relative import")
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def complain(faults: list[str]) -> None:
    assert not faults, "\n".join(faults)


def test_every_part_is_known() -> None:
    assert {module.part for module in modules()} - {""} <= MAY_IMPORT.keys()
    assert len(modules()) > 10


def test_imports_run_one_way() -> None:
    faults = []
    for module in modules():
        allowed = MAY_IMPORT.get(module.part, set()) | {module.part}
        for line, name in imports(module):
            # `from tolserve import __version__` names the package itself.
            if name.split(".")[0] not in ("tolserve", "tolkernels") or name in ("tolserve", "tolserve.__version__"):
                continue
            if part_of(name) not in allowed:
                faults.append(f"{module.path}:{line}: {module.part} must not import {name}")
    complain(faults)


def test_what_runs_on_a_bare_machine_imports_nothing_else() -> None:
    faults = []
    for module in modules():
        if module.part not in BARE_PARTS and module.name != "tolserve.metrics":
            continue
        allowed = NUMERIC | {"tolserve", "tolkernels"} | sys.stdlib_module_names
        allowed |= WIRE if module.name in WIRE_MODULES else set()
        allowed |= OPTIONAL.get(module.name, set())
        if module.name == "tolserve.metrics":
            allowed -= NUMERIC
        faults += [
            f"{module.path}:{line}: {name} is not among what {module.part} may import"
            for line, name in imports(module)
            if name.split(".")[0] not in allowed
        ]
    complain(faults)


def test_triton_is_optional() -> None:
    """Only modules named for it import triton at their top; they are imported by the dispatch alone."""
    faults = []
    for module in modules():
        for line, name in imports(module):
            if name.split(".")[0] == "triton" and not module.name.endswith("_triton"):
                faults.append(f"{module.path}:{line}: triton is imported outside a *_triton module")
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("_triton"):
                faults.append(f"{module.path}:{node.lineno}: a *_triton module is imported at the top of another")
    complain(faults)


def environment_reads(module: Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.lineno
    yield from (line for line, name in imports(module) if name in {f"os.{variable}" for variable in names})


def test_the_environment_is_read_in_settings_alone() -> None:
    complain(
        [
            f"{module.path}:{line}: environment variables are settings.py's"
            for module in modules()
            if module.name != "tolserve.settings"
            for line in environment_reads(module)
        ]
    )


def unsafe_loading(node: ast.AST) -> bool:
    """torch.load, and numpy.load without `allow_pickle=False`, can run code from the file."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"):
        return False
    owner = node.func.value
    if not isinstance(owner, ast.Name) or owner.id not in ("torch", "np", "numpy"):
        return False
    safe = any(k.arg == "allow_pickle" and getattr(k.value, "value", None) is False for k in node.keywords)
    return owner.id == "torch" or not safe


def test_nothing_is_unpickled() -> None:
    faults = []
    for module in modules():
        names = [(line, name) for line, name in imports(module) if name.split(".")[0] in UNSAFE_IMPORTS]
        faults += [f"{module.path}:{line}: {name}" for line, name in names]
        loads = (node for node in ast.walk(module.tree) if unsafe_loading(node))
        faults += [f"{module.path}:{node.lineno}: a load that may unpickle" for node in loads]
    complain(faults)


def test_nothing_is_validated_by_assert_and_no_error_is_caught_unnamed() -> None:
    faults = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Assert):
                faults.append(f"{module.path}:{node.lineno}: assert; raise an error that says what to do")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                faults.append(f"{module.path}:{node.lineno}: a bare except")
    complain(faults)


def test_functions_and_files_stay_readable() -> None:
    faults = [
        f"{module.path}: {module.lines} lines; at most {MAX_FILE_LINES}"
        for module in modules()
        if module.lines > MAX_FILE_LINES
    ]
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{module.path}:{node.lineno}: {node.name} has {length} lines")
    complain(faults)


def run_python(code: str) -> str:
    paths = os.pathsep.join(str(source) for source in SOURCES)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_api_process_never_imports_torch() -> None:
    names = [module.name for module in modules() if module.part in WITHOUT_TORCH]
    # The command line loads the heavy parts inside the commands that need them.
    names += [module.name for module in modules() if module.name == "tolserve.cli"]
    names += ["tolserve.engine.client", "tolserve.engine.boot"]
    loaded = run_python(f"import {', '.join(names)}, sys; print(*sys.modules)").split()
    assert set(names) <= set(loaded)
    assert not {"torch", "triton"} & set(loaded)


def test_a_bare_machine_can_import_what_runs_there() -> None:
    """With every other distribution hidden, the modules still import: nothing comes in by a side door."""
    names = [module.name for module in modules() if module.part in BARE_PARTS and module.name not in WIRE_MODULES]
    names = [name for name in names if not name.endswith("_triton") and name not in NOT_BARE]
    hidden = ["zlib_ng", "msgspec", "zmq", "tokenizers", "pydantic", "pydantic_settings", "fastapi", "uvicorn", "tqdm"]
    run_python(f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); import {', '.join(names)}")
