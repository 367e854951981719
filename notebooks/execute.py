"""Run the notebooks, all or those named, and keep their outputs: `python notebooks/execute.py [NOTEBOOK ...]`.

Each notebook begins with cells that this script writes (`with_setup`): a badge that opens it in Colab, and below the
title a cell that installs sampo where it is missing.

What is kept is light: no time stamps, nothing of the machine, and in the metadata one hash of the code and of the
records that it reads, by which the tests see that the outputs belong to them.
"""

import hashlib
import os
import re
import sys
import tomllib
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
KEPT_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
COLAB = "https://colab.research.google.com"
BADGE = "[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{name}/blob/main/notebooks/{notebook})"
INSTALL = """# Installs sampo where it is missing, as in Colab. Elsewhere this cell does nothing.
import importlib.util
import os

if importlib.util.find_spec("sampo") is None:
    !git clone --quiet --depth 1 {address} sampo-checkout
    %pip install --quiet "./sampo-checkout[notebooks]"
if os.path.isdir("sampo-checkout/notebooks"):
    os.chdir("sampo-checkout/notebooks")"""
READS = re.compile(r"\"(\.\./measurements/[^\"]+)\"")


def with_setup(notebook: NotebookNode, name: str, address: str | None = None) -> NotebookNode:
    """The notebook with its badge first and the cell that installs after its title, for a repository at `address`."""
    address = address or repository()
    badge = BADGE.format(colab=COLAB, name=address.split("github.com/")[-1], notebook=name)
    own = [cell for cell in notebook.cells if not is_setup(cell.source)]
    install = nbformat.v4.new_code_cell(INSTALL.format(address=address), id="install")
    install.execution_count = next((cell.execution_count for cell in notebook.cells if cell.id == install.id), None)
    notebook.cells = [nbformat.v4.new_markdown_cell(badge, id="badge"), own[0], install, *own[1:]]
    return notebook


def is_setup(source: str) -> bool:
    """Whether `with_setup` has written a cell."""
    return "/assets/colab-badge.svg" in source or source.startswith(INSTALL.splitlines()[0])


def repository() -> str:
    """Address of the repository, from pyproject.toml."""
    text = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["urls"]["Repository"])


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
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
        for output in cell.get("outputs", []):
            for picture in ("image/png", "image/svg+xml"):  # the text beside one is a class and an address
                if picture in output.get("data", {}):
                    output.data = NotebookNode({picture: output.data[picture]})
                    output.metadata = NotebookNode()
    return notebook


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs with printed texts that follow each other as one: the kernel divides them by time."""
    kept: list[NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream" and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def made_from(notebook: NotebookNode) -> str:
    """Hash of all code but the set-up's, which does nothing here, and of the measurements that it names."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not is_setup(cell.source)]
    digest = hashlib.sha256("\0".join(code).encode())
    for name in sorted({name for source in code for name in READS.findall(source)}):
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:16]


def main(names: list[str]) -> None:
    """Run those named, or all, and replace the files."""
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(with_setup(nbformat.read(path, as_version=4), path.name)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
