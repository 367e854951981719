"""`sampo recipes ls | show NAME | cp NAME DEST`: the recipes that come with the package."""

import argparse
import difflib
import os
from pathlib import Path

from ..io.files import write_atomic
from ..io.schemas import shown


def packaged(kind: str) -> Path:
    """Folder of the `recipes` or `configs` that belong to this installation.

    In a wheel they are inside the package, in a source checkout beside it.
    """
    package = Path(__file__).resolve().parents[1]
    candidates = [package / "_data" / kind, package.parent / kind]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"`{kind}` must be in {candidates[0]} or {candidates[1]}, got neither. Install the package again."
    )


def recipes() -> dict[str, Path]:
    """Name (`model/file`, without the suffix) and path of every recipe, sorted."""
    folder = packaged("recipes")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def find_recipe(name: str) -> Path:
    """Path of the recipe of that name; `.yaml` and a leading `recipes/` may be there or not.

    Raises:
        ValueError: there is none; the text continues "`option` must be …".
    """
    known = recipes()
    plain = name.removeprefix("recipes/").removesuffix(".yaml")
    if plain not in known:
        near = [one for one in known if plain in one][:3] or difflib.get_close_matches(plain, known, n=3)
        hint = f"Did you mean {' or '.join(f'`{n}`' for n in near)}? " if near else ""
        raise ValueError(f"the name of a recipe, got {shown(name)}. {hint}`sampo recipes ls` lists all.")
    return known[plain]


def refuse_existing(target: Path, option: str) -> None:
    """Refuse to write a recipe over another file, or into a folder that is not there.

    Raises:
        ValueError: with the name of the option.
    """
    if os.path.lexists(target):
        raise ValueError(f"`{option}` must not exist yet, got {target}. Choose another name or remove it.")
    if not target.parent.is_dir():
        raise ValueError(f"`{option}` must be in an existing folder, got {target}. Make {target.parent}.")


def make_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="sampo recipes", description="The recipes that come with the package.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls | show | cp")
    actions.add_parser("ls", help="names, one a line, with the first line of each file")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", help="as `sampo recipes ls` prints it")
    copy = actions.add_parser("cp", help="copy a recipe, to be changed")
    copy.add_argument("name", help="as `sampo recipes ls` prints it")
    copy.add_argument("dest", type=Path, help="file to write, or an existing folder")
    return parser


def main(args: argparse.Namespace) -> None:
    """Do what was asked."""
    if args.action == "ls":
        _list_recipes()
        return
    try:
        recipe = find_recipe(args.name)
    except ValueError as error:
        raise SystemExit(f"sampo recipes: error: `name` must be {error}") from None
    if args.action == "show":
        print(recipe.read_text(encoding="utf-8"), end="")
    else:
        _copy_recipe(recipe, args.dest)


def _list_recipes() -> None:
    from ..io.tables import screen_width, wrapped

    known = recipes()
    width = max(map(len, known))
    for name, path in known.items():
        with path.open(encoding="utf-8") as lines:
            about = next(lines).lstrip("# ").rstrip()
        print("\n".join(wrapped(f"{name:<{width}}  {about}", screen_width())))


def _copy_recipe(recipe: Path, dest: Path) -> None:
    target = dest / recipe.name if dest.is_dir() else dest
    try:
        refuse_existing(target, "dest")
    except ValueError as error:
        raise SystemExit(f"sampo recipes: error: {error}") from None
    write_atomic(target, recipe.read_bytes())
    print(target)
