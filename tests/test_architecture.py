"""The arrows of the house: who may import whom, and which names of Flower are touched."""

import ast
from pathlib import Path

import fedforward

ROOT = Path(fedforward.__file__).parent
MAY_USE = {  # layer: the layers it may import besides itself
    "algorithms": set(),
    "scalar_wire": {"algorithms"},
    "protocol": {"algorithms", "scalar_wire"},
    "message_bytes": {"protocol", "scalar_wire"},
    "client": {"algorithms", "protocol", "message_bytes", "scalar_wire"},
    "server": {"algorithms", "protocol", "message_bytes", "scalar_wire"},
    "simulations": {"algorithms", "protocol", "message_bytes", "scalar_wire", "client", "server"},
    "flower_app": {"client", "server", "simulations"},
    "__main__": {"simulations"},
    "__init__": set(),
}
PUBLIC_FLOWER = {"flwr", "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}
INTERNAL_FLOWER = {"flwr.supercore.task_identity": "simulations/engines/local.py"}


def package_files():
    layers = [ROOT / name for name in ("algorithms", "client", "server", "simulations")]
    return sorted([*ROOT.glob("*.py"), *(file for layer in layers for file in layer.rglob("*.py"))])


def imported(file):
    """Yield the full name of every module that a file imports, wherever in the file, relative names resolved."""
    package = ("fedforward", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "flwr" or module.startswith("fedforward"):  # from .. import protocol
                yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(file):
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_file_is_found():
    names = {str(file.relative_to(ROOT)) for file in package_files()}
    assert {"__init__.py", "protocol.py", "server/strategies/fedscalar.py", "simulations/engines/local.py"} <= names
    assert {layer_of(file) for file in package_files()} <= set(MAY_USE)


def test_arrows_point_down_only():
    for file in package_files():
        layer = layer_of(file)
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "fedforward" and len(parts) > 1 and parts[1] in MAY_USE:
                assert parts[1] in MAY_USE[layer] | {layer}, f"{file} imports {name}"


def test_algorithms_know_no_flower():
    for file in package_files():
        if layer_of(file) == "algorithms":
            assert not any(name.split(".")[0] in ("flwr", "flwr_datasets", "ray") for name in imported(file)), file


def test_flower_is_used_by_its_public_names():
    internal = {}
    for file in package_files():
        for name in imported(file):
            if name.split(".")[0] == "flwr" and name not in PUBLIC_FLOWER:
                internal.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    assert internal == {name: {file} for name, file in INTERNAL_FLOWER.items()}


def test_the_supported_flower_stands_beside_the_internal_name():
    assert '"flwr>=1.41,<1.42"' in (ROOT / "pyproject.toml").read_text()


def test_every_package_is_shipped():
    """The packages are listed by hand in pyproject.toml, since the root of the repository is the package."""
    text = (ROOT / "pyproject.toml").read_text()
    for file in package_files():
        package = ".".join(("fedforward", *file.relative_to(ROOT).parent.parts))
        assert f'"{package}",' in text, package
