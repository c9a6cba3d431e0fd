import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[1] / "integrations" / "shared_setup.py"), init_globals={"ETAP_PY": "etap-py"})
