"""Put four files of real muon pairs on a storage element of site.toml, and into its catalog.

Everything made goes below grid/, beside this file. Running it again changes nothing: files with a logical name never
change, and a second split would have other bytes (ROOT writes the time and a UUID into each file).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import anyio
from anyio import to_thread

from loadmaster import Site, StorageError, open_transfers
from loadmaster.names import join_url
from loadmaster.staging.files import OutgoingPath
from loadmaster.storage.base import Catalog, CatalogEntry, Direction, FileInfo, Replica, Transfer
from loadmaster.storage.local import LocalStorage

HERE = Path(__file__).parent
STORAGE_ELEMENT = "OPENDATA-DISK"
LFNS = [f"/cms/opendata/zmumu/zmumu_{number}.root" for number in range(4)]


async def main() -> None:
    site = await to_thread.run_sync(Site.load, HERE / "site.toml")
    async with open_transfers(site) as transfers:
        if transfers.catalog is None:
            sys.exit("site.toml names no catalog")
        known = await transfers.catalog.lookup(LFNS)
        for entry in known.values():
            await check(entry)
            print(f"LFN:{entry.lfn}: is there already, {entry.info.size_bytes} bytes")
        if wanted := [lfn for lfn in LFNS if lfn not in known]:
            await publish(wanted, site, transfers.catalog)
        else:
            print("nothing to do")


async def check(entry: CatalogEntry) -> None:
    """The catalog may remember files that somebody has removed."""
    try:
        sizes = {(await LocalStorage().stat(replica.url)).size_bytes for replica in entry.replicas}
    except StorageError as exc:
        sys.exit(f"LFN:{entry.lfn}: is in the catalog, but {exc}\nremove {HERE / 'grid'} and start again")
    if sizes != {entry.info.size_bytes}:
        sys.exit(f"LFN:{entry.lfn}: is not as the catalog has it\nremove {HERE / 'grid'} and start again")


async def publish(lfns: list[str], site: Site, catalog: Catalog) -> None:
    """Upload first, register then: what the catalog promises is there, also if we are stopped in between."""
    with tempfile.TemporaryDirectory() as scratch:
        parts = await to_thread.run_sync(split, sample(), Path(scratch))
        for lfn in lfns:
            url = join_url(site.storage_elements[STORAGE_ELEMENT], lfn)
            part = Transfer(Direction.UPLOAD, url, OutgoingPath(parts[LFNS.index(lfn)]))
            await LocalStorage().move([part], lambda _: None)
            info = part.result
            if not isinstance(info, FileInfo):
                sys.exit(str(info))
            await catalog.register(CatalogEntry(lfn, info, (Replica(url, STORAGE_ELEMENT),)))
            print(f"LFN:{lfn}: {info.size_bytes} bytes, {info.checksum}, at {STORAGE_ELEMENT}")


def sample() -> Path:
    """The sample inside scikit-hep-testdata, which is looked for and not imported: importing needs more than the file."""
    package = importlib.util.find_spec("skhep_testdata")
    if package is None or not package.submodule_search_locations:
        sys.exit("scikit-hep-testdata is not installed: pip install 'loadmaster[example]'")
    path = Path(package.submodule_search_locations[0], "data", "uproot-Zmumu.root")
    if not path.is_file():
        sys.exit(f"{path}: not there; release 0.3.0 of scikit-hep-testdata has it in its wheel, later ones download it")
    return path


def split(source: Path, directory: Path) -> list[Path]:
    """The tree of the sample in as many files as there are LFNs, the entries in their order. Blocks."""
    import awkward as ak  # here, because these take longer to import than a run with nothing to do takes altogether
    import uproot

    with uproot.open(source) as file:
        columns = file["events"].arrays()
    paths = [directory / lfn.rpartition("/")[2] for lfn in LFNS]
    for number, path in enumerate(paths):
        first, last = (len(columns) * n // len(paths) for n in (number, number + 1))
        # Packed, because uproot before 5.7.6 writes the strings of a slice wrongly.
        part = {name: ak.to_packed(columns[name][first:last]) for name in columns.fields}
        with uproot.recreate(path) as file:
            # A TTree by name: what a plain assignment writes depends on the release of uproot.
            tree = file.mktree("events", {name: column.type.content for name, column in part.items()})
            tree.extend(part)
    return paths


if __name__ == "__main__":
    anyio.run(main)
