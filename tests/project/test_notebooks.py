"""The notebooks run, small in every test run and whole among the slow ones; what is committed is what they said."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
from execute import execute, is_setup, light, made_from, with_setup  # noqa: E402, found by the path above

QUICK = ("length_bias", "win_rate_and_length")  # run in every test run
NAMES = (*QUICK, "what_is_learned", "choosing_a_weighting", "from_audit_to_decision")
LARGEST = 300_000  # bytes
MACHINE = re.compile(r"(?<![\w.<])/(?:home|root|Users|tmp|work|usr|opt|var|private)/|[A-Z]:\\\\|\.venv|site-packages")
TIME_STAMP = re.compile(r"20\d\d-\d\d-\d\d[T ]\d\d:\d\d")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def said(notebook):
    """All text that the cells have put out."""
    texts = [output.get("text", "") for output in outputs(notebook)]
    return "\n".join([*texts, *(output.get("data", {}).get("text/plain", "") for output in outputs(notebook))])


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def with_settings(notebook, **settings):
    """The notebook with other values in its settings, the first code cell after the set-up, which must name each."""
    cell = next(cell for cell in code_cells(notebook) if not is_setup(cell.source))
    for name, value in settings.items():
        cell.source, found = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.MULTILINE)
        assert found == 1, f"{name} is no setting"
    return notebook


def assert_ran_to_the_end(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"stream", "display_data", "execute_result"}
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []


def test_every_notebook_is_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


# --- what is committed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_committed_outputs_are_of_the_last_code_and_of_the_records_that_it_reads(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert_ran_to_the_end(notebook)
    assert notebook.metadata.sampo.made_from == made_from(notebook), "run `make notebooks`"
    assert pictures(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_light_and_say_nothing_of_the_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    notebook = read(name)
    assert not MACHINE.search(said(notebook))
    assert not TIME_STAMP.search(said(notebook))
    assert "warning" not in said(notebook).lower()
    assert set(notebook.metadata) == {"kernelspec", "language_info", "sampo"}
    assert all(cell.metadata == {} for cell in notebook.cells)
    tables = "".join(str(output.data.get("text/html", "")) for output in outputs(notebook) if "data" in output)
    assert not MACHINE.search(tables)


@pytest.mark.parametrize("name", NAMES)
def test_prose_states_no_measured_numbers(name):
    """What was measured is printed by a cell: prose would not change with it."""
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    prose = re.sub(r"\]\([^)]*\)|`[^`]*`", "", prose)
    assert not re.findall(r"\d+\.\d+(?! is\s+chance)(?<!0\.5)|\d+(?:\.\d+)? ?(?:tokens|points)", prose)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name):
    prose = "\n".join(c.source for c in read(name).cells if c.cell_type == "markdown" and not is_setup(c.source))
    links = re.findall(r"\]\(([^)#]+)", prose)
    assert links
    assert [link for link in links if not (FOLDER / link).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_each_tells_how_long_it_takes_and_what_to_do_with_data_of_ones_own(name):
    badge, first, install, *_, last = read(name).cells
    assert is_setup(badge.source)
    assert is_setup(install.source)
    assert f"/blob/main/notebooks/{name}.ipynb" in badge.source
    assert first.source.startswith("# ")
    assert re.search(r"takes\s+(about\s+a\s+minute|one\s+to\s+two\s+minutes|several\s+minutes|seconds)", first.source)
    assert last.source.startswith("## With your own ")
    assert "`DATA`" in last.source


def test_the_cells_of_the_setup_are_written_once_and_with_the_address_of_the_repository():
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    notebook = new_notebook(cells=[new_markdown_cell("# Title"), new_code_cell("1")])
    once = with_setup(notebook, "a.ipynb", "https://github.com/people/project")
    sources = [cell.source for cell in once.cells]
    assert sources[0] == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/people/project/blob/main/notebooks/a.ipynb)"
    )
    assert sources[1] == "# Title"
    assert "git clone --quiet --depth 1 https://github.com/people/project sampo-checkout" in sources[2]
    assert sources[3] == "1"
    again = with_setup(once, "b.ipynb", "https://github.com/others/fork")
    assert len(again.cells) == 4
    assert "others/fork/blob/main/notebooks/b.ipynb" in again.cells[0].source


def test_the_install_cell_clones_and_installs_only_where_sampo_is_missing(tmp_path, monkeypatch):
    source = next(cell for cell in code_cells(read("length_bias")) if is_setup(cell.source)).source
    commands = []
    plain = re.sub(r"^(\s*)[!%](.*)$", r"\1run(\2)", source, flags=re.MULTILINE)
    plain = re.sub(r"run\((.*)\)$", lambda match: f"run({match[1]!r})", plain, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(plain, {"run": commands.append})
    assert (commands, Path.cwd()) == ([], tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "sampo-checkout" / "notebooks").mkdir(parents=True)
    exec(plain, {"run": commands.append})
    assert [command.split()[0] for command in commands] == ["git", "pip"]
    assert Path.cwd() == tmp_path / "sampo-checkout" / "notebooks"


# --- they run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMES]
)
def test_a_notebook_runs(name):
    committed = (FOLDER / f"{name}.ipynb").read_bytes()
    done = execute(read(name), fast=True)
    assert_ran_to_the_end(done)
    assert len(pictures(done)) == len(pictures(read(name)))
    assert not MACHINE.search(said(done))
    assert (FOLDER / f"{name}.ipynb").read_bytes() == committed


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_notebook_runs_and_stays_light(name):
    done = execute(read(name))
    assert_ran_to_the_end(done)
    assert len(nbformat.writes(done).encode()) < LARGEST
    assert not MACHINE.search(said(done))


def write_pairs(path, count=60):
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"Name {i} things.",
            "chosen": "thing " * int(a),
            "rejected": "thing " * int(b),
            "source": "ab"[i % 2],
        }
        for i, (a, b) in enumerate(rng.integers(1, 30, size=(count, 2)))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return sum(len(row["chosen"]) > len(row["rejected"]) for row in rows) / count


@pytest.mark.slow
def test_length_bias_audits_pairs_of_ones_own(tmp_path):
    longer = write_pairs(tmp_path / "pairs.jsonl")
    done = execute(with_settings(read("length_bias"), DATA=str(tmp_path / "pairs.jsonl"), BY="source"), fast=True)
    assert_ran_to_the_end(done)
    assert f"{100 * longer:.1f} %" in said(done)
    assert "60 pairs" in said(done)
    assert "true value" not in said(done)


@pytest.mark.slow
def test_win_rate_and_length_reads_judgements_of_ones_own(tmp_path):
    from sampo.cli import main

    for name, words in (("ours", 3), ("theirs", 2)):
        rows = [{"prompt": f"Number {i}?", "answer": " ".join([str(i)] * (1 + i % words))} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["--system", f"{tmp_path}/ours.jsonl", "--baseline", f"{tmp_path}/theirs.jsonl"]
    main(["judge", *files, "--judge", "longer", "--out", f"{tmp_path}/judged.jsonl"])
    done = execute(with_settings(read("win_rate_and_length"), DATA=f"{tmp_path}/judged.jsonl"), fast=True)
    assert_ran_to_the_end(done)
    assert "judged wins" in said(done)
    assert "fair judge" not in said(done)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two untrained models of the lab with their tokenizer, and pairs in its words."""
    from sampo.lab.model import build_model, save
    from sampo.lab.world import World, text

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "tuned")):
        save(build_model(seed).eval(), folder / name)
    rows = [
        {"prompt": text(p.question.prompt), "chosen": " " + text(p.chosen), "rejected": " " + text(p.rejected)}
        for p in World(3).annotated_pairs(40, bias=1)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
def test_what_is_learned_diagnoses_models_of_ones_own(models):
    settings = {"DATA": f"{models}/pairs.jsonl", "REFERENCE": f"{models}/base", "POLICIES": [f"{models}/tuned"]}
    done = execute(with_settings(read("what_is_learned"), **settings), fast=True)
    assert_ran_to_the_end(done)
    assert "tuned: its margins lean" in said(done)
    assert "true quality." not in said(done)


@pytest.mark.slow
def test_choosing_a_weighting_takes_pairs_and_a_model_of_ones_own(models):
    settings = {"DATA": f"{models}/pairs.jsonl", "MODEL": f"{models}/base"}
    done = execute(with_settings(read("choosing_a_weighting"), **settings), fast=True)
    assert_ran_to_the_end(done)
    assert "chosen longer: lengthens" in said(done)


@pytest.mark.slow
def test_from_audit_to_decision_takes_pairs_and_a_model_of_ones_own(models):
    settings = {"DATA": f"{models}/pairs.jsonl", "MODEL": f"{models}/base", "METHODS": ["dpo", "rdpo=0.01"]}
    done = execute(with_settings(read("from_audit_to_decision"), **settings), fast=True)
    assert_ran_to_the_end(done)
    assert "2 runs with equal budget" in said(done)
    assert "true quality" not in said(done)


# --- what is kept of a run ------------------------------------------------------------------------------------------


def notebook_of(*sources):
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    return new_notebook(cells=[new_markdown_cell("prose"), *map(new_code_cell, sources)])


def test_pictures_lose_their_address_and_cells_their_time_stamps():
    from nbformat.v4 import new_output

    notebook = notebook_of("1")
    data = {"image/png": "AAAA", "text/plain": "<Figure at 0x7f>"}
    notebook.cells[1].metadata = {"execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"}}
    notebook.cells[1].outputs = [new_output("display_data", data), new_output("display_data", {"text/plain": "kept"})]
    notebook.metadata["papermill"] = {"start_time": "now"}
    kept = light(notebook)
    assert [output.data for output in kept.cells[1].outputs] == [{"image/png": "AAAA"}, {"text/plain": "kept"}]
    assert kept.cells[1].metadata == {}
    assert "papermill" not in kept.metadata


def test_printed_lines_are_one_output_however_the_kernel_divided_them():
    from nbformat.v4 import new_output

    notebook = notebook_of("1")
    lines = [new_output("stream", name="stdout", text=f"{i}\n") for i in range(3)]
    notebook.cells[1].outputs = [*lines[:2], new_output("display_data", {"text/plain": "x"}), lines[2]]
    kept = light(notebook).cells[1].outputs
    assert [output.get("text", "x") for output in kept] == ["0\n1\n", "x", "2\n"]


def test_the_hash_changes_with_code_and_records_and_not_with_prose():
    records = '"../measurements/lab.jsonl"'
    plain = made_from(notebook_of("a = 1", "b = 2"))
    again = notebook_of("a = 1", "b = 2")
    again.cells[0].source = "other prose"
    assert made_from(again) == plain
    assert made_from(notebook_of("a = 1", "b = 3")) != plain
    assert made_from(notebook_of("a = 1b", " = 2")) != plain
    named = made_from(notebook_of(f"read({records})"))
    other = FOLDER / "../measurements/lab.jsonl"
    import hashlib

    assert named == hashlib.sha256(f"read({records})".encode() + other.read_bytes()).hexdigest()[:16]


def test_a_failing_cell_fails_the_run():
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="on purpose"):
        execute(notebook_of("raise ValueError('on purpose')"), fast=True)
