"""Executes the notebooks anew, in place: their outputs are committed.

    python scripts/run_notebooks.py [notebooks/01_one_step.ipynb ...]

Without names, all of them. Each runs in a fresh kernel, from its own folder. What the second one
trains lies in a scratch folder, where the third one reads it; in the outputs it is called runs.

Exit codes: 0 done; 1 a cell failed (with its traceback).
"""

import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
SCRATCH = "OPSDC_NOTEBOOK_SCRATCH"  # notebooks that train read it, and then train a small run there
CELL_SECONDS = 600


def main(argv: Sequence[str]) -> int:
    """Executes and rewrites each notebook."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in map(pathlib.Path, argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
            nbformat.write(execute(path, pathlib.Path(scratch)), path)
            print(f"wrote {path} ({path.stat().st_size / 1000:,.0f} kB)", flush=True)
    return 0


def execute(path: pathlib.Path, scratch: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel.

    Args:
      scratch: folder for what it trains; in the outputs it is called runs.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    # tqdm asks for widgets that no committed output needs.
    variables = {SCRATCH: str(scratch), "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env=os.environ | variables)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.reads(nbformat.writes(notebook).replace(str(scratch), "runs"), as_version=4)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
