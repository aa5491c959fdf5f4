"""`kvcomm store`: looks into what is kept, checks it, cleans it up, and moves it between hosts. Never prints its text."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvcomm.errors import InputError
from kvcomm.report import document, dumps, write_json
from kvcomm.store.disk import DISK_FAILED, MISSING, DiskStore
from kvcomm.wire.address import Address
from kvcomm.wire.archive import TarSource, TarTarget
from kvcomm.wire.listing import HEAD, Wanted, summed
from kvcomm.wire.moving import Moved, Source, move
from kvcomm.wire.places import FolderPlace, ServerPlace
from kvcomm.wire.status import size
from kvcomm.wire.tokens import read_tokens

__all__ = ["add_arguments", "run"]

Result = tuple[dict[str, Any], list[str], int]  # for a document, for a terminal, exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `kvcomm store`."""
    parser.add_argument("action", choices=ACTIONS, help="list, sum up, check, clean up, or move what is kept")
    parser.add_argument("file", nargs="?", type=Path, help="export to, import from: a folder, or a file that ends with .tar")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--disk", type=Path, metavar="DIR", help="the folder of a server's disk tier")
    place.add_argument("--socket", metavar="ADDRESS", help="a running server: for ls, export and import")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="lines `tenant token`, for a server on another host")
    parser.add_argument("--tenant", help="only this tenant's; with --socket: whose (default: of the one without a name)")
    parser.add_argument("--fingerprint", default="", metavar="HEX", help="only of models whose fingerprint begins like this")


def run(args: argparse.Namespace) -> int:
    """1 where something is damaged, or was left out."""
    if (args.file is None) is (args.action in ("export", "import")):
        raise InputError(f"{args.action} {'needs a' if args.file is None else 'takes no'} file or folder to move from or to")
    body, lines, code = ACTIONS[args.action](args)
    doc = document(f"kvcomm.store.{args.action}/1", place=args.disk or args.socket, **body)
    if args.output is not None:
        write_json(args.output / f"store_{args.action}.json", doc)
    try:
        print(dumps(doc) if args.format == "json" else "\n".join(lines), flush=True)
    except BrokenPipeError:  # as of `| head`; Python must not find it again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _ls(args: argparse.Namespace) -> Result:
    with closing(_place(args)) as place:
        rows = place.rows(_wanted(args))
    return {"objects": rows}, [HEAD, *(row.line() for row in rows)], 0


def _stats(args: argparse.Namespace) -> Result:
    with closing(_folder(args)) as place:
        groups, opened = summed(place.rows(_wanted(args))), place.store.opened
    lines = [f"{'objects':>10}{'tokens':>12}{'bytes':>12}  tenant, fingerprint"]
    lines += [f"{g.objects:>10}{g.tokens:>12}{size(g.nbytes):>12}  {g.tenant or '-'}, {g.fingerprint[:12]}" for g in groups]
    objects, tokens, nbytes = (sum(getattr(g, name) for g in groups) for name in ("objects", "tokens", "nbytes"))
    lines.append(f"{objects:>10}{tokens:>12}{size(nbytes):>12}  in sum")
    return {"objects": objects, "tokens": tokens, "nbytes": nbytes, "groups": groups, "opened": opened}, lines, 0


def _verify(args: argparse.Namespace) -> Result:
    """What goes while it is looked at is not damaged: a server may be at work in the folder."""
    with closing(_folder(args)) as place:
        unreadable = place.store.opened.removed + place.store.opened.failed
        checked = [(key, nbytes, reason) for key, nbytes, reason in _checked(place.store, args) if reason != MISSING]
    damaged = {key: reason for key, _, reason in checked if reason}
    nbytes = sum(nbytes for _, nbytes, _ in checked)
    lines = [f"{key}  {reason}" for key, reason in damaged.items()]
    if unreadable:
        lines.append(f"{unreadable} files without an entry that cannot be read")
    lines.append(f"{len(checked)} objects, {size(nbytes)}: {len(damaged) + unreadable or 'none'} damaged")
    body = {"objects": len(checked), "nbytes": nbytes, "damaged": damaged, "unreadable_files": unreadable}
    return body, lines, int(bool(damaged or unreadable))


def _gc(args: argparse.Namespace) -> Result:
    _folder(args).close()  # is it one?
    before = _bytes(args.disk)
    with closing(FolderPlace(args.disk, writable=True)) as place:
        store, opened = place.store, place.store.opened
        damaged = [key for key, _, reason in _checked(store, args) if reason not in (None, MISSING, DISK_FAILED)]
        removed = sum(store.remove(key) for key in damaged)
        collected, left = store.gc(), store.stats().objects
    files = removed + opened.removed + opened.leftovers + collected.files
    missing, freed = opened.missing + collected.missing, before - _bytes(args.disk)
    body = {"files": files, "freed_bytes": freed, "damaged": removed, "missing": missing, "objects_left": left}
    line = f"{files} files removed, {removed} of them damaged objects; {missing} entries without a file; {size(freed)} freed"
    return body, [line, f"{left} objects left"], 0


def _export(args: argparse.Namespace) -> Result:
    if args.disk is not None and args.disk.resolve() == args.file.resolve():
        raise InputError(f"{args.file} is the folder itself; name another one, or a file that ends with .tar")
    with closing(_place(args)) as source:
        if args.file.suffix != ".tar":
            with closing(FolderPlace(args.file, writable=True)) as folder:
                return _told(args, "to", _moved(args, source, folder))
        with closing(TarTarget(args.file)) as tar:
            moved = _moved(args, source, tar)
            tar.keep()
    return _told(args, "to", moved)


def _import(args: argparse.Namespace) -> Result:
    with closing(FolderPlace(args.file) if args.file.is_dir() else TarSource(args.file)) as source:
        target = _server(args) if args.disk is None else FolderPlace(args.disk, writable=True)
        with closing(target):
            return _told(args, "from", _moved(args, source, target))


ACTIONS: Mapping[str, Callable[[argparse.Namespace], Result]] = {
    "ls": _ls,
    "stats": _stats,
    "verify": _verify,
    "gc": _gc,
    "export": _export,
    "import": _import,
}


def _place(args: argparse.Namespace) -> FolderPlace | ServerPlace:
    return FolderPlace(args.disk) if args.socket is None else _server(args)


def _server(args: argparse.Namespace) -> ServerPlace:
    return ServerPlace(Address.parse(args.socket), args.tenant, read_tokens(args.token_file))


def _folder(args: argparse.Namespace) -> FolderPlace:
    if args.disk is None:
        also = "; `kvcomm server status` tells what a server holds" if args.action == "stats" else ""
        raise InputError(f"{args.action} looks into a folder: give --disk{also}")
    return FolderPlace(args.disk)


def _wanted(args: argparse.Namespace) -> Wanted:
    return Wanted(args.tenant, args.fingerprint)


def _checked(store: DiskStore, args: argparse.Namespace) -> Iterator[tuple[str, int, str | None]]:
    """Key, bytes and reason of each object; reads all of them."""
    with tqdm(total=store.nbytes, unit="B", unit_scale=True, disable=args.quiet or None, leave=False) as bar:
        for entry, reason in store.checked():
            bar.update(entry.nbytes)
            if _wanted(args)(entry.tenant, entry.fingerprint):
                yield entry.key, entry.nbytes, reason


def _moved(args: argparse.Namespace, source: Source, target: FolderPlace | ServerPlace | TarTarget) -> Moved:
    with tqdm(source.items(_wanted(args)), unit=" objects", disable=args.quiet or None, leave=False) as items:
        return move(items, source, target)


def _told(args: argparse.Namespace, way: str, moved: Moved) -> Result:
    lines = [f"{moved.objects} objects and {moved.anchors} anchors, {size(moved.nbytes)}, {way} {args.file}"]
    if moved.here_already:
        lines.append(f"{moved.here_already} were there already")
    for what, reasons in (("skipped, they cannot be used", moved.faults), ("refused", moved.refused)):
        lines += [f"{count} {what}: {reason}" for reason, count in reasons.items()]
    return {"file": args.file, **asdict(moved)}, lines, int(bool(moved.faults or moved.refused))


def _bytes(folder: Path) -> int:
    """Of all files in it."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(where, name)).st_size
    return total
