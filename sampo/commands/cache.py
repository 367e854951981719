"""`sampo cache`: compute the reference log-probs of a training run in advance; list and delete caches.

- `sampo cache --config FILE`, with the options of `sampo train`: computes what is missing. A `sampo train` with the
  same options and `precompute_ref_log_probs: true` then computes none.
- `--rebuild`: deletes the cache of these options first.
- `--ls`: lists the caches. `--rm NAME …`: deletes caches by the names that `--ls` prints, or `all`.
"""

import argparse
import sys
from typing import Any

from .. import plugins
from .options import OF_TRAIN, RecipeParser
from .options import make_parser as make_train_parser
from .train import launch_or_stay, make_trainer, start_with


def make_parser() -> argparse.ArgumentParser:
    """The command's own options; all others are those of `sampo train`."""
    parser = argparse.ArgumentParser(
        prog="sampo cache",
        description="Compute the per-token reference log-probs of a training run in advance. Takes all options of "
        "`sampo train`, and these:",
        allow_abbrev=False,
        epilog=OF_TRAIN,
    )
    parser.add_argument("--rebuild", action="store_true", help="delete the cache of these options first")
    parser.add_argument("--ls", action="store_true", help="list the contents of the cache, and do nothing else")
    parser.add_argument("--rm", nargs="+", metavar="NAME", help="delete caches by their names in --ls, or `all`")
    plugins.add_option(parser)
    return parser


def run(argv: list[str]) -> int:
    """`sampo cache`: in this process, or through `accelerate launch` for several processes."""
    own, rest = make_parser().parse_known_args(argv)
    if own.ls or own.rm:
        folder = argparse.ArgumentParser(prog="sampo cache", allow_abbrev=False)
        folder.add_argument("--ref_cache_dir", "--ref-cache-dir")
        root = folder.parse_args(rest).ref_cache_dir
        return _remove(root, own.rm) if own.rm else _list_caches(root)
    more = ["--rebuild"] if own.rebuild else []
    return start([*more, *launch_or_stay(rest, _train_parser(), __name__, more)])


def start(argv: list[str] | None = None) -> int:
    """Fill the cache in this process, one of several under a launcher; returns the exit status."""
    own, rest = make_parser().parse_known_args(argv)
    return start_with(_train_parser(), lambda *options: fill_caches(*options, rebuild=own.rebuild), rest)


def fill_caches(
    script_args: Any, training_args: Any, model_args: Any, dataset_args: Any, *, rebuild: bool = False
) -> None:
    """Make the trainer, which fills the cache, and print what was computed. Raises what `sampo train` does."""
    from ..trainer import SamPOTrainer

    class Filler(SamPOTrainer):
        rebuild_ref_cache = rebuild

    training_args.precompute_ref_log_probs = True
    trainer = make_trainer(script_args, training_args, model_args, dataset_args, kind=Filler)
    if trainer.is_world_process_zero():
        for name, cache, computed, seconds in trainer.ref_caches:
            n_bytes, tokens = cache.size()
            print(
                f"{name}: {cache.n_rows:,} pairs, {tokens:,} tokens, {n_bytes / 1e6:.1f} MB in {cache.folder}; "
                f"{computed:,} pairs computed now, in {seconds:.1f} s."
            )
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def _train_parser() -> RecipeParser:
    return make_train_parser(prog="sampo cache")


def _list_caches(folder: str | None) -> int:
    from ..io.tables import Table
    from ..reference_cache.store import RefCacheError, cache_folders, cache_root, read_cache_manifest
    from .shown import say, show

    root = cache_root(folder)
    caches = cache_folders(root)
    heads = ("cache", "created", "pairs", "MB", "shards", "data", "of the run", "stored as", "model")
    table = Table(f"{len(caches)} caches in {root}", heads)
    for path in caches:
        try:
            manifest = read_cache_manifest(path / "manifest.json")
        except RefCacheError as error:
            say(f"{path.name}  not readable: {error}")
            continue
        if manifest is None:
            say(f"{path.name}  without a manifest")
            continue
        shards, about = manifest.shards.values(), manifest.about
        wanted = -(-manifest.rows // manifest.rows_per_shard)
        table.add(
            path.name,
            manifest.created[:16],
            f"{manifest.rows:,}",
            f"{sum(shard.bytes for shard in shards) / 1e6:.1f}",
            "complete" if len(shards) == wanted else f"{len(shards)} of {wanted}",
            *map(str, (about.data, about.output_dir, manifest.key.get("storage_dtype"), about.model)),
        )
    show(table)
    return 0


def _remove(folder: str | None, names: list[str]) -> int:
    from ..reference_cache.store import RefCacheError, cache_folders, cache_root, remove_cache

    caches = {path.name: path for path in cache_folders(cache_root(folder))}
    chosen = list(caches) if names == ["all"] else names
    unknown = [name for name in chosen if name not in caches]
    if unknown:
        print(f"sampo cache: `--rm` must name caches of `sampo cache --ls`, got {unknown}.", file=sys.stderr)
        return 2
    for name in chosen:
        try:
            remove_cache(caches[name])
        except RefCacheError as error:
            print(f"sampo cache: error: {error}", file=sys.stderr)
            return 2
        print(f"deleted {caches[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(start())
