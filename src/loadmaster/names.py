"""The names of files: logical names, URLs, and names inside a work directory. Pure rules, no file is touched.

Descriptions come from users and outputs from payloads, so every name is assumed to be hostile until one of these
functions has returned it.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

MAX_COMPONENT_BYTES = 255
"""NAME_MAX of every file system in use on worker nodes."""

MAX_NAME_BYTES = 1024
"""Longest LFN the common file catalogues accept."""

LFN_PREFIX = "LFN:"
SANDBOX_PREFIX = "SB:"


def check_local_name(name: str) -> str:
    """The name itself, once it is sure to stay inside the directory it is joined to.

    Raises ValueError that says what is wrong: empty, absolute, `.` or `..` in it, control characters, or too long.
    Symbolic links are the business of whoever opens the file (`workdir`).
    """
    if not name:
        raise ValueError("a file name is empty")
    if len(name) <= MAX_COMPONENT_BYTES and "/" not in name and name.isascii() and name.isprintable():
        if name in {".", ".."}:
            raise ValueError(f"{name!r}: a file name may not have {name!r} as a part")
        return name  # as nearly all are
    if not name.isprintable():
        raise ValueError(f"{name!r}: a file name may not have control characters")
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"{name[:40]!r}…: a file name of more than {MAX_NAME_BYTES} bytes")
    if name.startswith("/"):
        raise ValueError(f"{name!r}: a file name may not be absolute")
    for part in name.split("/"):
        if part in {"", ".", ".."}:
            raise ValueError(f"{name!r}: a file name may not have {part!r} as a part")
        if len(part.encode(errors="surrogateescape")) > MAX_COMPONENT_BYTES:
            raise ValueError(f"{part[:40]!r}…: a file name of more than {MAX_COMPONENT_BYTES} bytes")
    return name


def is_lfn(text: str) -> bool:
    """Whether the text says it is a logical file name: `LFN:/...`, in any case."""
    return text[: len(LFN_PREFIX)].upper() == LFN_PREFIX


def parse_lfn(text: str) -> str:
    """The logical file name without its prefix: absolute, normal, fit to be joined to a storage element's base.

    DIRAC splits `lfn:` as a prefix but does not resolve it (a bug); here both spellings mean the same.
    """
    path = text[len(LFN_PREFIX) :] if is_lfn(text) else text
    if not path.startswith("/"):
        raise ValueError(f"{text!r}: an LFN must begin with '/'")
    check_local_name(path[1:])
    return path


def user_lfn(
    name: str, *, vo: str, owner: str, job_id: str, user_prefix: str = "user", output_path: str | None = None
) -> str:
    """Where an output goes that has no LFN of its own: `/<vo>/<prefix>/<o>/<owner>/<path>/<name>`.

    `<path>` is the job's OutputPath, or `<job_id // 1000>/<job_id>` as DIRAC has it (the bare id when it is no number).
    An output path that is itself an LFN is absolute.
    """
    base = PurePosixPath(name).name
    if output_path is not None and is_lfn(output_path):
        return parse_lfn(f"{parse_lfn(output_path.rstrip('/'))}/{base}")
    if output_path is not None:
        path = output_path.strip("/")
    else:
        path = f"{int(job_id) // 1000}/{job_id}" if job_id.isdecimal() and job_id.isascii() else job_id
    return parse_lfn(f"/{vo}/{user_prefix}/{owner[:1]}/{owner}/{path}/{base}")


def is_url(text: str) -> bool:
    """Whether the text has a scheme, as in `file:///data` or `root://host//data`."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.isascii() and scheme.replace("+", "").replace("-", "").isalnum()


def file_url(path: str | Path) -> str:
    """The `file://` URL of an absolute path."""
    return "file://" + quote(str(path), safe="/!$&'()*+,;=:@~{}", errors="surrogateescape")


def local_path(url: str) -> Path:
    """The path a `file://` URL names. Raises ValueError when it names another host, or no absolute path."""
    return Path(local_file(url))


def local_file(url: str) -> str:
    """As `local_path`, a text: for many files, a `Path` of each costs more than all the rest."""
    if url.startswith("file:///"):  # as nearly all are, and taking a URL to pieces is not cheap either
        quoted = url[7:]
    else:
        parts = urlsplit(url, allow_fragments=False)
        if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
            raise ValueError(f"{url}: not a file:// URL of this host")
        quoted = url.partition("://")[2].removeprefix(parts.netloc)
    path = unquote(quoted, errors="surrogateescape") if "%" in quoted else quoted
    if not path.startswith("/") or "\0" in path:
        raise ValueError(f"{url}: not an absolute path")
    return path.rstrip("/") or "/"


def as_url(text: str) -> str:
    """A URL as it is, a plain absolute path as a `file://` URL."""
    if is_url(text):
        return text
    if not text.startswith("/"):
        raise ValueError(f"{text!r}: neither a URL nor an absolute path")
    return file_url(text)


def shown(url: str) -> str:
    """A URL as a person would write it: a plain path if it is one of this machine."""
    return str(local_path(url)) if url.startswith("file://") else url


def join_url(base: str, name: str) -> str:
    """The URL of a checked relative name below a base URL.

    One slash is taken from the base, not all: `file:///` and `root://host//` need theirs.
    """
    return f"{base.removesuffix('/')}/{quote(check_local_name(name.lstrip('/')), safe='/', errors='surrogateescape')}"


def base_name(source: str) -> str:
    """The name a file has inside a work directory when nobody gave it one: the last part of its path."""
    if is_lfn(source):
        path = parse_lfn(source)
    elif source.startswith(SANDBOX_PREFIX):
        path = source.partition("|")[2]
    elif is_url(source):
        path = unquote(urlsplit(source, allow_fragments=False).path, errors="surrogateescape")
    else:
        path = source
    name = path.rstrip("/").rpartition("/")[2]
    if not name:
        raise ValueError(f"{source!r} does not name a file")
    return check_local_name(name)
