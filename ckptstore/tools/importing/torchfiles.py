"""Files of ``torch.save``, read as data only, in a process of their own."""

from __future__ import annotations

import io
import os
import pickletools
import stat
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from collections.abc import Callable
from typing import IO, Any

import torch

from ckptstore.errors import FormatError, IntegrityError, StateError, StorageError
from ckptstore.tools.importing import standins

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that PyTorch has written before 1.6."""

_REFUSAL = "UnpicklingError"
"""What PyTorch raises for what it doesn't take; the class is of a module that is imported nowhere here."""

_PIECE = 8 << 20
_MAX_RECORDS = 4_000_000
_MAX_PICKLE = 1 << 30

Pulse = Callable[[int], None]


def open_file(path: str) -> IO[bytes]:
    """A regular file, open for reading: nothing that one could wait at.

    Raises:
        FormatError: it is something else.
        IntegrityError: it is missing.
        StorageError: it can't be read.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing", key=path) from error
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror}", key=path) from error
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise FormatError(f"{path} is no file", key=path)
    return file


def load_file(path: str, *, stand_in: bool, check: bool, pulse: Pulse) -> Any:
    """The object in a file of ``torch.save``; its tensors lie in the file, where the format allows it.

    Args:
        path: the file.
        stand_in: put inert objects in the place of those whose classes aren't known.
        check: compare the archive's own checksums.
        pulse: called now and then with the number of bytes read.

    Raises:
        StateError: it needs a class or function that isn't known, and names all of them.
        FormatError: it is no such file, or one made to grow.
        IntegrityError: it is damaged.
    """
    with open_file(path) as file:
        begin = file.read(len(_LEGACY))
        zipped = begin.startswith(_ZIP)
        if zipped:
            check_zip(file, path, check=check, pulse=pulse)
        elif begin != _LEGACY:
            raise FormatError(f"{path} is no file of torch.save: it begins with {begin[:8]!r}{_hint(begin)}", key=path)
        file.seek(0)
        # By its number: what was checked is what is read, whatever the name stands for by then.
        name = f"/proc/self/fd/{file.fileno()}" if os.path.exists("/proc/self/fd") else path
        return load(name if zipped else file, file, path, stand_in=stand_in, mmap=zipped)


def _hint(begin: bytes) -> str:
    if begin[:1] == b"\x80":
        return " (a pickle that torch.save didn't write: load and save it with torch.save, where you trust it)"
    return ""


def load(source: Any, file: IO[bytes], name: str, *, stand_in: bool, mmap: bool = False) -> Any:
    """What ``torch.load`` makes of ``source``; ``file`` has the same bytes, for looking into them.

    Raises:
        StateError, IntegrityError: as ``load_file``.
    """
    refused = refused_globals(file) if stand_in else []
    torch.serialization.add_safe_globals([standins.stand_in(name) for name in refused])
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except MemoryError:
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise MemoryError from error
        if refused and type(error).__name__ in (_REFUSAL, "TypeError", "AttributeError"):
            cause = f"{error.__context__ or error}".strip()
            named = ", ".join(map(_current, refused))
            raise StateError(f"{name} can't be read without its objects of {named}: {cause:.300}", path=name) from error
        raise _explained(file, name, error) from error


def _explained(file: IO[bytes], name: str, error: Exception) -> Exception:
    """What to raise for an error of ``torch.load``."""
    refused = refused_globals(file)
    if refused:
        named = ", ".join(map(_current, refused))
        return StateError(
            f"{name} can't be read without running pickled code: it needs {named}. What holds such an object is left "
            "out with without_refused=True (--without-refused for the command)",
            path=name,
        )
    if type(error).__name__ == _REFUSAL:
        # Without the advice that PyTorch puts around it.
        cause = f"{error.__context__ or error}".strip()
        if "Unsupported operand" in cause:
            cause += ", which pickles of torch.save's own protocol 2 don't have: save it anew with torch.save"
        return StateError(f"{name} can't be read without running pickled code: {cause:.300}", path=name)
    return IntegrityError(f"{name} is damaged: {type(error).__name__}: {error!s:.300}", key=name)


# -- archives ----------------------------------------------------------------------------------------------------


def check_zip(file: IO[bytes], name: str, *, check: bool = True, pulse: Pulse = lambda done: None) -> None:
    """Nothing, if an archive is as ``torch.save`` writes them: plain, complete, and no larger when it is read.

    Raises:
        FormatError: it is compressed, its records overlap, or it is another archive.
        IntegrityError: it is cut off, or a checksum differs.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, OverflowError) as error:
        raise IntegrityError(f"{name} is damaged or cut off: {error}", key=name) from error
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise FormatError(f"{name} is compressed, as torch.save never does", key=name)
    if len(members) > _MAX_RECORDS or sum(member.file_size for member in members) > size:
        raise FormatError(f"{name} says that it holds more than its {size} bytes", key=name)
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise FormatError(f"{name} is an archive, but not one of torch.save: it has no data.pkl", key=name)
    if check:
        _check_sums(archive, members, name, pulse)


def _check_sums(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], name: str, pulse: Pulse) -> None:
    done = 0
    # torch.serialization.set_crc32_options(False) leaves them out.
    for member in (member for member in members if member.CRC):
        try:
            with archive.open(member) as stream:
                while piece := stream.read(_PIECE):
                    done += len(piece)
                    pulse(done)
        except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
            raise IntegrityError(f"{name} is damaged in {member.filename!r:.200}: {error}", key=name) from error


# -- what a pickle needs --------------------------------------------------------------------------------------------


def refused_globals(file: IO[bytes]) -> list[str]:
    """The classes and functions that a file's pickle names, and neither PyTorch nor we take for plain data."""
    try:
        data = _pickle_of(file)
        # PyTorch tells which it takes only for archives.
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as made:
            made.writestr("archive/data.pkl", _naming(_globals(data)))
            made.writestr("archive/version", b"3\n")
        archive.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(archive))
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, zipfile.BadZipFile, EOFError, UnicodeError):
        return []


def _pickle_of(file: IO[bytes]) -> bytes:
    file.seek(0)
    if file.read(4) == _ZIP:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return archive.read(name) if archive.getinfo(name).file_size < _MAX_PICKLE else b""
    file.seek(0)
    # A magic number, a version and facts of the machine stand before the object.
    for _ in range(3):
        for _ in pickletools.genops(file):
            pass
    begin = file.tell()
    for _ in pickletools.genops(file):
        pass
    end = file.tell()
    file.seek(begin)
    return file.read(end - begin)


def _current(name: str) -> str:
    """A name as Python 3 has it: pickles have those of Python 2."""
    module, _, rest = name.rpartition(".")
    return f"{IMPORT_MAPPING.get(module, module)}.{rest}"


def _globals(data: bytes) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    texts: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            found.add((module, name))
        elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
            found.add((texts[-2], texts[-1]))
        elif isinstance(argument, str) and "UNICODE" in opcode.name:
            texts = [*texts[-1:], argument]
        elif opcode.name == "MEMOIZE" and texts:
            memo[len(memo)] = texts[-1]
        elif "BINGET" in opcode.name and argument in memo:
            texts = [*texts[-1:], memo[argument]]
    return found


def _naming(names: set[tuple[str, str]]) -> bytes:
    """A pickle that does nothing but name them."""
    return b"\x80\x02" + b"".join(f"c{module}\n{name}\n".encode() for module, name in sorted(names)) + b"."
