"""Run the notebooks from top to bottom, and keep what they print and draw: `make notebooks`.

python demos/execute.py                            # all, one after another
python demos/execute.py demos/01_quickstart.ipynb
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main() -> int:
    here = Path(__file__).resolve().parent
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # no widgets: what they show is lost in a file
    for path in [Path(name) for name in sys.argv[1:]] or sorted(here.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(here)}}
        client = NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=resources)
        client.execute()
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
        nbformat.write(notebook, path)  # only a notebook that ran to its end
        print(f"{path}: {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
