"""What to move, from where, to where: decisions from a description, a site and a catalog's answers. Nothing is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadmaster.description import InputFile, JobDescription, OutputFile
from loadmaster.errors import InvalidJob, StagingFailed
from loadmaster.names import SANDBOX_PREFIX, as_url, is_lfn, is_url, join_url, parse_lfn, user_lfn
from loadmaster.site import Site
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica
from loadmaster.storage.checksums import Checksum

MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Fetch:
    """One file to bring in: its name, where it can be had in order of preference, what is known of its content."""

    name: str
    sources: tuple[Replica, ...]
    size_bytes: int | None = None
    checksum: Checksum | None = None
    lfn: str | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """One file to take out: its name, where it may go in order of preference, and where it is safe if none takes it."""

    name: str
    targets: tuple[Replica, ...]
    failover: tuple[Replica, ...] = ()
    lfn: str | None = None
    file: str | None = None
    """What it is called in the work directory, when that is another name."""
    size_bytes: int | None = None
    """As it was seen last."""


# -- inputs ------------------------------------------------------------------------------------------------------


def lfns_of(files: Iterable[InputFile]) -> list[str]:
    """The logical names a catalog has to be asked about: what says so, and absolute paths, which may be some."""
    return [path for file in files if (path := _possible_lfn(file.source)) is not None]


def plan_fetches(files: Iterable[InputFile], known: Mapping[str, CatalogEntry], site: Site) -> list[Fetch]:
    """How to get each file. Raises `StagingFailed` that names every one that cannot be had."""
    fetches, problems = [], []
    for file in files:
        try:
            fetches.append(_plan_fetch(file, known, site))
        except ValueError as exc:
            problems.append(str(exc))
    if problems:
        raise StagingFailed("cannot find inputs", problems)
    return fetches


def _plan_fetch(file: InputFile, known: Mapping[str, CatalogEntry], site: Site) -> Fetch:
    lfn = _possible_lfn(file.source)
    if lfn is not None and lfn in known:
        entry = known[lfn]
        if not entry.replicas:
            raise ValueError(f"LFN:{lfn}: the catalog knows no replica")
        local_first = sorted(entry.replicas, key=lambda replica: replica.storage_element not in site.storage_elements)
        return _fetch(file, tuple(local_first), entry.info, lfn)
    if is_lfn(file.source):
        where = "is not in the catalog" if site.catalog else "needs a catalog: give a site configuration"
        raise ValueError(f"{file.source}: {where}")
    if file.source.startswith(SANDBOX_PREFIX):
        if site.sandbox_store is None:
            raise ValueError(f"{file.source}: needs a sandbox_store in the site configuration")
        return _fetch(file, (Replica(join_url(site.sandbox_store, file.source.partition("|")[2])),))
    return _fetch(file, (Replica(as_url(file.source)),))


def _fetch(
    file: InputFile, sources: tuple[Replica, ...], info: FileInfo | None = None, lfn: str | None = None
) -> Fetch:
    size = file.size_bytes if file.size_bytes is not None else info.size_bytes if info else None
    said = file.checksum or file.adler32
    checksum = Checksum.parse(said) if said else info.checksum if info else None
    return Fetch(file.name, sources, size, checksum, lfn)


def _possible_lfn(source: str) -> str | None:
    if is_lfn(source):
        return parse_lfn(source)
    try:
        return parse_lfn(source) if source.startswith("/") else None
    except ValueError:  # an ordinary path that no catalog would have
        return None


# -- outputs -----------------------------------------------------------------------------------------------------


def check_outputs(job: JobDescription, site: Site) -> None:
    """Raise `InvalidJob` now if an output has nowhere to go, rather than when it has been computed."""
    for file in job.output_data:
        plan_delivery(file, _last_part(file.pattern), job, site)
    if job.output_sandbox:
        sandbox_directory(job, site)


def plan_delivery(file: OutputFile, name: str, job: JobDescription, site: Site) -> Delivery:
    """Where one output file goes. Raises `InvalidJob` that names the field at fault."""
    try:
        return _plan_delivery(file, name, job, site)
    except ValueError as exc:  # a name that is too long, as a rule
        raise InvalidJob(f"output_data: {name}: {exc}") from exc


def _plan_delivery(file: OutputFile, name: str, job: JobDescription, site: Site) -> Delivery:
    several = bool(MAGIC & set(file.pattern)) or name != file.pattern
    if file.target is not None and not is_lfn(file.target):
        if file.target.startswith("."):
            raise InvalidJob(f"output_data: {file.target}: a relative target; see JobDescription.relative_to")
        several = several or file.target.endswith("/")
        url = join_url(as_url(_directory(file.target)), _last_part(name)) if several else as_url(file.target)
        return Delivery(name, (Replica(url),))
    wanted = job.output_se or site.default_se
    if not wanted and file.target is None:
        return Delivery(name, (Replica(_in_output_directory(_last_part(name), job, site)),))
    if not wanted:
        raise InvalidJob(f"output_data: {file.target}: no storage element: name one in output_se")
    if all(_is_place(element) for element in wanted) and file.target is None:
        path = _output_path(job, _last_part(name))
        return Delivery(name, tuple(Replica(join_url(as_url(element), path)) for element in wanted))
    bases = _bases(wanted, site)  # an unknown name is told before a missing owner
    lfn = _output_lfn(file, name, several, job, site)
    return Delivery(
        name,
        tuple(Replica(join_url(base.url, lfn), base.storage_element) for base in bases),
        tuple(
            Replica(join_url(site.storage_elements[element], lfn), element)
            for element in site.failover_se
            if element not in wanted
        ),
        lfn,
    )


def sandbox_directory(job: JobDescription, site: Site) -> str:
    """The URL below which a job's output sandbox goes. Raises `InvalidJob` when there is none."""
    if site.sandbox_store is not None:
        return join_url(site.sandbox_store, job.job_id)
    if site.output_directory is not None:
        return _of_job(site.output_directory, job)
    raise InvalidJob("output_sandbox: nowhere to put it: give a site with a sandbox_store or an output_directory")


def without_collisions(deliveries: Iterable[Delivery], taken: dict[str, str]) -> tuple[list[Delivery], dict[str, str]]:
    """The deliveries that take nobody's place, and why the others do, by name. `taken`, target to name, grows."""
    alone, refused = [], {}
    for delivery in deliveries:
        target = delivery.targets[0].url
        if (other := taken.setdefault(target, delivery.name)) == delivery.name:
            alone.append(delivery)
        else:
            refused[delivery.name] = f"would take the place of {other} at {target}"
    return alone, refused


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]


def _in_output_directory(base: str, job: JobDescription, site: Site) -> str:
    """Where an output goes when no storage element is named anywhere: then an output path may be a place itself."""
    if job.output_path is not None and _is_place(job.output_path):
        return join_url(as_url(job.output_path), base)
    if site.output_directory is None:
        raise InvalidJob("output_data: nowhere to put it: name a storage element or a directory in output_se")
    return join_url(_of_job(site.output_directory, job), _output_path(job, base))


def _of_job(directory: str, job: JobDescription) -> str:
    return directory.replace("{job_id}", job.job_id)


def _output_path(job: JobDescription, base: str) -> str:
    """Where an output goes below a directory: under the job's output path, if it has one."""
    path = job.output_path or ""
    if is_url(path):
        raise InvalidJob(f"output_path: {path}: a URL, and output_se names a place too: give one of them")
    return "/".join(filter(None, [(parse_lfn(path) if is_lfn(path) else path).strip("/"), base]))


def _directory(target: str) -> str:
    """Where several files go that have one target: what is before the target's pattern, or below the target itself."""
    above, _, last = target.rpartition("/")
    return f"{above}/" if MAGIC & set(last) else target


def _output_lfn(file: OutputFile, name: str, several: bool, job: JobDescription, site: Site) -> str:
    if file.target is not None:
        lfn = parse_lfn(file.target)
        if not several:
            return lfn
        if lfn == f"/{file.pattern}":  # written as `LFN:/vo/...` alone: the files lie in the work directory as there
            return parse_lfn(f"/{name}")
        return parse_lfn(f"{_directory(lfn).rstrip('/')}/{_last_part(name)}")
    vo = job.vo or site.vo
    if job.owner is None or vo is None:
        missing = "owner" if job.owner is None else "vo"
        raise InvalidJob(f"{missing}: is needed for the LFN of output {name!r}; or write LFN:/... in output_data")
    try:
        return user_lfn(
            name, vo=vo, owner=job.owner, job_id=job.job_id, user_prefix=site.user_prefix, output_path=job.output_path
        )
    except ValueError as exc:
        raise InvalidJob(f"output_path: {exc}") from exc


def _bases(elements: Sequence[str], site: Site) -> list[Replica]:
    """Where storage elements are. Raises `InvalidJob` that names all of them that are nowhere."""
    unknown = [name for name in elements if name not in site.storage_elements and not _is_place(name)]
    if unknown:
        names = f"no storage element{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}"
        known = ", ".join(site.storage_elements) or "none is configured"
        raise InvalidJob(f"output_se: {names} ({known}); a directory is written as a path: ./results or /data/results")
    return [
        Replica(site.storage_elements[name], name) if name in site.storage_elements else Replica(as_url(name))
        for name in elements
    ]


def _is_place(element: str) -> bool:
    return is_url(element) or element.startswith("/")
