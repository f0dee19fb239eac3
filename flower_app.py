"""The entry that Flower loads: `flwr run .`.

Flower unpacks the repository as an app bundle and puts that folder on `sys.path`. The lines below make the unpacked
copy importable as `fedforward`, so the code that was shipped is the code that runs, on every node, without an install.
"""

import importlib.util
import sys
from pathlib import Path

_root = Path(__file__).resolve().parent
if Path(getattr(sys.modules.get("fedforward"), "__file__", "") or "").parent != _root:
    for _name in [name for name in sys.modules if name == "fedforward" or name.startswith("fedforward.")]:
        del sys.modules[_name]
    _spec = importlib.util.spec_from_file_location(
        "fedforward", _root / "__init__.py", submodule_search_locations=[str(_root)]
    )
    sys.modules["fedforward"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["fedforward"])

from fedforward.client import make_client_app  # noqa: E402
from fedforward.server.app import make_server_app  # noqa: E402
from fedforward.simulations.run import finish, prepare  # noqa: E402
from fedforward.simulations.world import load_client  # noqa: E402

client_app = make_client_app(load_client)
server_app = make_server_app(prepare, finish)
