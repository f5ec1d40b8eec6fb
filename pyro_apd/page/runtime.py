# Copyright Contributors to the pyro_apd project.
# SPDX-License-Identifier: Apache-2.0

"""The runtime of a page: onnxruntime-web, from a folder or from the archive that ``npm pack`` fetches."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tarfile
from pathlib import Path

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
#: Of the archive, as npm states it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
LIBRARY, SCRIPT, PROGRAM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"


def runtime_script(path: Path) -> str:
    """One script with library and program of the runtime, so that a page needs no server.

    The program is compressed, which browsers undo; it is a third as large then.

    :param path: the archive ``onnxruntime-web-VERSION.tgz``, whose integrity is checked; or a folder with the files of
        its ``dist``, or with ``dist`` in it.
    :raises ValueError: if files are missing, or the archive is not the one of :data:`INTEGRITY`.
    :raises FileNotFoundError: if there is no such file or folder.
    """
    found = _from_folder(path) if path.is_dir() else _from_archive(path)
    # mtime, so that the same runtime gives the same page.
    program = base64.b64encode(gzip.compress(found[PROGRAM], 6, mtime=0)).decode("ascii")
    parts = {"script": found[SCRIPT].decode("utf-8"), "wasm": program}
    library = found[LIBRARY].decode("utf-8")
    return f"{library}\nwindow.APD_RUNTIME = {json.dumps(parts)};\n"


def _from_folder(path: Path) -> dict[str, bytes]:
    folder = path / "dist" if (path / "dist").is_dir() else path
    missing = [name for name in (LIBRARY, SCRIPT, PROGRAM) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"The runtime in {path} lacks {missing}. Fetch it by `npm pack {PACKAGE}@{VERSION}` and pass the archive."
        )
    return {name: (folder / name).read_bytes() for name in (LIBRARY, SCRIPT, PROGRAM)}


def _from_archive(path: Path) -> dict[str, bytes]:
    contents = path.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(contents).digest()).decode("ascii")
    if digest != INTEGRITY:
        raise ValueError(
            f"The runtime {path} is not {PACKAGE} {VERSION}: its integrity is {digest:.20}..., expected "
            f"{INTEGRITY:.20}.... Fetch it by `npm pack {PACKAGE}@{VERSION}`, or pass a folder with another version."
        )
    with tarfile.open(path) as archive:
        files = {name: archive.extractfile(f"package/dist/{name}") for name in (LIBRARY, SCRIPT, PROGRAM)}
        return {name: file.read() for name, file in files.items() if file is not None}
