"""Run the notebooks, all or those named, and keep their outputs: `python notebooks/execute.py [NOTEBOOK ...]`.

What is kept is light: no time stamps, nothing of the machine, and in the metadata one hash of the code and of the
records that it reads, by which the tests see that the outputs belong to them.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
KEPT_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
READS = re.compile(r"\"(\.\./measurements/[^\"]+)\"")


def execute(notebook: NotebookNode, *, fast: bool = False, timeout: int = 600) -> NotebookNode:
    """The notebook with outputs of this run alone, run in this folder; `fast` with little of everything, for tests.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    about = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(notebook, timeout=timeout, record_timing=False, resources=about)
    # tqdm asks for widgets, which nothing here needs
    settings = {"SAMPO_NOTEBOOK_FAST": "1" if fast else "", "PYTHONWARNINGS": "ignore:IProgress not found"}
    client.execute(env={**os.environ, **settings})
    return light(notebook)


def light(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from machine to machine and tells a reader nothing."""
    notebook.metadata = nbformat.from_dict({**KEPT_METADATA, "sampo": {"made_from": made_from(notebook)}})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            for picture in ("image/png", "image/svg+xml"):  # the text beside one is a class and an address
                if picture in output.get("data", {}):
                    output.data = NotebookNode({picture: output.data[picture]})
                    output.metadata = NotebookNode()
    return notebook


def made_from(notebook: NotebookNode) -> str:
    """Hash of all code, and of the measurements that it names."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    digest = hashlib.sha256("\0".join(code).encode())
    for name in sorted({name for source in code for name in READS.findall(source)}):
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def main(names: list[str]) -> None:
    """Run those named, or all, and replace the files."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(nbformat.read(path, as_version=4)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
